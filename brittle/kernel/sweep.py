"""The account of each output, example by example: one walk backwards along the path.

For query x with output f, weights w_s and D_s = w_{s+1} - w_s (Domingos 2020, arXiv 2012.00152, eq. 1 made
exact by taking the line integral of each step):

    f(x; w_S) - f(x; w_0) = sum_s integral_0^1 J(x; w_s + t D_s) D_s dt.

Every D_s is linear in the gradients of this step and of earlier ones (`path.rules`). Walking backwards with one
buffer E per query collects how much a gradient spent at step j moved the output through all later steps;

    contribution of example i in step j = - <credit_j, row gradient of i at w_j>.

Memory is queries x parameters, never examples x parameters: row gradients are used up tensor by tensor. Segments of
several steps share one Jbar.

Averaged weights (EMA, SWA) are one more straight line, from the last weights w_S to the average

    average = w_S - sum_s behind_s D_s,

so that with J~ averaged over that line each step's gradient is Jbar - behind_s J~ (`PathReader.behind`).

A bias before batch normalization has no gradient but rounding, which Adam blows up to whole steps; the running mean
follows it, and the output does not notice. What such coordinates do beyond what is credited goes where the running
statistics are, to the row `buffers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from brittle.kernel.credit import Credit, plain
from brittle.kernel.mixed import Layout, Mixed, rows_of
from brittle.kernel.precision import lowered
from brittle.kernel.pull import pulled
from brittle.kernel.quadrature import Allowance, Line, check_outputs, line_gradient, output_factors, outputs_at
from brittle.kernel.steps import check_step, couples, step_factors, step_parts
from brittle.path.checkpoints import Checkpoints
from brittle.path.flat import FlatModel
from brittle.path.observed import Batch
from brittle.path.recipe import named_momentum
from brittle.path.replay import Path, walk
from brittle.path.rules import absent
from brittle.path.store import PathReader
from brittle.path.walked import Interval, WalkedStep
from brittle.records import Ledger, Pairs, Progress
from brittle.subject import Subject

SEGMENTS = 12
"""Segments that even a short path is cut into."""

GROWTH = 1.5
"""How far, at most, a segment leads from a step s: to s * GROWTH. A network changes most in its first steps."""

TAIL = 1e-9
"""Share of a momentum buffer that may be cut off where a stretch begins."""

LEFT_OUT = 0.25
"""Share of a credit's norm that may be left out for fewer terms (`credit`), over the tolerance."""

LONGER, FEWEST = 4, 16
"""How much longer than its warm-up a stretch is at least, and the fewest steps that are taken for one."""


@dataclass(frozen=True)
class Quadrature:
    """How finely segments are taken.

    segment: steps that share one averaged gradient, fewer in a path of less than `SEGMENTS` such, and where the path
    begins. nodes: midpoints to begin with. most: midpoints at most, a third of that where the sum of what lines miss
        asks for no more.
    tolerance: the relative residual aimed at. Of L segments each may miss tolerance * (learned change) / sqrt(L), and
        the first l together sqrt(l) times that: as much as misses of either sign come to.
    gauss: Gauss-Legendre nodes, `nodes` of them, in place of midpoints: for smooth models, not refined.
    """

    segment: int = 8
    nodes: int = 3
    most: int = 81
    tolerance: float = 0.015
    gauss: bool = False


@dataclass(frozen=True)
class Swept:
    """The ledger of M outputs and what it cost."""

    ledger: Ledger
    drift: float
    evaluations: int


