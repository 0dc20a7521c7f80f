"""The page: a view poured into one offline HTML file.

Everything is escaped (jinja2's autoescape is always on), there is no script, and a content security policy
forbids the page to ask anything of the network. Figures and pictures are images in data URIs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from brittle._version import __version__
from brittle.findings import Findings
from brittle.report.figures import draw
from brittle.report.pictures import Album
from brittle.report.view import view_of

ROOM = Path(__file__).parent
LIMIT = 6_000_000
"""Largest page in bytes."""
SIDES = (128, 64, 32, 0)
"""Sides of the largest picture, in pixels, tried in turn until the page is small enough; 0 leaves pictures out."""


def render(findings: Findings, arrays: Mapping[str, Tensor], pictures: Mapping[str, Tensor]) -> str:
    """One offline HTML file of at most 6 MB that shows an audit.

    Args:
        findings: the result of the audit.
        arrays: tensors behind the figures; a missing one leaves its figure out, with a word. F families, C classes
            and scores in the order of the findings, M inputs:
            `shift.rate` (F, C, C), the change of each class's mass, in logits towards the predicted class, at the
            family's reference severity: [family, predicted class, class of the training examples], NaN without
            queries; `shift.queries` (C,); `severity.{family}` (M,), predicted severity at which the margin is gone;
            `agreement.{k}.failed` (M,), `agreement.{k}.scores` (scores, M) and `agreement.{k}.severity` (M,) of
            the k-th target; `distance.l2`, `distance.linf` (M,), of inputs that are right when clean, infinite
            where no attack fooled them; `ledger.rows` (6, M) in the order of `Ledger.ROWS`, `ledger.output` (M,).
        pictures: raw inputs (C, H, W), (H, W) or (D,) under `test:{i}`, `train:{i}`, `pool:{i}`, `flip:{k}`.

    Returns:
        The page, as text to be written in UTF-8.
    """
    view, drawn = view_of(findings, arrays), cache(draw)
    low, high = findings.subject.bounds
    template = _templates().get_template("page.html.jinja")
    style = Markup((ROOM / "page.css").read_text(encoding="utf-8"))  # ours, not a user's
    page = ""
    for side in SIDES:
        album = Album(pictures if side else {}, (low, high), side)
        page = template.render(v=view, draw=drawn, album=album, style=style, version=__version__)
        if len(page.encode()) <= LIMIT:
            break
    return page


def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(ROOM),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
