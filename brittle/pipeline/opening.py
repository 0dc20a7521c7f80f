"""The stage at which the sealed labels are opened: once in a run folder, with the digest of all that was predicted."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from brittle.agreement.contests import Predicted
from brittle.errors import SealedError
from brittle.findings import SealedPart
from brittle.packing import pack
from brittle.pipeline.context import Context

FIXED = ("scores", "baselines", "models of both", "calibrated rates", "holes")
"""What `Predicted` holds."""


def unseal(c: Context, predicted: Predicted) -> tuple[Context, SealedPart]:
    """The context of the stages that observe and judge, with every label, and the note of the opening.

    Raises:
        SealedError: where the labels were opened in this run folder with something else predicted.
    """
    digest = digest_of(predicted)
    note = SealedPart(
        inputs=len(c.split.natural),
        opened=1,
        fixed_before=list(FIXED),
        digest=digest,
        observed_before=["attacks"] if c.stages.run.has("attacks") else [],
    )
    kept = SealedPart.model_validate(
        c.stages("opening", "opening the sealed labels", lambda tick, spend: note.model_dump())
    )
    if kept.digest != digest:
        raise SealedError(
            f"predictions may not change once the sealed labels are open, they were {kept.digest[:12]} in "
            f"{c.stages.run.root} and are {digest[:12]} now; audit into a new folder"
        )
    return replace(c, split=c.seal.open(dict.fromkeys(FIXED, digest))), kept


def digest_of(predicted: Predicted) -> str:
    """SHA-256 of everything in it: names, types, shapes and values."""
    arrays, tree = pack(predicted)
    sha = hashlib.sha256(tree.encode())
    for name, array in sorted(arrays.items()):
        sha.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        sha.update(array.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()
