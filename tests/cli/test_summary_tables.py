"""What `lca summary` and the end of `lca run` print: modules, the strongest first, numbers of any
size, on a screen and in a pipe.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import lca_posthoc
from lca_posthoc import Loss, Run, Task
from lca_posthoc.base.text import count
from lca_posthoc.cli import cli
from lca_posthoc.cli.show import units_of_loss
from lca_posthoc.cli.summary import print_summary
from lca_posthoc.findings import layers, summary
from lca_posthoc.replay.display import wrapped
from tests.helpers.cli import document, lca, refused, says, write_step
from tests.helpers.forked_python import program
from tests.helpers.large_runs import Chain, data
from tests.helpers.terminal import on_terminal

NAMES = [
    f"residual_branch_with_a_long_name_{at:02d}_of_the_whole_of_this_network" for at in range(24)
]
_KINDS = ("red", "green")


class Branches(Chain):
    """Small layers under long names, and one that no loss depends on and that does not move."""

    def __init__(self) -> None:
        super().__init__(NAMES, 10)
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs
        for name in NAMES:
            hidden = hidden + torch.tanh(getattr(self, name)(hidden)) / len(NAMES)
        return self.last(hidden) + 0 * self.frozen(inputs).sum()


def task() -> Task:
    losses = {
        "train": Loss(F.cross_entropy),
        "per_kind": Loss(
            F.cross_entropy, group_by=lambda inputs, targets: [_KINDS[at % 2] for at in targets]
        ),
    }
    return Task(Branches, {"train": data()}, losses)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("tables")
    torch.manual_seed(0)
    model, generator = Branches(), torch.Generator().manual_seed(1)
    for step in range(3):
        write_step(
            place / "ck",
            step,
            {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        )
        for name, tensor in model.named_parameters():
            tensor.data += (
                0.0
                if name.startswith("frozen")
                else 0.1 * torch.randn(tensor.shape, generator=generator)
            )
    return replay(place / "ck", "statistics")


@pytest.fixture(scope="module")
def sums(run: Run) -> Run:
    """The same with sums of tensors alone."""
    return replay(run.path.parent / "ck", "tensors")


def replay(checkpoints: Path, keep: str) -> Run:
    settings: dict[str, Any] = {"losses": ["all"], "rule": "left", "cluster": "inline"}
    settings |= {"durability": "none", "keep": keep}
    return lca_posthoc.run(checkpoints, task(), out=checkpoints.parent / f"{keep}.lca", **settings)


def table_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the rows below a heading."""
    lines = iter(text.splitlines())
    assert any(line.startswith(heading) for line in lines), text
    rows = []
    for line in lines:
        if not line:
            break
        rows.append(re.split(r" {2,}", line))
    return rows


@pytest.mark.parametrize(
    ("options", "shown"), [([], 20), (["--top", "3"], 3), (["--top", "100"], 26)]
)
def test_the_strongest_modules_are_shown_and_the_others_are_counted_and_summed(
    run: Run, options: list[str], shown: int
) -> None:
    text = lca("summary", run.path, "--loss", "train", *options).stdout
    rows = table_of(text, "module ")
    found = layers(run["train"])
    order = sorted(range(26), key=lambda at: -abs(float(found["total"][at])))
    names = [str(found["layer"].values[at]) for at in order]
    assert [row[0] for row in rows[:shown]] == names[:shown]
    left = 26 - shown
    if left:
        others = math.fsum(float(found["total"][at]) for at in order[shown:])
        assert rows[shown][0] == f"({left} more)"
        assert float(rows[shown][2]) == pytest.approx(others, abs=1e-6)
        assert f"{left} more modules: `lca summary {run.path} --all` shows every tensor" in text
    else:
        assert len(rows) == 26
        assert "more modules" not in text
        assert text.splitlines()[-1] == f"`lca summary {run.path} --all` shows every tensor"
    total = math.fsum(float(row[2]) for row in rows)
    assert total == pytest.approx(summary(run["train"])["allocated"], abs=1e-5)


def test_all_shows_every_tensor_in_the_order_of_the_model(run: Run) -> None:
    text = lca("summary", run.path, "--loss", "train", "--all").stdout
    assert [row[0] for row in table_of(text, "tensor ")] == [
        str(name) for name in run["train"].tensors["tensor"].values
    ]
    assert "--all" not in text


@pytest.mark.parametrize(("options", "columns"), [([], 8), (["--top", "2"], 2), (["--all"], 52)])
def test_the_modules_beside_groups_add_up_to_what_was_allocated(
    run: Run, options: list[str], columns: int
) -> None:
    rows = table_of(lca("summary", run.path, "--loss", "per_kind", *options).stdout, "group ")
    figures = summary(run["per_kind"])
    for row, allocated in zip(rows, figures["allocated"], strict=False):
        parts = row[6:]
        assert len(parts) == columns + ("--all" not in options)
        assert math.fsum(map(float, parts)) == pytest.approx(allocated, abs=1e-4 * (columns + 1))


