"""What really happens under probes: a linear model fails at the first level beyond its boundary, and not before."""

from __future__ import annotations

import torch
from torch import nn

from brittle.data import Examples
from brittle.outcomes import LEVELS, Observed, observe
from brittle.probes import direction_families, margin_gradient
from brittle.records import Pairs, Queries
from brittle.subject import Subject


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_linear_model_fails_at_the_first_level_beyond_its_boundary() -> None:
    """Along the steepest descent a linear margin m with gradient g is gone at severity m / |g|."""
    torch.manual_seed(0)
    inputs = 0.4 + 0.2 * torch.rand(240, 30, generator=seeded())
    model = nn.Linear(30, 2).eval()
    with torch.no_grad():
        model.bias.copy_(-model.weight @ inputs.mean(0))  # so that both classes are predicted
        targets = model(inputs).argmax(1)
    subject = Subject(model, Examples(inputs[:120], targets[:120]), Examples(inputs[120:], targets[120:]))
    logits = subject.predict(inputs[120:])
    queries = Queries(torch.arange(120), inputs[120:], targets[120:], logits, Pairs.of(logits))
    descent = direction_families(subject, seeded())[1]
    draws = {descent.name: descent.draw(queries.inputs, seeded())}
    observed = observe(subject, queries, [descent], draws, lambda done, total: None)

    margin, gradient = margin_gradient(subject, queries.inputs)
    share = margin / gradient.norm(dim=1) / descent.reference
    beyond = torch.tensor(LEVELS) > share[:, None]  # shape: (M, levels)
    clear = ((torch.tensor(LEVELS) - share[:, None]).abs() > 1e-3).all(1)
    assert clear.sum() >= 20
    assert beyond.any(1).sum() >= 5
    assert (~beyond.any(1)).sum() >= 5
    expected = torch.where(beyond, torch.tensor(LEVELS, dtype=torch.float64), torch.inf).amin(1)
    assert torch.equal(observed.severity(queries.targets)[clear, 0], expected[clear])
    assert torch.equal(observed.failed(queries.targets)[clear, 0], beyond.any(1)[clear])


def test_severity_is_the_mildest_level_that_failed() -> None:
    classes = torch.tensor([[[0, 1, 0, 1]], [[0, 0, 0, 0]], [[1, 0, 0, 0]]])  # shape: (M, F, levels)
    observed, targets = Observed(classes), torch.zeros(3, dtype=torch.int64)
    assert observed.severity(targets)[:, 0].tolist() == [LEVELS[1], torch.inf, LEVELS[0]]
    assert observed.failed(targets)[:, 0].tolist() == [True, False, True]
    assert torch.equal(observed[1:].classes, classes[1:])
