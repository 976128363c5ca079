"""Every list of findings says what each finding declares in its own file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

from lca_posthoc import findings, plots
from lca_posthoc.base.declarations import declared_findings
from lca_posthoc.report import sections
from tests.helpers.cli import lca
from tests.helpers.sample_findings import computed, layers

FINDINGS = declared_findings()
TABLE = Path(__file__).parent.parent.parent / "docs" / "findings.md"
# not a parameter: a group is picked of the result, a step is turned into a frame
PICKED = {"groups", "step"}


def test_what_is_read_without_import_is_what_each_file_declares() -> None:
    files = {
        module.name: importlib.import_module(f"lca_posthoc.findings.{module.name}")
        for module in pkgutil.iter_modules(findings.__path__)
    }
    declared = {
        name: vars(module)["FINDING"] for name, module in files.items() if "FINDING" in vars(module)
    }
    assert dict(FINDINGS) == declared


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_and_its_figure_are_functions_of_its_name(name: str) -> None:
    for package in (findings, plots):
        function = getattr(package, name)
        assert inspect.isfunction(function), f"write `from .{name} import {name} as {name}`"
        assert function.__module__ == f"{package.__name__}.{name}"


@pytest.mark.parametrize("name", FINDINGS)
def test_its_options_are_parameters_of_the_finding_or_its_figure(name: str) -> None:
    functions = [getattr(findings, name), getattr(plots, name)]
    functions += [plots.film] if name == "microscope" else []
    parameters = {each for function in functions for each in inspect.signature(function).parameters}
    assert {option.name for option in FINDINGS[name].options} <= parameters | PICKED


def test_options_of_one_name_are_one_option() -> None:
    options = {option for finding in FINDINGS.values() for option in finding.options}
    assert len({option.name for option in options}) == len(options)
    assert len({option.flag for option in options}) == len(options)


def test_each_has_a_place_of_its_own() -> None:
    assert len({finding.place for finding in FINDINGS.values()}) == len(FINDINGS)


def test_the_report_has_a_section_of_every_finding_but_those_with_a_page_of_their_own() -> None:
    shown = sections.section_modules()
    assert list(shown) == [name for name in FINDINGS if name not in ("microscope", "compare")]
    for name, module in shown.items():
        assert module.section().name == name


def test_the_documentation_has_a_row_for_every_finding() -> None:
    rows = [line for line in TABLE.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{name}` | {finding.question} | {finding.needs} |" for name, finding in FINDINGS.items()
    ]


def test_the_command_offers_every_option() -> None:
    shown = lca("plot", "--help").stdout
    for name, finding in FINDINGS.items():
        assert name in shown
        assert all(f"{option.flag} " in shown for option in finding.options)


def test_a_finding_without_an_example_has_one_that_is_computed() -> None:
    for groups in (False, True):
        by_hand, of_run = layers(groups), computed("layers", groups)
        assert of_run.attrs["finding"] == by_hand.attrs["finding"]
        assert {name: variable.dims for name, variable in by_hand.data_vars.items()} == {
            name: of_run[name].dims for name in by_hand.data_vars
        }
        assert "_fc$2" in of_run["layer"].values
