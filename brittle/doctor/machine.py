"""The machine: is the device there, and do memory, disk and patience last for the audit?"""

from __future__ import annotations

import os
import shutil

import torch

from brittle.doctor.check import Check, Visit, size
from brittle.doctor.demand import demand_of
from brittle.doctor.speed import measured
from brittle.errors import UsageError
from brittle.report.formatting import duration

HOUR = 3600.0

LIBRARIES = 900 << 20
"""Bytes that a process takes for torch and its like."""


def device(v: Visit) -> Check:
    """Is the device there?"""
    name = v.device
    try:
        torch.zeros(1, device=name)
    except Exception as error:
        raise UsageError(f"the device must be of this machine, found {name!r}; take cpu") from error
    if torch.device(name).type == "cuda":
        return Check("device", "ok", f"{name}: {torch.cuda.get_device_name(name)}")
    idle = "; a GPU is there, --device cuda" if name == "cpu" and torch.cuda.is_available() else ""
    return Check("device", "ok", f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores{idle}")


def memory(v: Visit) -> Check:
    """Does the group memory fit?"""
    demand, there = demand_of(v), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = demand.held_bytes + LIBRARIES
    line = f"about {size(needed)} at the fullest, {size(there)} in this machine"
    if needed > there:
        remedy = "take a larger machine" if v.preset == "quick" else "take --preset quick, or a larger machine"
        if demand.query_bytes > 2 * demand.memory_bytes:
            remedy = "take a smaller --memory-budget" if demand.known.steps else "ask for fewer --queries"
        return Check("memory", "fail", f"an audit must fit into memory, found {line}; {remedy}")
    return Check("memory", "warn" if needed > there / 2 else "ok", line)


def disk(v: Visit) -> Check:
    """Does the run folder fit?"""
    needed, there = demand_of(v).written_bytes, shutil.disk_usage(v.folder).free
    line = f"about {size(needed)} for the run folder, {size(there)} free in {v.folder}"
    if needed > there:
        remedy = "free space, or run the audit elsewhere"
        return Check("disk", "fail", f"a run folder must fit on the disk, found {line}; {remedy}")
    return Check("disk", "warn" if needed > there / 2 else "ok", line)


def time(v: Visit) -> Check:
    """How long will the audit take, about?"""
    demand = demand_of(v)
    stages = demand.seconds(measured(v, demand.groups))
    total = sum(stages.values())
    longest = sorted(stages, key=lambda name: -stages[name])[:4]
    parts = ", ".join(f"{name} {duration(stages[name])}" for name in longest if stages[name] >= 0.05 * total)
    unknown = 0 if demand.known.recorded else demand.retrainings
    more = f" and {unknown} of your trainings" if unknown else ""
    asked = f"an audit of {demand.queries} queries ({v.preset})"
    line = f"{asked} takes about {duration(total)}{more}: {parts} (an estimate)"
    if total > HOUR:
        return Check("time", "warn", f"{line}; fewer --queries shorten it")
    return Check("time", "ok", line)