def sweep(
    path: Path,
    subject: Subject,
    inputs: Tensor,
    pairs: Pairs,
    quadrature: Quadrature | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    stretch: tuple[int, int] | None = None,
) -> Swept:
    """The ledger of the outputs `pairs` at `inputs`, from the recorded path.

    Args:
        inputs: raw inputs, (M, *input).
        pairs: the two classes of each output's margin.
        stretch: one of `stretches(path)`, to account for what its steps did, from f(w_a) to f(w_b), alone. The
            ledgers of all stretches add up to the whole one.

    Returns:
        `Swept`; its ledger's rows add up to the outputs, and `residual` is what quadrature missed.

    Raises:
        PathMismatchError, DamagedFileError: where the path does not replay or cannot be read.
        UnsupportedError: where the model cannot be taken apart by examples.

    Cost: S batches of row gradients and M x B x P multiplications a step; Jbar costs M x nodes gradient passes
    a segment.
    """
    q = quadrature or Quadrature()
    flat = FlatModel(subject.model, device)
    check_outputs(subject, flat)
    cuts = path_cuts(path, q)
    account = _Account(subject, flat, inputs, pairs, path, q, lines=len(cuts) - 1)
    first, last = stretch or (0, path.steps)
    warm_from = _warm_from(last, path.steps, partial(_momentum, path))
    warm = next(cut for cut in cuts if cut >= warm_from)
    for segment in _segments(path, subject, flat, [cut for cut in cuts if first <= cut <= warm]):
        if segment.steps[-1].index == warm - 1:
            account.begin(segment, whole=last == path.steps)
        account.take(segment, counts=segment.steps[0].index < last)
        if progress:
            progress(warm - segment.steps[0].index, warm - first)
    return account.close()


def stretches(path: Path, quadrature: Quadrature | None = None) -> list[tuple[int, int]]:
    """The path in consecutive stretches [a, b) that can be accounted for apart, each much longer than its warm-up.

    A momentum buffer carries a step's gradient on into later steps. So a stretch is begun as many steps behind its end
    as it takes until less than `TAIL` of the buffer is left, and what those steps did is not counted.
    """
    if isinstance(path, Checkpoints):
        return [(0, path.steps)]
    cuts, ends = path_cuts(path, quadrature or Quadrature()), [0]
    momentum = cache(partial(_momentum, path))
    for cut in cuts[1:-1]:
        warm = max(_warm_from(cut, path.steps, momentum) - cut, FEWEST)
        if cut - ends[-1] >= LONGER * warm and path.steps - cut >= LONGER * warm:
            ends.append(cut)
    return list(pairwise([*ends, path.steps]))


def path_cuts(path: Path, quadrature: Quadrature) -> list[int]:
    """The steps between which a path's segments lie; checkpoints are taken one by one."""
    return segment_cuts(path.steps, 1 if isinstance(path, Checkpoints) else quadrature.segment)


