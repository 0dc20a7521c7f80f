"""Does the account close, and is the credit right, for the trainings that people really run? `benchmarks/fidelity.md`.

`cases` is the list; `models`, `draws`, `loops` are what it is made of; `measure` takes one case's figures;
`overhead` is what recording costs, `resnet` the large example; `report` the table and the line of JSON.
"""
