"""What an audit asks of a machine: how often it does what (`seconds`), what it holds, and what it writes.

    seconds of a stage = sum over what it does of (how often) x (seconds of one, `Speed`)

The counts follow the stages of `brittle.pipeline`. Attacks are taken at their full budget, segments at their first
number of nodes, so that it is an estimate: within a factor of three on the examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from brittle.accounts import FINE_NODES, FINE_SEGMENTS, SAMPLE_FAMILIES, SAMPLE_QUERIES
from brittle.agreement.baselines.gradients import RIVALS
from brittle.attacks.plan import candidates, most_evaluations
from brittle.doctor.check import Visit
from brittle.doctor.gradients import FIRST
from brittle.doctor.speed import NEIGHBOURS, Speed
from brittle.flips import BY_ATTACK, BY_PROBE
from brittle.kernel.machine import LANDMARKS
from brittle.kernel.sweep import Quadrature
from brittle.kernel.units import BUDGET, bytes_each
from brittle.mass import labelled_groups
from brittle.outcomes import LEVELS
from brittle.path.checkpoints import Checkpoints
from brittle.path.flat import layout
from brittle.path.recipe import OBSERVED
from brittle.pipeline.context import NORMS, Effort
from brittle.pipeline.reaching import REACH_PASSES
from brittle.probes import MAP_SHARES, families_for
from brittle.scores import LATE_STATES, TAUGHT
from brittle.split import MOST_NATURAL
from brittle.suggest.plan import DIMENSIONS, MOST_COVERED

FLIPS = sum(BY_ATTACK) + BY_PROBE
ATTACKS = 10
"""Attacks over both norms."""

CLUSTER = 10
"""Training examples for each cluster, as in `mass.cluster_groups`."""

PASSES = {"advance": 6, "pull back": 4, "bootstrap": 1_500_000}
"""Times that a number is touched: of a group's buffer in a step, of a query's, and of an input in a comparison."""

FACTORED = 0.1
"""Multiplications that an inner product of two gradients takes in factors, over the number of weights."""

WRITING = 8.0
"""Seconds for loading, clusters, figures and tables, about."""

PAGE = 8 << 20
"""Bytes of the report, its figures and tables."""


@dataclass(frozen=True)
class Known:
    """What is known of the training, as far as it costs time: a path of `steps`, or none (0)."""

    steps: int
    batches: float  # a step
    rows: float  # a batch
    replayed: bool
    segment: int  # steps that share a gradient in the sweep
    nodes: int  # of such a segment
    recorded: bool = True  # so that it is known how long training took


@dataclass(frozen=True)
class Demand:
    """The sizes on which the cost of an audit depends."""

    effort: Effort
    preset: str
    known: Known
    state: int  # P
    itemsize: int
    pixels: int  # numbers in an input
    classes: int
    groups: int
    families: int
    train: int
    test: int
    pool: int
    retrained: bool
    queries: int  # that predict; as many are sealed

    @property
    def segments(self) -> int:
        return min(self.effort.segments, self.known.steps) if self.known.steps else 1

    @property
    def evaluations(self) -> int:
        """Gradient passes that the mass of one input costs."""
        return self.segments * (self.effort.nodes if self.known.steps else 1)

    @property
    def accounted(self) -> int:
        """Outputs in the ledger: the queries, and the flips before and after."""
        return self.queries + 2 * FLIPS

    @property
    def natural(self) -> int:
        return min(max(self.queries, MOST_NATURAL), self.test - self.queries)

    @property
    def retrainings(self) -> int:
        return 2 * self.effort.retrainings if self.pool and self.retrained else 0

    @property
    def memory_bytes(self) -> int:
        """The group memory: the ends of its segments, and what each group and decay displaced in them."""
        return (self.segments + 1 + self.segments * (self.groups + 1)) * self.state * self.itemsize

    @property
    def query_bytes(self) -> int:
        """What the ledger holds of its outputs at once: gradients, and the buffers of the walk back."""
        if not self.known.steps:
            return 2 * self.accounted * self.state * self.itemsize
        return min(self.accounted * bytes_each(self.state, self.itemsize, self.train), BUDGET)

    @property
    def walks(self) -> int:
        """How often the ledger walks the path: once for each block of outputs."""
        return math.ceil(self.accounted / max(1, BUDGET // bytes_each(self.state, self.itemsize, self.train)))

    @property
    def held_bytes(self) -> int:
        """Memory (RAM) at the fullest: the group memory while it is written, or the ledger's outputs."""
        data = (self.train + self.test + self.pool) * self.pixels * self.itemsize
        return max(2 * self.memory_bytes, self.query_bytes) + data

    @property
    def written_bytes(self) -> int:
        """The run folder."""
        ledger = 4 * self.accounted * self.train
        shift = 2 * self.queries * (1 + self.families * len(MAP_SHARES)) * self.groups * 8
        return self.memory_bytes + ledger + shift + ATTACKS * self.queries * self.pixels * self.itemsize + PAGE

    def seconds(self, speed: Speed) -> dict[str, float]:
        """By stage."""
        stages = {
            "memory": self._walk(speed, self.groups, PASSES["advance"]) + self._choice(speed),
            "its check": self._check(speed),
            "shift": 2 * self.queries * (1 + self.families * len(MAP_SHARES)) * self.evaluations * speed.gradient,
            "probes": 2 * self.queries * self.families * len(LEVELS) * speed.forward,
            "attacks": self._attacks(speed),
            "ledger": self._ledger(speed),
            "agreement": self._agreement(speed),
            "suggestions": self._suggestions(speed) if self.pool else 0.0,
            "retraining": self._retraining(speed) if self.retrainings and self.known.recorded else 0.0,
            "report": WRITING,
        }
        return {name: seconds for name, seconds in stages.items() if seconds}

    def _walk(self, speed: Speed, buffers: int, passes: int) -> float:
        """Along the path with the row gradients of every step, and buffers for groups or queries."""
        known = self.known
        if not known.steps:
            return self.train * speed.gradient
        batch = speed.rows + known.replayed * speed.plain + buffers * known.rows * self.state * speed.multiply
        return known.steps * (known.batches * batch + passes * buffers * self.state * speed.touch)

    def _check(self, speed: Speed) -> float:
        if not self.known.steps:
            return 0.0
        return self._walk(speed, self.groups, PASSES["advance"]) + self._choice(speed)

    def _choice(self, speed: Speed) -> float:
        """A sample of probes at the finer account's nodes, and at those of a memory as large as may be."""
        if not self.known.steps:
            return 0.0
        inputs = SAMPLE_QUERIES * (1 + min(SAMPLE_FAMILIES, self.families) * len(MAP_SHARES))
        passes = self.evaluations + min(self.known.steps, FINE_SEGMENTS) * FINE_NODES
        return inputs * passes * speed.gradient

    def _attacks(self, speed: Speed) -> float:
        asked = 2 * min(candidates(self.preset), self.classes - 1)  # of the whole path as one segment
        return self.queries * (most_evaluations(self.preset) * speed.attack + asked * speed.guide)

    def _ledger(self, speed: Speed) -> float:
        known = self.known
        if not known.steps:
            products = self.accounted * self.train * self.state * speed.multiply
            return (self.accounted + self.train) * speed.gradient + products
        lines = known.nodes * (math.ceil(known.steps / known.segment) * self.queries + known.steps * 2 * FLIPS)
        again = (self.walks - 1) * self._walk(speed, 0, PASSES["pull back"])
        return self._walk(speed, self.accounted, PASSES["pull back"]) + again + lines * speed.gradient

    def _agreement(self, speed: Speed) -> float:
        forwards = self.natural + self.queries * (1 + 2 * (1 + self.families))  # predicting queries calibrate
        late = LATE_STATES * forwards if self.known.steps else 0
        descent = max(self.evaluations, REACH_PASSES)
        slopes = (min(RIVALS, self.classes - 1) + 2 + descent) * (self.natural + 2 * self.queries)
        searches = len(NORMS) * REACH_PASSES * self.queries
        compared = self.natural + self.queries * (self.families + 2)
        return (
            self.natural * self.evaluations * speed.gradient
            + late * speed.forward
            + (slopes + searches) * speed.attack
            + self._machine(speed)
            + 2 * speed.neighbours * max(1.0, self.train / NEIGHBOURS) ** 2
            + compared * PASSES["bootstrap"] * speed.touch
        )

    def _machine(self, speed: Speed) -> float:
        """The kernel machine: gradients of what it is taught with and asked, and their products with its landmarks."""
        looked = min(TAUGHT, self.train) + self.natural + self.queries
        products = min(LANDMARKS, self.train) * self.state * FACTORED * speed.multiply
        return (2 if self.known.steps else 1) * looked * (speed.gradient + products)

    def _suggestions(self, speed: Speed) -> float:
        looked = min(self.pool, MOST_COVERED) + min(self.train, MOST_COVERED) + self.queries
        return looked * (speed.gradient + DIMENSIONS * self.state * speed.multiply)

    def _retraining(self, speed: Speed) -> float:
        """As long as the plain gradients of the recorded training."""
        return self.retrainings * self.known.steps * self.known.batches * speed.plain


