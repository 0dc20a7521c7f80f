"""How long an audit will take: what its stages do, counted, times what a little of each costs, measured.

    seconds of a stage = sum over its operations of (how often) x (seconds of one)

The counts follow the stages of `brittle.pipeline`; attacks are taken at their full budget. It is an estimate: the
machine may be busier or idler during the audit than now, and the quadrature may ask for more nodes than the first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from brittle.accounts import FINE_NODES, FINE_SEGMENTS, SAMPLE_FAMILIES, SAMPLE_QUERIES
from brittle.agreement.baselines import RIVALS, trust_score
from brittle.attacks.apgd import auto_pgd
from brittle.attacks.problem import Problem
from brittle.attacks.suite import BUDGETS, Budget, default_epsilon
from brittle.data import Examples
from brittle.doctor.check import Visit
from brittle.doctor.gradients import first_step
from brittle.flips import BY_ATTACK, BY_PROBE
from brittle.kernel.differentiable import differentiable_mass
from brittle.kernel.memory import Memory, mass
from brittle.kernel.quadrature import row_blocks
from brittle.kernel.steps import step_pieces
from brittle.kernel.sweep import Quadrature
from brittle.mass import class_groups
from brittle.outcomes import LEVELS
from brittle.path.checkpoints import CHUNK, Checkpoints
from brittle.path.flat import FlatModel
from brittle.path.rerun import batch_gradient
from brittle.probes import MAP_SHARES, families_for
from brittle.records import Groups, Pairs
from brittle.scores import LATE_STATES
from brittle.split import MOST_NATURAL
from brittle.suggest.plan import DIMENSIONS, MOST_COVERED

EXAMPLES_A_CLUSTER = 10
"""As in `mass.cluster_groups`."""

NEIGHBOURS = 2_000
"""Training examples on which the search for neighbours is timed."""
