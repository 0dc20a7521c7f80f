"""The kernel between M queries and all N training examples at K checkpoints.

    kernel[m, i] = sum_k rate_k < gradient of query m's output at w_k , gradient of example i's loss at w_k >

over the parameters, the model being evaluated. With the queries' losses for outputs this is TracInCP (Pruthi, Liu,
Kale, Sundararajan 2020, "Estimating training data influence by tracing gradient descent", arXiv 2002.08484); with one
checkpoint and the margins it is the tangent kernel. It is no account of what was learned: the steps between the
checkpoints are left out.

At each checkpoint the queries are pulled back once, the training data pass by in blocks, and gradients are multiplied
in factors (`factors`).
"""

from __future__ import annotations

from torch import Tensor

from brittle.kernel.factors import Factors, factors_of, products, ready
from brittle.kernel.gradients import Scalar
from brittle.kernel.quadrature import blocks, check_outputs, output_factors
from brittle.path.flat import FlatModel
from brittle.records import Pairs, Progress
from brittle.subject import Subject

BLOCK = 256
"""Training examples that are pulled back at once, at most."""

QUERIES = 512
"""Queries whose factors are kept together."""


def kernel_matrix(
    subject: Subject,
    states: Tensor,
    rates: Tensor,
    inputs: Tensor,
    outputs: Pairs | Tensor,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """The kernel of M queries and the training examples, (M, N); the loss must be a mean over its batch.

    Args:
        states: of the checkpoints, (K, P), in the order of `FlatModel`.
        rates: the checkpoints' weights, as learning rates, (K,).
        inputs: the queries, raw, (M, *input).
        outputs: of the queries: pairs, for their margins, or targets (M,), for their losses.
        progress: told (pulled back, K N).

    Raises:
        UnsupportedError: where the model cannot be taken apart by examples.

    Cost: K (N + M) forward and backward passes, and what `factors.cheapest` says of M N products a layer. Memory: the
    factors of the queries and of one block.
    """
    flat = FlatModel(subject.model, device)
    check_outputs(subject, flat)
    count = len(subject.train)
    out = flat.state.new_zeros(len(inputs), count)
    for k, (state, rate) in enumerate(zip(states, rates.tolist(), strict=True)):
        flat.load(state)
        queries = [
            (rows, _queries(subject, flat, state, inputs[rows], outputs[rows])) for rows in blocks(len(inputs), QUERIES)
        ]
        for columns in blocks(count, BLOCK):
            examples = subject.train.inputs[columns], subject.train.targets[columns]
            right = factors_of(flat, losses(subject, flat, *examples), len(examples[0]))
            for rows, left in queries:
                out[rows, columns].add_(products(flat, left, right), alpha=rate)
            if progress:
                progress(k * count + columns.stop, len(states) * count)
    return out.cpu()


def losses(subject: Subject, flat: FlatModel, inputs: Tensor, targets: Tensor) -> Scalar:
    """The sum of the losses of some examples, each as in a batch of its own, to be differentiated by rows."""
    model, x, y = flat.eval(), inputs.to(flat.state), targets.to(flat.state.device)
    return lambda: len(x) * subject.loss_of(subject.run(model, x), y)


def _queries(subject: Subject, flat: FlatModel, state: Tensor, inputs: Tensor, outputs: Pairs | Tensor) -> Factors:
    """Factors of the queries' outputs, for many blocks of training examples."""
    if isinstance(outputs, Tensor):
        found = factors_of(flat, losses(subject, flat, inputs, outputs), len(inputs))
    else:
        found = output_factors(subject, flat, state, inputs, outputs)
    count = len(subject.train)
    return ready(found, min(BLOCK, count), -(-count // BLOCK))
