"""The report: findings -> view (plain data) -> figures and page."""

from brittle.report.page import render

__all__ = ["render"]