@pytest.mark.parametrize(
    "option", [["--top", "0"], ["--top", "-1"], ["--top", "many"], ["--top", "3", "--all"]]
)
def test_a_top_that_means_nothing_is_refused(run: Run, option: list[str]) -> None:
    refused(lca("summary", run.path, *option), "--top")


def test_json_has_everything_whatever_is_shown(run: Run) -> None:
    whole = document(lca("summary", run.path, "--json"))
    assert document(lca("summary", run.path, "--json", "--top", "1")) == whole
    assert [len(whole["losses"]["train"][what]) for what in ("modules", "tensors")] == [26, 52]


def test_what_did_not_move_is_not_said_to_help_in_no_case(run: Run) -> None:
    (row,) = (
        row
        for row in table_of(lca("summary", run.path, "--top", "99").stdout, "module ")
        if row[0] == "frozen"
    )
    assert row[-1] == "did not move"
    found = {module["name"]: module["moved"] for module in summary(run["train"])["modules"]}
    assert [name for name, moved in found.items() if not moved] == ["frozen"]


@pytest.mark.parametrize("options", [[], ["--top", "3"], ["--all"]])
@pytest.mark.parametrize(("loss", "heading"), [("train", ""), ("per_kind", "group ")])
def test_of_sums_the_tables_are_the_same_but_for_the_shares(
    run: Run, sums: Run, loss: str, heading: str, options: list[str]
) -> None:
    heading = heading or ("tensor " if "--all" in options else "module ")
    with_shares, without = (
        lca("summary", opened.path, "--loss", loss, *options).stdout for opened in (run, sums)
    )
    assert "helping" in with_shares
    assert not re.search("helping|hurting|zero|did not move|nan", without)
    for one, two in zip(table_of(with_shares, heading), table_of(without, heading), strict=True):
        share = 5 if heading == "group " and one[0] != "(all)" else None
        if share is None and heading != "group ":
            share, moved = len(one) - 1, two.pop() if len(two) == len(one) else "yes"
            assert moved == ("no" if one[-1] == "did not move" else "yes")
        assert two == [cell for at, cell in enumerate(one) if at != share]


def test_many_losses_of_sums_are_rows_without_shares(
    sums: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, grouped = summary(sums["train"]), summary(sums["per_kind"])
    print_summary({f"loss {at}": plain for at in range(8)} | {"by kind": grouped}, sums.path)
    text = capsys.readouterr().out
    assert "helping" not in text
    assert {len(row) for row in table_of(text, "loss ")[:8]} == {6}
    print_summary({"one": plain, "two": plain}, sums.path)
    assert not re.search("helping|hurting|zero", capsys.readouterr().out)


def test_a_screen_holds_every_line_and_every_number(run: Run) -> None:
    columns = 80
    code, shown = on_terminal([program("lca"), "summary", run.path, "--loss", "train"], columns)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert code == 0
    assert max(map(len, plain.splitlines())) <= max(columns, len(f"`lca summary {run.path} --all`"))
    through = lca("summary", run.path, "--loss", "train").stdout
    for row in table_of(through, "module "):
        assert all(cell in plain for cell in row[1:])


# --- numbers, numbers of things, lines ------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "scale", "shown"),
    [
        (2.425098, 2.5, "+2.425098"),
        (-5.566300e7, 2.5e9, "-5.566300e+07"),
        (2_425_098_123.0, 2_425_098_123.0, "+2.425098e+09"),
        (123456.789, 123456.789, "+123456.789000"),
        (-1.4e-6, 0.05, "-1.4e-06"),
        (3.2e-7, 3.2e-7, "+3.200000e-07"),
        (0.0, 0.0, "+0.000000"),
        (float("nan"), 1.0, "+nan"),
    ],
)
def test_a_loss_of_any_size_is_short_and_loses_no_digit_that_counts(
    value: float, scale: float, shown: str
) -> None:
    assert units_of_loss(value, scale) == shown
    assert len(shown) <= 14


