"""What is printed: a table for people, and one line of JSON for machines; and what the figures are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.fidelity.measure import BAR_COSINE, BAR_FLOAT64, BAR_RELU, Figures

HEADER = (
    f"{'case':34} {'float64':>9} {'unexpl.':>9} {'ReLU':>9} {'unexpl.':>9} {'credit':>9} {'drift':>9} {'k':>3} {'s':>5}"
)


AT_MOST = {
    "failed": 0,
    "worst_float64": BAR_FLOAT64,
    "worst_unexplained": BAR_FLOAT64,
    "worst_relu_float32": BAR_RELU,
    "recording_overhead": 1.10,
    "recording_overhead_small": 1.25,
    "resnet_residual": BAR_RELU,
    "resnet_drift": 0.01,
}

AT_LEAST = {"worst_credit_cosine": BAR_COSINE}


def missed(found: Mapping[str, Any]) -> list[str]:
    """The bars that the figures miss; a figure that was not taken misses none."""
    taken = {key: value for key, value in found.items() if value is not None}
    high = [f"{key} {taken[key]:.3g} > {bar:g}" for key, bar in AT_MOST.items() if not taken.get(key, bar) <= bar]
    low = [f"{key} {taken[key]:.3g} < {bar:g}" for key, bar in AT_LEAST.items() if not taken.get(key, bar) >= bar]
    return high + low


def line(f: Figures) -> str:
    """One case as one row of the table."""
    show = lambda value: f"{'-' if value is None else format(value, '.2g'):>9}"  # noqa: E731
    cosine = f"{'-' if f.cosine is None else format(f.cosine, '.5f'):>9}"
    numbers = [show(v) for v in (f.float64, f.unexplained, f.relu, f.relu_unexplained)]
    verdict = f"  FAILED: {'; '.join(f.missed)}" if f.missed else ""
    return f"{f.name:34} {' '.join(numbers)} {cosine} {show(f.drift)} {f.every or '-':>3} {f.seconds:5.1f}{verdict}"


def summary(figures: Sequence[Figures]) -> dict[str, Any]:
    """The worst of each figure over the cases. Unknown optimizers and mixed precision stand apart."""
    exact = [f for f in figures if not f.case.mixed]
    known = [f for f in figures if f.case.known]
    mixed = [f for f in figures if f.case.mixed]
    worst = lambda part, pick: _most(max, part, pick)  # noqa: E731
    return {
        "cases": len(figures),
        "failed": sum(bool(f.missed) for f in figures),
        "failures": {f.name: "; ".join(f.missed) for f in figures if f.missed},
        "worst_float64": worst(figures, lambda f: f.float64),
        "worst_unexplained": worst(known, lambda f: f.unexplained),
        "worst_relu_float32": worst(exact, lambda f: f.relu),
        "worst_relu_unexplained": worst([f for f in known if not f.case.mixed], lambda f: f.relu_unexplained),
        "worst_credit_cosine": _most(min, figures, lambda f: f.cosine),
        "worst_drift": worst(figures, lambda f: f.drift),
        "mixed_precision_residual": worst(mixed, lambda f: f.relu),
        "mixed_precision_unexplained": worst(mixed, lambda f: f.relu_unexplained),
        "unknown_optimizer_unexplained": {f.name: f.relu_unexplained for f in figures if not f.case.known},
        "cases_seconds": round(sum(f.seconds for f in figures), 1),
    }


def _most(
    choose: Callable[[Iterable[float]], float], figures: Sequence[Figures], pick: Callable[[Figures], float | None]
) -> float | None:
    found = [value for value in map(pick, figures) if value is not None]
    return choose(found) if found else None