def segment_cuts(steps: int, segment: int) -> list[int]:
    """The steps between which segments lie, 0 and the last included."""
    size, cuts = min(segment, max(1, steps // SEGMENTS)), [0]
    while cuts[-1] < steps:
        cuts.append(min(steps, cuts[-1] + size, max(cuts[-1] + 1, int(cuts[-1] * GROWTH))))
    return cuts


def _warm_from(stop: int, steps: int, momentum: Callable[[int], float]) -> int:
    """The step before which the walk back must begin, so that less than `TAIL` of any buffer is cut at `stop`."""
    left = 1.0
    while stop < steps and left > TAIL:
        left *= momentum(stop)
        stop += 1
    return stop


def _momentum(path: Path, step: int) -> float:
    """The largest momentum of any parameter group in a step."""
    assert isinstance(path, PathReader)  # checkpoints are one stretch
    return max(map(named_momentum, path.step(step).manner.settings), default=0.0)


def _segments(path: Path, subject: Subject, flat: FlatModel, cuts: Sequence[int]) -> Iterator[Interval]:
    """The path's segments between cuts, from last to first."""
    pending: list[WalkedStep] = []
    end: Tensor | None = None
    left, drift = list(cuts[:-1]), 0.0
    for interval in walk(path, subject, flat, reverse=True, part=(cuts[0], cuts[-1])):
        inside = [step for step in interval.steps if step.index < cuts[-1]]
        if end is None:
            end = interval.states()[len(inside)]
        pending, drift = inside + pending, max(drift, interval.drift)
        while left and pending and pending[0].index <= left[-1]:
            first = left.pop() - pending[0].index
            yield Interval(pending[first:], end, drift)
            end, pending = pending[first].state, pending[:first]
            drift = interval.drift if pending else 0.0


class _Account:
    """The ledger in the making: rows that grow as segments are taken, last segment first."""

    def __init__(
        self, subject: Subject, flat: FlatModel, inputs: Tensor, pairs: Pairs, path: Path, q: Quadrature, lines: int
    ) -> None:
        self.subject, self.flat, self.inputs, self.pairs, self.path, self.q = subject, flat, inputs, pairs, path, q
        device, m = flat.state.device, len(inputs)
        self.output = self.start = outputs_at(subject, flat, path.final().to(device), inputs, pairs)
        first = outputs_at(subject, flat, path.snapshot(0).state, inputs, pairs)
        learned = (self.output - first).abs().mean().item()
        self.allowed = q.tolerance * learned / (lines + (path.average is not None)) ** 0.5
        self.counted = 0  # lines so far
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)  # noqa: E731
        self.contributions = zeros(len(subject.train), m)  # by example: rows are added to, and lie together
        self.decay, self.buffers, self.explained, self.moved = zeros(m), zeros(m), zeros(m), zeros(m)
        self.hidden = torch.zeros(0, dtype=torch.int64)  # coordinates without a gradient but rounding
        self.hidden_moved, self.hidden_explained = zeros(m), zeros(m)
        self.credit = self._credit(Layout(len(flat)))
        self.nodes, self.evaluations, self.drift = q.nodes, 0, 0.0
        self.averaging: Mixed | None = None  # J~ of the line to the averaged weights

    def begin(self, last: Interval, whole: bool) -> None:
        """Look at the last step, and take the line from the last weights to averaged ones.

        whole: the account begins at the audited weights, and counts that line.
        """
        self.hidden = check_step(self.subject, self.flat, last.steps[-1])
        self.credit = self._credit(self._layout(last.steps[-1]))
        if self.path.average is not None:
            device = self.flat.state.device
            ends = (self.path.snapshot(self.path.steps).state.to(device), self.path.average.to(device))
            self.averaging = self._line(*ends, counts=whole).jacobian
        if not whole:
            self.output = self.start = outputs_at(self.subject, self.flat, last.end, self.inputs, self.pairs)

    def take(self, segment: Interval, counts: bool = True) -> None:
        """Account for one segment: its averaged gradient, then its steps from last to first.

        counts: False in the warm-up, from which only the buffers are taken on.
        """
        line = self._line(segment.steps[0].state, segment.end, counts)
        self.credit.enter(line.jacobian)
        for step in reversed(segment.steps):
            jacobian = line.jacobian
            if self.averaging is not None:
                jacobian = jacobian.plus(-float(self.path.behind[step.index]), self.averaging)
                credit = self.credit.back(step.rule, jacobian)
            else:
                credit = self.credit.back(step.rule)
            if counts:
                self._spend(step, credit, jacobian)
        if not counts:
            self.output = self.start
        self.nodes = max(self.q.nodes, line.nodes // 3)
        self.drift = max(self.drift, segment.drift)

    def _line(self, low: Tensor, high: Tensor, counts: bool) -> Line:
        """The averaged gradient over a straight line that ends where the account has come to."""
        before, p = outputs_at(self.subject, self.flat, low, self.inputs, self.pairs), self.flat.parameters
        self.counted += counts
        allowance = Allowance(
            line=self.allowed,
            total=self.allowed * max(self.counted, 1) ** 0.5,
            so_far=self._missed(),
        )
        line = line_gradient(
            self.subject,
            self.flat,
            (low, high),
            self.inputs,
            self.pairs,
            self.start - before,
            allowance,
            self.nodes,
            self.q.most,
            self.q.gauss,
            self.credit.layout,
        )
        self.start = before
        self.evaluations += line.nodes * len(self.inputs)
        if not counts:
            return line
        displacement = (high - low).to(self.flat.state)
        weights = torch.cat([displacement[:p], torch.zeros_like(displacement[p:])])
        self.moved += line.jacobian.dot(weights).double()
        self.hidden_moved += self._hidden(line.jacobian, displacement)
        if p < len(displacement):
            self.buffers += line.jacobian.dot(displacement - weights).double()
        return line

    def _spend(self, step: WalkedStep, credit: Mixed, jacobian: Mixed) -> None:
        weights = step.state.to(self.flat.state)
        decay = torch.zeros_like(self.decay)
        for held, by in ((credit, step.rule.l2), (jacobian, step.rule.decoupled)):
            if not absent(by):
                decayed = by * weights
                decay -= held.dot(decayed).double()
                self.hidden_explained -= self._hidden(held, decayed)
        if isinstance(step.rule.clip, Tensor):
            credit = replace(credit, dense=step.rule.clip * credit.dense)
        elif step.rule.clip != 1:
            credit = credit.scaled(step.rule.clip)
        for batch in step.batches:
            ids, shares = batch.credited(self._rows(step, batch, credit))
            self.contributions.index_add_(0, ids.to(shares.device), shares.T.contiguous())
            self.explained += shares.sum(1)
        self.decay += decay
        self.explained += decay
        self.evaluations += step.seen.examples

    def _rows(self, step: WalkedStep, batch: Batch, credit: Mixed) -> Tensor:
        """What each row of a batch contributed, (M, B)."""
        moved = torch.zeros(len(self.inputs), len(batch), dtype=torch.float64, device=self.flat.state.device)
        total, coupled = torch.zeros_like(self.flat.state), couples(self.flat)
        for columns, part in step_parts(self.subject, self.flat, step, batch):
            if low := credit.low.get((columns.start, columns.stop)):
                factors = rows_of(part)
                with lowered():
                    found = low.products(factors)
                total[columns] = factors.sum()
            else:
                found, total[columns] = pulled(credit.dense[:, credit.layout.place(columns)], part, coupled)
            moved += found.double()
            del part
        share = step.share(batch, step.length(total))
        self.hidden_explained -= share * self._hidden(credit, total)
        return -share * moved

    def _hidden(self, pulled: Mixed, vector: Tensor) -> Tensor:
        """Products with a vector (P,) over the hidden coordinates, which are columns of a plain matrix: (M,)."""
        if not len(self.hidden):
            return torch.zeros_like(self.decay)
        return (pulled.dense[:, self.hidden] @ vector[self.hidden]).double()

    def _credit(self, layout: Layout) -> Credit:
        return Credit(layout, len(self.inputs), self.flat.state, LEFT_OUT * self.q.tolerance)

    def _layout(self, last: WalkedStep) -> Layout:
        """What may be kept of low rank: large linear weights, where neither rows nor averaged weights forbid it."""
        batch = last.batches[0]
        if couples(self.flat) or self.path.average is not None or not plain(last.rule):
            return Layout(len(self.flat))
        outputs = output_factors(self.subject, self.flat, last.state, self.inputs[:2], self.pairs[:2])
        return Layout.common(len(self.flat), [outputs, step_factors(self.subject, self.flat, last, batch)])

    def _missed(self) -> Tensor:
        """What quadrature has missed so far, (M,)."""
        return self.output.double() - self.start.double() - self.moved - self.buffers

    def close(self) -> Swept:
        start, output = self.start.double(), self.output.double()
        hidden = self.hidden_moved - self.hidden_explained
        ledger = Ledger(
            start=start.cpu(),
            contributions=self.contributions.T.contiguous().cpu(),
            decay=self.decay.cpu(),
            buffers=(self.buffers + hidden).cpu(),
            unexplained=(self.moved - self.explained - hidden).cpu(),
            residual=self._missed().cpu(),
            output=output.cpu(),
        )
        return Swept(ledger, self.drift, self.evaluations)
