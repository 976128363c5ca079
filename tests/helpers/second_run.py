"""A second run, alone, for a failed test whose outcome depends on timing.

Such tests carry the marker `moment`: they kill processes, cut wires, or measure what a heap keeps.
When all tests have been run and no other process runs any, each of them that failed is run once
more in a process of its own, and both outcomes are printed. The suite passes where nothing else
failed and every second run passed.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

MARKER = "moment"
OPTION = "--no-second-run"
FORWARDED = ("--device", "--dtype")
LINES_SHOWN = 60


@dataclass(frozen=True)
class SecondRun:
    """The exit status of a second run, and what it printed."""

    status: int
    output: str

    @property
    def outcome(self) -> str:
        """The word the summary has for it."""
        return "passed" if self.status == pytest.ExitCode.OK else "failed"


class SecondRuns:
    """A plugin that notes failures, and runs again what may be."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._may_run_again: dict[str, bool] = {}  # by what failed
        self._second_runs: dict[str, SecondRun] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file that cannot be read."""
        if report.failed:
            self._may_run_again[report.nodeid] = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failure of a test, of its setup or of its teardown."""
        if report.failed:
            self._may_run_again[report.nodeid] = MARKER in report.keywords

    @pytest.hookimpl(trylast=True)  # when the processes of xdist have ended
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Run failed tests of a moment again; the suite passes if nothing else failed."""
        cut_short = session.shouldfail or session.shouldstop
        if cut_short or session.exitstatus != pytest.ExitCode.TESTS_FAILED:
            return
        for test, may_run_again in self._may_run_again.items():
            if may_run_again:
                self._second_runs[test] = self._run_alone(test)
        passed = [test for test, second in self._second_runs.items() if second.status == 0]
        if passed == list(self._may_run_again):
            session.exitstatus = pytest.ExitCode.OK

    def _run_alone(self, test: str) -> SecondRun:
        """Run one test in a process of its own, on the device and in the precision of this one."""
        options = [
            f"{option}={value}"
            for option in FORWARDED
            if (value := self._config.getoption(option, None)) is not None
        ]
        command = [sys.executable, "-m", "pytest", "-n", "0", OPTION, *options, test]
        done = subprocess.run(
            command,
            cwd=self._config.rootpath,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        return SecondRun(done.returncode, done.stdout)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print both outcomes of every test that was run twice."""
        if not self._second_runs:
            return
        terminalreporter.section("second runs, alone, of tests that hang on a moment")
        for test, second in self._second_runs.items():
            terminalreporter.write_line(f"{test}: failed, then {second.outcome}")
            if second.status != pytest.ExitCode.OK:
                last_lines = second.output.splitlines()[-LINES_SHOWN:]
                terminalreporter.write_line("\n".join(last_lines))


def add_option(parser: pytest.Parser) -> None:
    """Add the option by which a second run has none of its own."""
    parser.addoption(
        OPTION, action="store_true", help=f"a failed test marked {MARKER!r} is not run again"
    )


def register(config: pytest.Config) -> None:
    """Register the plugin, in the process that reports and not in those of xdist."""
    if not hasattr(config, "workerinput") and not config.getoption(OPTION):
        config.pluginmanager.register(SecondRuns(config), "second-runs")
