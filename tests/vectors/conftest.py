"""Vectors that have no adapter are listed at the end of the run."""

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each slug or operation without an adapter."""
    reasons = (
        r.longrepr[2] for r in terminalreporter.stats.get("skipped", []) if isinstance(r.longrepr, tuple)
    )
    absent = Counter(reason.removeprefix("Skipped: ") for reason in reasons if "no adapter for" in reason)
    for reason, count in sorted(absent.items()):
        terminalreporter.write_line(f"{reason} ({count} cases)", yellow=True)
