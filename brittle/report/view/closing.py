"""The end of the page: cost, and the words used."""

from __future__ import annotations

from dataclasses import dataclass

from brittle.findings import Findings
from brittle.report.formatting import duration, number

GLOSSARY = (
    ("Query", "An input whose prediction is explained."),
    ("Output", "The margin, in logits, of the predicted class over its rival; the pair is fixed at the clean query."),
    ("Margin", "How far the predicted class is ahead of its rival, in logits. The prediction flips where it is gone."),
    ("Path", "The recorded training: the weights from step to step and what each step used."),
    ("Contribution", "By how many logits one training example moved one output. It is not a counterfactual."),
    ("Ledger", "The whole account of one output: start, contributions, decay, buffers, unexplained, residual."),
    ("Mass", "Contributions summed over a group of examples: net is the signed sum, gross the sum of absolute values."),
    ("Cancellation", "Gross over net: how much larger the single contributions are than what remains of them."),
    ("Residual", "What the sum over the path missed of the true output; computed from the true output, never spread."),
    ("Group memory", "Each group's displacement of the weights, summed up once; gives the mass at any input."),
    ("Probe", "A small perturbation of a query: a family such as blur, or a direction, with a severity."),
    ("Reference severity", "The severity of a probe family at which failures are predicted and observed."),
    ("Shift", "The change of mass from a query to its probe: what leaves and what arrives."),
    ("Hole", "A predicted failure region: queries and probes whose mass leaks from the same group to the same group."),
    ("Natural hole", "A hole that no probe opens: queries held up alike that are predicted to be wrong as they are."),
    ("Finding", "A hole that fails more often than random regions of its size, class and confidence."),
    ("Support", "The number of queries in a hole."),
    ("Failure", "An observed misclassification: natural, under a probe, or by an attack. Kinds are never pooled."),
    ("AUROC", "The chance that a score ranks a failing input above one that holds; 0.5 is guessing."),
    ("Suggestion", "An example, or a kind of example, to add to the training data."),
)  # fmt: skip


@dataclass(frozen=True)
class StageRow:
    """What one stage cost; `share` of the whole time."""

    stage: str
    time: str
    share: float
    memory: str
    evaluations: str


@dataclass(frozen=True)
class CostView:
    total: str
    device: str
    stages: tuple[StageRow, ...]


def cost_of(findings: Findings) -> CostView:
    """Stages in the order of the findings."""
    cost = findings.cost
    whole = sum(stage.seconds for stage in cost.stages) or 1.0
    return CostView(
        total=duration(cost.seconds),
        device=cost.device,
        stages=tuple(
            StageRow(
                stage.stage,
                duration(stage.seconds),
                stage.seconds / whole,
                f"{stage.peak_memory_mb:,.0f} MB",
                number(stage.gradient_evaluations),
            )
            for stage in cost.stages
        ),
    )
