"""From findings to plain data: everything the page says, computed and worded, nothing drawn.

    findings, arrays  ->  View  ->  figures and page

A test looks at the view, not at HTML. Where an array is missing, its chart is None and the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from brittle.findings import Findings
from brittle.report.view.account import Account, account_of
from brittle.report.view.agreement import AgreementView, agreement_of
from brittle.report.view.attacks import AttacksView, attacks_of
from brittle.report.view.closing import GLOSSARY, CostView, cost_of
from brittle.report.view.failing import Failing, failing_of
from brittle.report.view.flips import FlipView, flips_of
from brittle.report.view.headline import Headline, headline_of
from brittle.report.view.holes import HoleView, holes_of
from brittle.report.view.missing import Missing, missing_of

__all__ = ["View", "view_of"]

SECTIONS = (
    ("failing", "Where it will fail"),
    ("holes", "Holes"),
    ("why", "Why there"),
    ("true", "Is that true?"),
    ("missing", "What data is missing"),
    ("account", "Does the account close?"),
    ("attacks", "Attacks"),
    ("warnings", "Warnings"),
    ("cost", "Cost"),
    ("words", "Words"),
    ("cite", "How to cite"),
)
"""Anchors and titles of the page's sections, in order."""


@dataclass(frozen=True)
class View:
    """The page as data, section by section."""

    schema_version: str
    sections: tuple[tuple[str, str], ...]
    headline: Headline
    failing: Failing
    holes: tuple[HoleView, ...]
    flips: tuple[FlipView, ...]
    agreement: AgreementView
    missing: Missing
    account: Account
    attacks: AttacksView
    warnings: tuple[str, ...]
    cost: CostView
    glossary: tuple[tuple[str, str], ...]


def view_of(findings: Findings, arrays: Mapping[str, Tensor]) -> View:
    """Everything the page says about `findings`.

    Args:
        findings: the result of an audit.
        arrays: the tensors behind the figures (see `brittle.report.render`); any may be missing.
    """
    return View(
        schema_version=findings.schema_version,
        sections=SECTIONS,
        headline=headline_of(findings),
        failing=failing_of(findings, arrays),
        holes=holes_of(findings),
        flips=flips_of(findings),
        agreement=agreement_of(findings, arrays),
        missing=missing_of(findings),
        account=account_of(findings, arrays),
        attacks=attacks_of(findings),
        warnings=tuple(findings.warnings),
        cost=cost_of(findings),
        glossary=GLOSSARY,
    )