def demand_of(v: Visit) -> Demand:
    """What the audit of a subject asks."""
    s = v.subject
    families = families_for(s, torch.Generator().manual_seed(0))
    per_class = torch.bincount(s.train.targets, minlength=s.classes)
    clusters = (per_class // CLUSTER).clamp(1, v.effort.clusters)
    return Demand(
        effort=v.effort,
        preset=v.preset,
        known=_known(v),
        state=layout(s.model)[-1].stop,
        itemsize=s.train.inputs.element_size(),
        pixels=s.train.inputs[0].numel(),
        classes=s.classes,
        groups=int(clusters.sum()) if s.groups is None else len(labelled_groups(s, s.groups)),
        families=len(families),
        train=len(s.train),
        test=len(s.test),
        pool=0 if s.pool is None else len(s.pool),
        retrained=s.retrain is not None,
        queries=min(v.queries, len(s.test) // 2),
    )


def _known(v: Visit) -> Known:
    path, q = v.path, Quadrature()
    if path is None:
        return Known(0, 0.0, 0.0, False, 1, 1, recorded=False)
    if isinstance(path, Checkpoints):
        return Known(path.steps, len(v.subject.train) / FIRST, FIRST, True, 1, q.most, recorded=False)
    first = path.step(0)
    batches = len(first.batches)
    replayed = len(path.marks) <= path.steps and path.optimizer != OBSERVED
    return Known(path.steps, batches, path.visits / path.steps / batches, replayed, q.segment, q.nodes)
