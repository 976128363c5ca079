"""The command line: help, streams, exit codes, JSON."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from lca_posthoc import __version__
from lca_posthoc.cli import COMMANDS, cli
from lca_posthoc.numerics.quadrature import RULES
from lca_posthoc.numerics.schema import KEEP
from tests.helpers.cli import (
    contents,
    document,
    lca,
    marker,
    record,
    refused,
    run_lca,
    says,
    steering,
    task_namespace,
    write_task,
)

HEAVY = ("torch", "zarr", "xarray", "distributed", "matplotlib", "bokeh")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with checkpoints `ck`, a task and a finished run `ck.lca` of both losses."""
    root = tmp_path_factory.mktemp("cli")
    record(root / "ck", range(7))
    write_task(root / "task.py")
    assert run_lca(root / "ck", root / "task.py", root / "ck.lca", "--loss", "all").exit_code == 0
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "place"))


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["import lca_posthoc", "lca --help", "lca plot --help", "lca --version"]
)
def test_what_only_looks_loads_nothing_heavy(what: str) -> None:
    call = (
        "" if what.startswith("import") else f"\ncli({what.split()[1:]!r}, standalone_mode=False)"
    )
    code = (
        f"import sys, lca_posthoc\nfrom lca_posthoc.cli import cli{call}\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    code = code.replace("from lca_posthoc.cli import cli", "") if not call else code
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "[]\n"


def test_the_public_names_are_all_there() -> None:
    import lca_posthoc

    assert all(getattr(lca_posthoc, name) is not None for name in lca_posthoc.__all__)
    with pytest.raises(AttributeError, match="nosuch"):
        _ = lca_posthoc.nosuch


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_command_with_what_it_does(option: str) -> None:
    result = lca(option)
    assert (result.exit_code, result.stderr) == (0, "")
    for name, text in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", result.stdout, re.MULTILINE)


def test_the_version_is_printed() -> None:
    assert lca("--version").stdout.strip() == f"lca, version {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_help_with_an_example(name: str, option: str) -> None:
    result = lca(name, option)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(rf"^ +lca {name}\b", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_for_and_not_just_its_default(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    silent = [
        option.opts[-1]
        for option in command.params
        if isinstance(option, click.Option)
        and not re.sub(r"\[default.*\]", "", option.help or "").strip()
    ]
    assert silent == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_names_options_that_exist(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for line in (command.help or "").splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["lca"]:
            known = cli.get_command(click.Context(cli), words[1])
            assert known is not None, line
            options = {each for parameter in known.params for each in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, line


@pytest.mark.parametrize("name", ["run", "plan"])
def test_choices_are_those_of_the_package(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    choices = {
        option.name: tuple(option.type.choices)
        for option in command.params
        if isinstance(option.type, click.Choice)
    }
    assert choices["rule"] == tuple(RULES)
    assert choices["keep"] == ("auto", *KEEP)


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a console script of the environment that runs the tests, which need not be on
    ``PATH``.
    """
    line = [Path(sysconfig.get_path("scripts")) / name, *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


def test_dask_lca_is_the_same_command_line() -> None:
    done = script("dask", "lca", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    says(done.stdout, "Usage: dask lca", "Loss Change Allocation", *COMMANDS)


def test_the_console_script_gives_back_exit_codes(tmp_path: Path) -> None:
    done = script("lca", "summary", tmp_path / "no")
    assert done.returncode == lca("summary", tmp_path / "no").exit_code != 0
    assert done.stdout == ""
    assert done.stderr.startswith("lca: ")


# --- streams --------------------------------------------------------------------------------------


def test_a_run_prints_its_result_on_stdout_and_nothing_else(made: Path, tmp_path: Path) -> None:
    result = run_lca(made / "ck", made / "task.py", tmp_path / "out.lca")
    assert (result.exit_code, result.stderr) == (0, "")
    says(
        result.stdout,
        "loss change",
        "allocated",
        "residual",
        "helping (share of parameters × segments)",
        "hidden ",
        "share of sum",
    )
    assert result.stdout.splitlines()[-1] == f"results in {tmp_path / 'out.lca'}"


def test_notes_go_to_stderr_and_leave_the_exit_code_alone(
    made: Path, place: Path, tmp_path: Path
) -> None:
    (place / "ck" / "step_00000003.safetensors").unlink()
    result = run_lca(place / "ck", place / "task.py", tmp_path / "gap.lca", "--rule", "left")
    assert result.exit_code == 0
    assert all(line.startswith("note: ") for line in result.stderr.splitlines())
    says(result.stderr, "1 of 5 segments is longer than one step", "2→4")
    assert "note: " not in result.stdout


def test_segments_above_the_tolerance_are_a_note_and_no_failure(made: Path, tmp_path: Path) -> None:
    result = run_lca(made / "ck", made / "task.py", tmp_path / "out.lca", "--tolerance", "1e-12")
    assert result.exit_code == 0
    found = document(lca("summary", tmp_path / "out.lca", "--json"))["losses"]["train"]
    assert found["unconverged"] > 0
    says(
        result.stderr,
        f"note: loss 'train': {found['unconverged']} of 6 segments stay above the tolerance",
    )


def test_a_second_run_has_nothing_to_do_says_so_and_prints_the_same(place: Path) -> None:
    before = contents(place / "ck.lca")
    first, second = (
        run_lca(place / "ck", place / "task.py", place / "ck.lca", "--loss", "all")
        for _ in range(2)
    )
    assert (first.exit_code, first.stdout) == (second.exit_code, second.stdout)
    assert first.stderr == second.stderr == "note: nothing to do: every span is committed\n"
    assert contents(place / "ck.lca") == before


def test_a_result_goes_beside_the_checkpoints_unless_told(place: Path) -> None:
    shutil.rmtree(place / "ck.lca")
    result = lca("run", f"{place / 'ck'}/", "--task", place / "task.py", "--cluster", "inline")
    assert result.stdout.splitlines()[-1] == f"results in {place / 'ck.lca'}"


def test_nothing_is_coloured_or_cut_in_a_pipe(place: Path) -> None:
    task = place / "task.py"
    long = "out_" + "x" * 150
    write_task(task, "self.out", f"self.{long}")
    result = lca(
        *(
            "run",
            place / "ck",
            "--task",
            task,
            "--cluster",
            "inline",
            "--out",
            place / "long.lca",
            "--rename",
            f"^out\\.={long}.",
        ),
    )
    assert result.exit_code == 0, result.stderr
    assert f"{long} " in result.stdout
    assert "\x1b" not in result.output


def test_names_in_tables_cannot_steer_a_terminal(place: Path) -> None:
    write_task(
        place / "task.py",
        '"validation": Loss(',
        '"a\\x1b[31m\\n[red]b\\x9b\\u061c\\u2028\\u202e": Loss(',
    )
    out = place / "names.lca"
    results = [
        run_lca(place / "ck", place / "task.py", out, "--loss", "all"),
        lca("summary", out),
        lca("status", out),
        lca("summary", out, "--loss", "no\x1b[31m\n\x9b\u061c\u2028\u202e"),
        lca("summary", out, "--loss", "train"),
    ]
    assert [result.exit_code for result in results] == [0, 0, 0, 2, 0]
    for result in results:
        assert steering(result.output) <= {"\n"}
    assert "a?[31m?[red]b????" in results[1].stdout
    refused(results[3])


def test_what_a_task_prints_does_not_mix_with_the_document(place: Path) -> None:
    """`lca run --json | jq` must not break because somebody's data loader reports its progress."""
    write_task(place / "task.py", "def task():", "def task():\n    print('loading')")
    found = run_lca(place / "ck", place / "task.py", place / "out.lca", "--json")
    assert set(document(found)) == {"schema", "losses"}


def test_commands_that_a_run_prints_can_be_copied(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_lca(made / "ck", made / "task.py", tmp_path / "it's my run.lca")
    printed = [line for line in result.stdout.splitlines() if line.startswith("  lca ")]
    commands = [shlex.split(line)[1:] for line in printed]
    assert [command for command, *_ in commands] == ["report", "summary"]
    assert [lca(*command).exit_code for command in commands] == [0, 0]
    assert (tmp_path / "report.html").is_file()
    says(result.stdout, "report.html")


# --- words that are mistyped ----------------------------------------------------------------------

RUN = "{place}/ck.lca"
REPLAY = ["{place}/ck", "--task", "{place}/task.py"]
MISTYPED = {
    "command": (["sumary", RUN], "summary"),
    "option": (["summary", "--lose", "train", RUN], "--loss"),
    "option of lca": (["--debgu", "summary", RUN], "--debug"),
    "option of a pair": (["compare", RUN, "--unpared"], "--unpaired"),
    "--keep": (["run", *REPLAY, "--keep", "parameter"], "parameters"),
    "--rule": (["plan", *REPLAY, "--rule", "trapez"], "trapezoid"),
    "--durability": (["run", *REPLAY, "--durability", "ful"], "full"),
    "--format": (["export", RUN, "-o", "{place}/tables", "--format", "ntecdf"], "netcdf"),
    "--quantity": (["plot", RUN, "layers", "--quantity", "totl"], "total"),
    "finding": (["plot", RUN, "layrs"], "layers"),
    "finding without a run": (["plot", "layrs"], "layers"),
    "finding to export": (["export", RUN, "-o", "{place}/tables", "--finding", "curv"], "curve"),
    **{
        f"loss of lca {' '.join(before)}": ([*before, RUN, *after, "--loss", "trian"], "train")
        for before, after in (
            (["summary"], []),
            (["plot"], ["layers"]),
            (["compare"], []),
            (["report"], []),
            (["export"], ["-o", "{place}/tables"]),
            (["export", "--format", "tensorboard"], ["-o", "{place}/events"]),
            (["remove"], []),
        )
    },
    "loss of a task": (["run", *REPLAY, "--loss", "valdation"], "validation"),
    "loss of a task to plan": (["plan", *REPLAY, "--loss", "valdation"], "validation"),
}


@pytest.mark.parametrize("what", MISTYPED)
def test_a_mistyped_word_is_refused_with_the_nearest_one(made: Path, what: str) -> None:
    words, near = MISTYPED[what]
    line = refused(lca(*(word.format(place=made) for word in words)))
    assert re.findall(r"Did you mean ([^?]*)\?", line) == [repr(near)], line


@pytest.mark.parametrize("what", MISTYPED)
def test_a_word_that_is_near_nothing_is_refused_without_a_guess(made: Path, what: str) -> None:
    words, near = MISTYPED[what]
    (wrong,) = [word for word in words if get_close_matches(word, [near])]
    far = "--qqqqqq" if wrong.startswith("-") else "qqqqqq"
    again = [far if word == wrong else word for word in words]
    assert "Did you mean" not in refused(lca(*(word.format(place=made) for word in again)))


# --- JSON -----------------------------------------------------------------------------------------

SUMMARY = {
    "segments": int,
    "parameters": int,
    "evaluations": int,
    "unconverged": int,
    "loss_start": float,
    "loss_end": float,
    "loss_change": float,
    "allocated": float,
    "residual": float,
    "max_segment_residual": float,
    "helping": float,
    "hurting": float,
    "zero": float,
    "groups": type(None),
    "tensors": list,
}
MODULE = {"name": str, "parameters": int, "moved": bool, "allocated": float, "helping": float}
TENSOR = MODULE | {"kind": str}
STATUS = {
    "spans_done": int,
    "spans": int,
    "segments_done": int,
    "segments": int,
    "first_step": int,
    "last_step": int,
    "steps_done": list,
    "seconds": float,
    "complete": bool,
}


def types(table: dict[str, Any], known: dict[str, type]) -> dict[str, type]:
    return {name: type(table.get(name)) for name in known}


@pytest.mark.parametrize("command", ["summary", "run"])
def test_a_summary_has_the_schema_it_promises_and_its_sums_hold(place: Path, command: str) -> None:
    arguments = {
        "summary": ("summary", place / "ck.lca"),
        "run": (
            "run",
            place / "ck",
            "--task",
            place / "task.py",
            "--loss",
            "all",
            "--cluster",
            "inline",
        ),
    }
    found = document(lca(*arguments[command], "--json"))
    assert (set(found), found["schema"]) == ({"schema", "losses"}, 1)
    assert list(found["losses"]) == ["train", "validation"]
    for loss in found["losses"].values():
        assert types(loss, SUMMARY) == SUMMARY
        assert all(types(tensor, TENSOR) == TENSOR for tensor in loss["tensors"])
        assert all(types(module, MODULE) == MODULE for module in loss["modules"])
        assert [module["name"] for module in loss["modules"]] == ["hidden", "out"]
        for module in loss["modules"]:
            tensors = [
                tensor
                for tensor in loss["tensors"]
                if tensor["name"].startswith(f"{module['name']}.")
            ]
            assert module["parameters"] == sum(tensor["parameters"] for tensor in tensors)
            assert module["allocated"] == pytest.approx(
                sum(tensor["allocated"] for tensor in tensors), abs=1e-12
            )
            helping = sum(tensor["helping"] * tensor["parameters"] for tensor in tensors)
            assert module["helping"] == pytest.approx(helping / module["parameters"], abs=1e-12)
        assert loss["helping"] + loss["hurting"] + loss["zero"] == pytest.approx(1, abs=1e-12)
        assert loss["residual"] == pytest.approx(loss["loss_change"] - loss["allocated"], abs=1e-15)
        assert loss["loss_change"] == pytest.approx(
            loss["loss_end"] - loss["loss_start"], abs=1e-12
        )
        assert loss["allocated"] == pytest.approx(
            sum(tensor["allocated"] for tensor in loss["tensors"]), abs=1e-12
        )
        assert (
            loss["parameters"]
            == sum(tensor["parameters"] for tensor in loss["tensors"])
            == 64 * 8 + 8 + 8 * 4 + 4
        )
        helping = (
            sum(tensor["helping"] * tensor["parameters"] for tensor in loss["tensors"])
            / loss["parameters"]
        )
        assert loss["helping"] == pytest.approx(helping, abs=1e-12)
        assert loss["segments"] == 6
        assert (
            abs(loss["residual"])
            <= loss["segments"] * loss["max_segment_residual"]
            <= loss["segments"] * 1e-3
        )


def test_the_first_and_the_last_loss_are_those_of_the_first_and_the_last_checkpoint(
    place: Path,
) -> None:
    from tests.helpers.cli import iterates

    made, found = task_namespace(), document(lca("summary", place / "ck.lca", "--json"))["losses"]
    for split, loss in found.items():
        inputs, targets = (made[split][0].double(), made[split][1])
        for key, tensors in (("loss_start", iterates()[0]), ("loss_end", iterates()[-1])):
            model = made["Net"]()
            model.load_state_dict(tensors)
            with torch.no_grad():
                value = torch.nn.functional.cross_entropy(model.double()(inputs), targets).item()
            assert loss[key] == pytest.approx(value, rel=1e-6)


def test_a_summary_is_of_the_losses_asked_for(place: Path) -> None:
    assert list(
        document(lca("summary", place / "ck.lca", "--loss", "validation", "--json"))["losses"]
    ) == ["validation"]


def test_a_status_has_its_schema(place: Path) -> None:
    found = document(lca("status", place / "ck.lca", "--json"))
    assert (set(found), found["schema"], list(found["losses"])) == (
        {"schema", "losses"},
        1,
        ["train", "validation"],
    )
    for loss in found["losses"].values():
        assert types(loss, STATUS) == STATUS
        assert (loss["spans_done"], loss["segments_done"], loss["complete"]) == (
            loss["spans"],
            loss["segments"],
            True,
        )
        assert (loss["first_step"], loss["last_step"]) == (0, 6)


def test_json_of_an_incomplete_run_is_still_one_document_and_the_rest_is_a_note(
    place: Path,
) -> None:
    marker(place / "ck.lca", "train", 1).unlink()
    summary = lca("summary", place / "ck.lca", "--json")
    assert document(summary)["losses"]["train"]["segments"] == 4
    assert summary.stderr.startswith("note: loss 'train' is not complete")
    status = document(lca("status", place / "ck.lca", "--json"))["losses"]
    assert (status["train"]["complete"], status["validation"]["complete"]) == (False, True)


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    from lca_posthoc.cli.show import print_json

    @click.command()
    def command() -> None:
        print_json(
            {"a": [float("nan"), float("inf"), -float("inf"), 1.5], "b": {"c": float("nan")}}
        )

    from click.testing import CliRunner

    found = json.loads(CliRunner().invoke(command).stdout, parse_constant=pytest.fail)
    assert found == {"a": [None, None, None, 1.5], "b": {"c": None}}


def test_summary_and_status_change_nothing(place: Path) -> None:
    before = contents(place)
    for command in ("summary", "status"):
        assert lca(command, place / "ck.lca").exit_code == 0
    assert contents(place) == before


def test_a_plan_is_a_document_and_creates_nothing(place: Path) -> None:
    before = (
        contents(place / "ck"),
        sorted(path.name for path in place.iterdir() if path.name != "__pycache__"),
    )
    found = document(lca("plan", place / "ck", "--task", place / "task.py", "--json"))
    assert found["schema"] == 1
    assert (
        contents(place / "ck"),
        sorted(path.name for path in place.iterdir() if path.name != "__pycache__"),
    ) == before


# --- remove and add -------------------------------------------------------------------------------


ANOTHER = (
    'Loss(F.cross_entropy, on="train")',
    'Loss(lambda x, y: (x - F.one_hot(y, 4)) ** 2, on="train")',
)


def test_a_loss_is_removed_with_everything_of_its_own_and_its_name_is_free_again(
    place: Path,
) -> None:
    run, kept = place / "ck.lca", contents(place / "ck.lca")
    done = lca("remove", run, "--loss", "train")
    assert (done.exit_code, done.stdout, done.stderr) == (
        0,
        f"removed loss 'train' from {run}\n",
        "",
    )
    left = contents(run)
    gone = {name for name in kept if name not in left}
    assert gone == {name for name in kept if "train" in Path(name).parts}
    assert all(left[name] == kept[name] for name in left if name != "run.json")
    assert list(document(lca("summary", run, "--json"))["losses"]) == ["validation"]
    write_task(place / "task.py", *ANOTHER)
    assert run_lca(place / "ck", place / "task.py", run).exit_code == 0
    again = contents(run)
    assert all(
        again[name] == kept[name] for name in left if name not in ("run.json", "log/run.jsonl")
    )


def test_another_loss_under_a_recorded_name_is_refused_with_the_way_out(place: Path) -> None:
    write_task(place / "task.py", *ANOTHER)
    before = contents(place / "ck.lca")
    refused(
        run_lca(place / "ck", place / "task.py", place / "ck.lca", "--loss", "train"),
        "loss 'train' is not the one recorded",
        "lca remove",
        "another name",
        "--out",
    )
    assert contents(place / "ck.lca") == before


def test_removing_what_is_not_there_is_refused(place: Path) -> None:
    refused(
        lca("remove", place / "ck.lca", "--loss", "nothing"), "has no loss 'nothing'", "'train'"
    )
    refused(lca("remove", place / "ck", "--loss", "train"), "is not a run directory")
