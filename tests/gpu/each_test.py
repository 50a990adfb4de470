"""A plugin of pytest (`-p each_test`): a JSON line for each test as it ends, and no test after the
end of the part."""

import lines
import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if lines.left() < 10:
        pytest.skip("no time was left")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    said = {}
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        said = {"why": report.longrepr[2][:200]}
    elif report.outcome == "failed":
        said = {"why": report.longreprtext[-1500:]}
    lines.write(
        "correct",
        test=report.nodeid,
        outcome=report.outcome,
        seconds=round(report.duration, 1),
        **said,
    )