def test_many_losses_are_a_row_each_and_say_how_to_see_more(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, grouped = summary(run["train"]), summary(run["per_kind"])
    found = {f"loss {at}": plain for at in range(49)} | {"by kind": grouped}
    print_summary(found, run.path)
    text = capsys.readouterr().out
    rows = table_of(text, "loss ")
    assert [row[0] for row in rows] == list(found)
    assert len(text.splitlines()) == 1 + len(found) + 2
    # the last loss has groups, and is the mean of the same examples
    for row in (rows[0], rows[-1][:1] + rows[-1][2:]):
        ends = f"{plain['loss_start']:.4f} → {plain['loss_end']:.4f}"
        assert row[1:4] == [str(plain["segments"]), ends, f"{plain['loss_change']:+.6f}"]
    assert f"`lca summary {run.path} --loss NAME`" in text
    print_summary(found, run.path, top=1)
    assert capsys.readouterr().out.count("(25 more)") == len(found)


def test_some_losses_are_a_row_each_above_what_their_modules_did(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = summary(run["train"])
    print_summary({f"a loss of a long name, {number}": plain for number in range(4)}, run.path)
    text = capsys.readouterr().out
    assert [row[0] for row in table_of(text, "loss ")] == [
        f"a loss of a long name, {number}" for number in range(4)
    ]
    assert text.count("(6 more)") == 4
    print_summary({f"loss {number}": plain for number in range(3)}, run.path)
    assert "allocated, Σ over parameters and segments" in capsys.readouterr().out


def test_a_loss_in_dollars_has_no_sixteen_digits(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "parameters": 4,
        "moved": True,
        "standard_error": None,
        "segments_error": None,
        "path_band": None,
        "helping": 0.5,
    }
    figures: dict[str, Any] = {
        "segments": 1,
        "long_segments": 0,
        "sampled_of": None,
        "identity_change": None,
        "gaps": 0,
        "gaps_change": None,
        "segments_error": None,
        "first_step": 0,
        "last_step": 1,
        "parameters": 4,
        "evaluations": 1,
        "unconverged": 1,
        "loss_start": 2.5e9,
        "loss_end": 2.4e9,
        "loss_change": -1e8,
        "allocated": -1e8,
        "residual": 3.0,
        "buffers": None,
        "remainder": None,
        "path_band": None,
        "doubling": None,
        "max_segment_residual": 3.0,
        "helping": 0.5,
        "hurting": 0.5,
        "zero": 0.0,
        "precision": "float32",
        "precision_error": 4.2e-3,
        "precision_segments": 1,
        "precision_examples": 10,
        "examples": 640,
        "norm_stats": None,
        "groups": None,
        "modules": [
            {"name": "layer", "allocated": -1e8, **row},
            {"name": "small", "allocated": -0.25, **row},
        ],
        "tensors": [],
    }
    print_summary({"dollars": figures}, Path("a run.lca"))
    text = capsys.readouterr().out
    says(
        text,
        "2.500000e+09",
        "-1.000000e+08",
        "-2.500000e-01",
        "1 segment,",
        "1 segment above the tolerance",
        "on 1 segment, on 10 examples of 640)",
    )
    says(text, "measured error of float32 allocations against float64 ones 4.2e-03 of their size")
    assert re.search(r"\d{8}", text) is None
    assert re.search(r"\b1 \w+s\b", text) is None


@pytest.mark.parametrize(
    ("value", "words", "shown"),
    [
        (0, ("segment",), "0 segments"),
        (1, ("segment",), "1 segment"),
        (1, ("loss", "losses"), "1 loss"),
        (2, ("loss", "losses"), "2 losses"),
        (1234, ("damaged file",), "1,234 damaged files"),
    ],
)
def test_numbers_of_things(value: int, words: tuple[str, ...], shown: str) -> None:
    assert count(value, *words) == shown


class Screen:
    """What `wrapped` asks of a console."""

    def __init__(self, width: int, terminal: bool) -> None:
        from rich.console import Console

        self.console = Console(width=width)
        self.console.file = type("File", (), {"isatty": lambda _: terminal, "encoding": "utf-8"})()


@pytest.mark.parametrize("width", [40, 80])
def test_a_note_breaks_between_words_and_never_inside_a_command(width: int) -> None:
    command = "`lca run checkpoints --loss train`"
    text = (
        f"note: the loss is not complete and much more is to be said of it; {command} goes on with "
        "it where it was"
    )
    shown = wrapped(text, Screen(width, True).console)
    assert max(map(len, shown.splitlines())) <= width
    assert " ".join(shown.split()) == text
    assert any(command in line for line in shown.splitlines())
    assert wrapped(text, Screen(width, False).console) == text


# --- help -----------------------------------------------------------------------------------------


def test_the_bare_command_prints_its_help_as_help() -> None:
    bare, asked = lca(), lca("--help")
    assert (bare.exit_code, bare.stderr, bare.stdout) == (0, "", asked.stdout)
    says(bare.stdout, "Usage: ", "COMMAND [ARGS]...", "lca demo", "summary")


@pytest.mark.parametrize("command", [[], ["plot"], ["run"], ["summary"], ["compare"]])
def test_help_has_no_sign_that_its_terminal_lacks(command: list[str]) -> None:
    shown = CliRunner(charset="ascii").invoke(cli, [*command, "--help"])
    assert (shown.exit_code, shown.stderr_bytes) == (0, b"")
    assert "Usage: " in shown.stdout_bytes.decode("ascii")
