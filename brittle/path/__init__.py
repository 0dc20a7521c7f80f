"""The path: the recorded training, from step to step. `rules` is the mathematics, `store` the files."""
