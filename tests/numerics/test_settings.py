"""One table holds the settings of a run: the signature of `run`, the command line, what is recorded
and the reference page are read off it, or are compared with it here.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import lca_posthoc
from lca_posthoc.cli import cli
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.precisions import PRECISIONS
from lca_posthoc.numerics.settings import (
    SETTINGS,
    Setting,
    Settings,
    on_device,
    option_of,
    resolve,
)
from lca_posthoc.replay import driver
from lca_posthoc.replay.events import silent
from lca_posthoc.replay.plan import plan
from tests.helpers.cli import record, write_task

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
NOT_ASKED: dict[str, Callable[[Setting], Any]] = {
    "none": lambda setting: None,
    "auto": lambda setting: "auto",
    "no values": lambda setting: [] if setting.repeatable else None,
    "no values, as click says it": lambda setting: () if setting.repeatable else None,
}
# by name: two values in turn, as a caller may give them and as they are recorded
ASKED: dict[str, list[tuple[Any, Any]]] = {
    "rule": [("gauss-2", "gauss-2"), ("left", "left")],
    "tolerance": [("0.10 %", "0.1%"), (float("inf"), "inf")],
    "allocation_tolerance": [("1e-2", 1e-2), (0.5, 0.5)],
    "keep": [("units", "units"), ("tensors", "tensors")],
    "shards": [("16", 16), (4, 4)],
    "batch_size": [(7, 7), (8, 8)],
    "device": [("cpu", "cpu"), ("cuda", "cuda")],
    "precision": [("float64", "float64"), ("tf32", "tf32")],
    "precision_check": [("full", "full"), ("sample", "sample")],
    "norm_stats": [("batch", "batch"), ("recalibrated", "recalibrated")],
    "tensors": [(("fc1.*", "b"), ["fc1.*", "b"]), (["c"], ["c"])],
    "subset": [(("train=0:9",), ["train=0:9"]), (["0.5@1"], ["0.5@1"])],
    "signal": [("train", "train"), ("validation", "validation")],
    "path_band": [("on", "on"), ("off", "off")],
    "steps": [("0:9", "0:9"), (":3", ":3")],
    "segments": [("0.10@7", "0.1@7"), ("1@0", "1@0")],
    "pattern": [(r"(?P<step>\d+)", r"(?P<step>\d+)"), (r"s(?P<step>\d+)", r"s(?P<step>\d+)")],
    "rename": [(("a=b", "c=d"), ["a=b", "c=d"]), (["a="], ["a="])],
}
CASES = [(name, *case) for name, cases in ASKED.items() for case in cases]


def option(command: str, name: str) -> click.Option:
    """The option of a command for a setting."""
    parameters = cli.get_command(click.Context(cli), command).params  # type: ignore[union-attr]
    (wanted,) = (parameter for parameter in parameters if parameter.name == name)
    assert isinstance(wanted, click.Option)
    return wanted


def row(name: str, setting: Setting) -> str:
    """The line of the reference page for a setting."""
    shown = re.sub(r"([|*<])", r"\\\1", setting.help)
    values = [f"`{choice}`" for choice in setting.choices] or [f"`{setting.metavar or 'INTEGER'}`"]
    form = ", ".join(values).replace("|", r"\|")
    repeated = ", repeatable" if setting.repeatable else ""
    return (
        f"| `{option_of(name)}`, `{name}=` | {form}{repeated} | {setting.shown_default} | {shown} |"
    )


def test_every_setting_has_its_cases_here() -> None:
    assert list(ASKED) == list(SETTINGS)


# --- who offers them ------------------------------------------------------------------------------


def test_run_takes_every_setting_in_the_order_of_the_table() -> None:
    parameters = inspect.signature(lca_posthoc.run).parameters
    names = [name for name in parameters if name in SETTINGS]
    assert names == list(SETTINGS)
    for name, setting in SETTINGS.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == (() if setting.repeatable else None), name


def test_the_docstring_of_run_says_every_choice_and_default() -> None:
    text = inspect.getdoc(lca_posthoc.run) or ""
    for name, setting in SETTINGS.items():
        entry = re.search(rf"^    {name}: (.*(?:\n        .*)*)", text, re.MULTILINE)
        assert entry is not None, name
        assert [choice for choice in setting.choices if f'"{choice}"' not in entry[1]] == [], name
        if setting.choices and isinstance(setting.default, str):
            assert f'"{setting.default}" (default)' in entry[1], name


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(("name", "setting"), SETTINGS.items(), ids=SETTINGS)
def test_a_command_offers_a_setting_as_the_table_says(
    command: str, name: str, setting: Setting
) -> None:
    offered = option(command, name)
    assert (offered.opts, offered.multiple) == ([option_of(name)], setting.repeatable)
    choices = offered.type.choices if isinstance(offered.type, click.Choice) else ()
    assert [choice for choice in choices if choice != "auto"] == list(setting.choices)
    assert ("auto" in choices) == setting.automatic
    assert setting.help in (offered.help or "")
    assert (f"[default: {setting.shown_default}]" in (offered.help or "")) == bool(
        setting.shown_default
    )


def test_a_default_is_shown_as_it_is() -> None:
    for name, setting in SETTINGS.items():
        if setting.default not in (None, []):
            first = setting.shown_default.partition(";")[0]
            assert resolve({name: first}, None)[name] == setting.default, name  # type: ignore[literal-required]


def test_the_reference_page_has_the_table() -> None:
    rows = [row(name, setting) for name, setting in SETTINGS.items()]
    lines = PAGE.read_text().splitlines()
    assert [line for line in lines if line.startswith("| `--")] == rows


# --- what is asked for and what is recorded -------------------------------------------------------


@pytest.mark.parametrize("nothing", NOT_ASKED.values(), ids=NOT_ASKED)
@pytest.mark.parametrize(("name", "setting"), SETTINGS.items(), ids=SETTINGS)
def test_what_asks_for_nothing_gives_the_default(
    name: str, setting: Setting, nothing: Callable[[Setting], Any]
) -> None:
    settings = resolve({name: nothing(setting)}, None)
    assert settings == resolve({}, None)
    assert settings[name] == setting.default  # type: ignore[literal-required]
    assert list(settings) == list(SETTINGS)


@pytest.mark.parametrize(("name", "value", "recorded"), CASES)
def test_a_setting_is_recorded_and_asking_for_it_again_changes_nothing(
    name: str, value: Any, recorded: Any
) -> None:
    settings = resolve({name: value}, None)
    assert settings == {**resolve({}, None), name: recorded}
    assert json.loads(json.dumps(settings)) == settings
    assert resolve({name: value}, settings) == resolve({}, settings) == settings


@pytest.mark.parametrize(("name", "value", "recorded"), CASES)
def test_another_value_than_the_recorded_one_is_refused_by_its_option(
    name: str, value: Any, recorded: Any
) -> None:
    (other,) = (case for case, _ in ASKED[name] if case != value)
    with pytest.raises(InputError, match=rf"Leave {option_of(name)} out to resume it"):
        resolve({name: other}, resolve({name: value}, None))


def test_a_run_that_is_not_cut_into_shards_says_so_of_its_number() -> None:
    whole, cut = resolve({"shards": 1}, None), resolve({"shards": 2}, None)
    with pytest.raises(
        InputError, match=r"made with --shards 1 \(its data not cut\), not --shards 2"
    ):
        resolve({"shards": 2}, whole)
    with pytest.raises(
        InputError, match=r"made with --shards 2, not --shards 1 \(its data not cut\)"
    ):
        resolve({"shards": 1}, cut)


@pytest.mark.parametrize(
    ("name", "choices"),
    [(name, entry.choices) for name, entry in SETTINGS.items() if entry.choices],
)
def test_what_is_none_of_the_choices_is_refused_with_the_choices(
    name: str, choices: tuple[str, ...]
) -> None:
    for wrong in ("", "Simpson", choices[0].upper(), 3):
        with pytest.raises(InputError) as refused:
            resolve({name: wrong}, None)
        assert str(refused.value) == (
            f"{option_of(name)} {wrong!r} is not one of {', '.join(choices)}."
        )


def test_what_is_no_setting_is_refused() -> None:
    with pytest.raises(InputError, match=r"tolerence is not a setting of a run.*tolerance"):
        resolve({"tolerence": 1e-3}, None)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_that_refining_cannot_mend_has_no_tolerance_unless_it_is_asked_for(
    precision: str,
) -> None:
    wanted = "inf" if precision == "bfloat16" else 1e-3
    assert resolve({"precision": precision}, None)["tolerance"] == wanted
    assert resolve({"precision": precision, "tolerance": 0.1}, None)["tolerance"] == 0.1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_precision_of_gpus_is_refused_elsewhere(precision: str, device: str) -> None:
    settings = resolve({"precision": precision}, None)
    if (precision, device) == ("tf32", "cpu"):
        with pytest.raises(InputError, match="--precision tf32 needs a GPU"):
            on_device(settings, device)
    else:
        assert on_device(settings, device) == {**settings, "device": device}


class _Resolved(Exception):
    """Stops a run, or a plan, once it knows its settings."""


@pytest.mark.parametrize("function", [lca_posthoc.run, plan], ids=["run", "plan"])
def test_every_setting_a_caller_gives_reaches_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]
) -> None:
    """And none is mixed up with another one."""
    settled: list[Settings] = []

    def stop(asked: dict[str, object], recorded: Settings | None) -> Settings:
        settled.append(resolve(asked, recorded))
        raise _Resolved

    monkeypatch.setattr(driver, "resolve", stop)
    monkeypatch.setitem(plan.__globals__, "resolve", stop)
    record(tmp_path / "checkpoints")
    write_task(tmp_path / "task.py")
    given = {name: cases[0][0] for name, cases in ASKED.items()}
    options = {"progress": silent} if function is lca_posthoc.run else {}
    with pytest.raises(_Resolved):
        function(tmp_path / "checkpoints", tmp_path / "task.py", **given, **options)
    assert settled == [{name: cases[0][1] for name, cases in ASKED.items()}]


# --- precisions -----------------------------------------------------------------------------------


def test_a_reference_is_a_precision_that_rounds_less() -> None:
    for name, precision in PRECISIONS.items():
        if precision.reference is None:
            assert precision.rounding == min(other.rounding for other in PRECISIONS.values())
        else:
            assert PRECISIONS[precision.reference.precision].rounding < precision.rounding, name


def test_bounds_between_computations_stay_above_the_rounding_of_a_number() -> None:
    for name, precision in PRECISIONS.items():
        assert precision.rounding < min(precision.agree, precision.same_loss), name
