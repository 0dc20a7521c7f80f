"""The tangent kernel of the final weights: what can be said when the path is not known.

At the final weights w, one more step of gradient descent on example i would move the output at x by

    - lr <J(x; w), grad loss_i(w)>.

This is local: it says which examples would move a prediction now, not which ones made it, and it closes no
account. Numbers are logits per unit of learning rate of a full-batch step (each example weighs 1/N). Such a step
moves parameters, not running statistics; gradients are those of the evaluated model.

Source: Jacot, Gabriel, Hongler 2018, "Neural Tangent Kernel" (arXiv 1806.07572).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from brittle.data import Examples
from brittle.kernel.gradients import row_gradients
from brittle.kernel.matrix import kernel_matrix
from brittle.kernel.memory import Memory
from brittle.kernel.quadrature import check_outputs, output_gradients, row_blocks
from brittle.path.flat import FlatModel
from brittle.records import Groups, Pairs, Progress
from brittle.subject import Subject


def tangent_contributions(
    subject: Subject, inputs: Tensor, pairs: Pairs, device: str = "cpu", progress: Progress | None = None
) -> Tensor:
    """Tangent contributions of every training example to M outputs: (M, N).

    Cost: that of `matrix.kernel_matrix` with one checkpoint.
    """
    final, rate = FlatModel(subject.model).state, torch.tensor([1 / len(subject.train)])
    return -kernel_matrix(subject, final[None], rate, inputs, pairs, device, progress)


def tangent_memory(subject: Subject, groups: Groups, device: str = "cpu", progress: Progress | None = None) -> Memory:
    """The groups' full-batch gradient steps at the final weights, as a memory of one segment of length zero."""
    flat = FlatModel(subject.model, device)
    check_outputs(subject, flat)
    moved = flat.state.new_zeros(len(groups) + 1, len(flat))
    for rows, gradients in _loss_gradients(subject, flat, progress):
        moved.index_add_(0, groups.labels[rows].to(device), -gradients)
    return Memory(flat.state.cpu().expand(2, -1).clone(), moved.cpu()[None], nodes=1)


def tangent_features(
    subject: Subject, examples: Examples, dimensions: int, generator: torch.Generator, device: str = "cpu"
) -> Tensor:
    """Output gradients at the final weights, randomly projected: (len(examples), dimensions).

    Inner products estimate the tangent kernel between margins with relative error about 1 / sqrt(dimensions)
    (Johnson and Lindenstrauss 1984); use them for short-listing, not for accounts.
    """
    flat = FlatModel(subject.model, device)
    size = min(dimensions, len(flat))
    projection = torch.randn(len(flat), size, generator=generator).to(flat.state) / size**0.5
    pairs = Pairs.of(subject.predict(examples.inputs))
    return torch.cat([(j @ projection).cpu() for j in _jacobians(subject, flat, examples.inputs, pairs)])


def _jacobians(subject: Subject, flat: FlatModel, inputs: Tensor, pairs: Pairs) -> Iterator[Tensor]:
    """Output gradients at the final weights, block by block: (B, P), 0 for running statistics."""
    check_outputs(subject, flat)
    final = flat.state.clone()
    for rows in row_blocks(len(inputs), flat):
        yield _of_parameters(flat, output_gradients(subject, flat, final, inputs[rows], pairs[rows]))


def _loss_gradients(subject: Subject, flat: FlatModel, progress: Progress | None) -> Iterator[tuple[slice, Tensor]]:
    """Row gradients of the mean training loss in evaluation mode: slices of the data and (B, P)."""
    model, train = flat.eval(), subject.train
    for rows in row_blocks(len(train), flat):
        inputs = train.inputs[rows].to(flat.state)
        targets = train.targets[rows].to(flat.state.device)
        share = len(inputs) / len(train)

        def loss(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            return subject.loss_of(subject.run(model, inputs), targets)

        yield rows, _of_parameters(flat, row_gradients(flat, loss, len(inputs))) * share
        if progress:
            progress(rows.stop, len(train))


def _of_parameters(flat: FlatModel, gradients: Tensor) -> Tensor:
    gradients[:, flat.parameters :] = 0
    return gradients
