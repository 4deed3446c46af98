"""A pytest plugin that is put into boxes: writes what came of each test, and on request which functions it called.

It runs inside the process that is judged and proves nothing by itself; environments/swe/verify.py says what does.
"""

import json
import os
import sys
from typing import Any

REPORT, COVER = "PALAESTRA_REPORT", "PALAESTRA_COVER"


class Reporter:
    """Collects outcomes by node id, and counts what is skipped; `cover`: the folder whose functions are recorded."""

    def __init__(self, path: str, cover: str) -> None:
        self.path = path
        self.cover = cover
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.calls: dict[str, set[tuple[str, str]]] = {}
        self.skips = 0
        self.marked: set[str] = set()
        """The tests that are marked xfail where they stand."""

    def pytest_itemcollected(self, item: Any) -> None:
        """A test that may fail."""
        if item.get_closest_marker("xfail"):
            self.marked.add(item.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Set-up, call and tear-down of a test: the worst counts. An xfail passes where the test is marked so."""
        self.skips += report.skipped
        marked = hasattr(report, "wasxfail") and report.nodeid in self.marked
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
            self.failures.setdefault(report.nodeid, str(report.longrepr)[-4000:])
        elif report.skipped and not marked:
            self.outcomes.setdefault(report.nodeid, "skipped")
        elif report.when == "call":
            self.outcomes.setdefault(report.nodeid, "passed")

    def pytest_collectreport(self, report: Any) -> None:
        """A file that could not be imported, or skipped itself."""
        self.skips += report.skipped
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
            self.failures[report.nodeid] = str(report.longrepr)[-4000:]

    def pytest_runtest_setup(self, item: Any) -> None:
        """Begin to record."""
        if self.cover:
            called = self.calls.setdefault(item.nodeid, set())

            def record(frame: Any, event: str, argument: Any) -> None:
                code = frame.f_code
                if event == "call" and code.co_filename.startswith(self.cover):
                    called.add((os.path.relpath(code.co_filename), code.co_qualname))

            sys.setprofile(record)

    def pytest_runtest_teardown(self, item: Any) -> None:
        """Stop recording."""
        if self.cover:
            sys.setprofile(None)

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        """Write everything, whole."""
        calls = {test: sorted(called) for test, called in self.calls.items()}
        content = {
            "status": int(exitstatus),
            "outcomes": self.outcomes,
            "failures": self.failures,
            "calls": calls,
            "skips": self.skips,
        }
        with open(self.path + ".part", "w") as out:
            json.dump(content, out)
        os.replace(self.path + ".part", self.path)


def pytest_configure(config: Any) -> None:
    """Register the reporter where a report is wanted."""
    path = os.environ.pop(REPORT, "")
    if path:
        config.pluginmanager.register(Reporter(path, os.environ.pop(COVER, "")))
