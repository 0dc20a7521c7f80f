"""What a result depends on, as plain data: versions, weights, data; and how two settings differ.

Two audits are the same where their settings are the same; only then may one resume the other.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from brittle.path.checkpoints import Checkpoints
from brittle.subject import Subject

PACKAGES = ("brittle", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "foolbox")
SHOWN = 3
"""Differences that are named before the rest is counted."""


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def fingerprints(subject: Subject) -> dict[str, str]:
    """Short SHA-256 digests of the subject's weights and data."""
    parts = {"train": subject.train, "test": subject.test, "pool": subject.pool}
    prints = {what: digest(part.inputs, part.targets) for what, part in parts.items() if part is not None}
    if subject.checkpoints:
        path = Checkpoints(subject)
        prints["checkpoints"] = digest(*path.states, torch.tensor(path.lr))
    if subject.groups is not None:
        prints["groups"] = hashlib.sha256(json.dumps(subject.groups).encode()).hexdigest()[:16]
    return {"weights": digest(*subject.model.state_dict().values()), **prints}


def digest(*tensors: Tensor) -> str:
    """Short SHA-256 of tensors: types, shapes and values."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def as_written(settings: Any) -> Any:
    """The settings as they will be read back from JSON."""
    return json.loads(json.dumps(settings, default=str))


def difference(there: Any, here: Any) -> str:
    """In words, by which values two settings differ; empty where they are the same.

    >>> difference({"queries": 40, "seed": 0}, {"queries": 60, "seed": 0})
    'queries is 40 there and 60 here'
    """
    old, new = _flat(there), _flat(here)
    keys = [key for key in sorted({*old, *new}) if old.get(key, "absent") != new.get(key, "absent")]
    named = [f"{key} is {old.get(key, 'absent')} there and {new.get(key, 'absent')} here" for key in keys[:SHOWN]]
    return ", ".join(named + [f"and {len(keys) - SHOWN} more differ"] * (len(keys) > SHOWN))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    parts = [_flat(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items()]
    return {key: inner for part in parts for key, inner in part.items()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
