"""What commands show: tables on terminals of any width and in pipes, encodings, streams that break."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from lca_posthoc import results
from lca_posthoc.base.text import shorten
from lca_posthoc.cli import COMMANDS
from lca_posthoc.cli.show import table
from lca_posthoc.replay.display import Stream, showable
from tests.helpers.cli import (
    says,
)
from tests.helpers.forked_python import program
from tests.helpers.terminal import ASCII, environment, on_terminal, piped

NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")

# --- tables ---------------------------------------------------------------------------------------

NAMES = {
    "layers": [
        f"encoder.layers.{layer}.attention.self.{part}.weight"
        for layer in range(12)
        for part in ("query", "key", "value")
    ],
    "160 tensors": [f"model.decoder.block{at:03d}.mlp.down_proj.weight" for at in range(160)],
    "wide signs": [f"編碼器.層{at}.注意力機制.權重" for at in range(5)],
    "combining marks": [
        f"e\u0301ncode\u0301ur.couche\u0301{at}.matrice.poids\u0301" for at in range(5)
    ],
    "one long name": ["x" * 300],
    "long labels": [
        f"a label of many words that goes on and on, number {at}, and on" for at in range(100)
    ],
    "short": ["a", "b", "c"],
    "empty": [""],
}
CELLS = ("6,336", "-1.234567", "45.7 %", "+5.1e-07", "2.3114 → 0.0903")


def filled(names: list[str]) -> Any:
    rows = table(
        "tensor",
        "parameters",
        "allocated",
        "share of sum",
        "a.long.heading.of.numbers.weight",
        "loss",
    )
    for name in names:
        rows.add_row(name, *CELLS)
    return rows


@pytest.mark.parametrize("width", [None, 40, 80, 100, 200])
@pytest.mark.parametrize("kind", NAMES)
def test_a_table_fits_its_terminal_and_keeps_every_number_and_tells_its_names_apart(
    kind: str, width: int | None
) -> None:
    names = NAMES[kind]
    blocks = filled(names).blocks(width)
    text = "\n".join(line for block in blocks for line in block)
    for cell in CELLS:
        assert text.count(cell) == len(names)
    for block in blocks:
        assert len(block) == 1 + len(names)
        assert width is None or max(map(cell_len, block)) <= width
        found = [re.split(r" {2,}", line)[0] for line in block[1:]]
        assert len(set(found)) == len(set(names))
    if width is None:
        assert len(blocks) == 1
        assert [
            line
            for name, line in zip(names, blocks[0][1:], strict=True)
            if not line.startswith(name)
        ] == []


@pytest.mark.parametrize("width", [1, 5, 12])
def test_numbers_stay_whole_where_there_is_no_room_for_anything(width: int) -> None:
    text = "\n".join(
        line for block in filled(["some.tensor.weight"]).blocks(width) for line in block
    )
    assert [cell for cell in CELLS if cell not in text] == []


@pytest.mark.parametrize(
    ("name", "width", "short"),
    [
        (
            "encoder.layers.0.attention.weight",
            25,
            "encoder.laye…ention.weight"[:12] + "…ntion.weight"[:13],
        ),
        ("short", 25, "short"),
        ("注意力機制權重", 8, "注意…重"),
        ("e\u0301" * 8, 5, "e\u0301" * 2 + "…" + "e\u0301" * 2),
    ],
)
def test_a_name_is_cut_in_the_middle(name: str, width: int, short: str) -> None:
    (found,) = shorten([name], width)
    assert found == short
    assert cell_len(found) <= width


def test_both_ends_of_a_name_are_kept() -> None:
    found = shorten([f"encoder.layers.{at}.attention.self.query.weight" for at in range(12)], 24)
    assert len(set(found)) == 12
    assert all(text.startswith("enc") and text.endswith("ght") for text in found)


@pytest.fixture(scope="module")
def in_a_pipe(place: Path) -> Callable[[str], str]:
    """What a command that only reads writes into a pipe."""

    @functools.cache
    def through(command: str) -> str:
        return piped(reading(command, place), PYTHONIOENCODING="utf-8").stdout.decode()

    return through


def reading(command: str, place: Path) -> list[object]:
    run = place / "r.lca"
    return [program("lca"), command, run, *([f"two={run}"] if command == "compare" else [])]


def numbers(text: str) -> list[str]:
    return sorted(set(NUMBER.findall(re.sub(r"\x1b\[[0-9;]*m", "", text))))


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
@pytest.mark.parametrize("command", ["summary", "status", "compare"])
def test_a_terminal_of_any_width_shows_the_numbers_of_a_pipe(
    place: Path, in_a_pipe: Callable[[str], str], command: str, columns: int
) -> None:
    code, shown = on_terminal(reading(command, place), columns)
    assert code == 0, shown
    through = in_a_pipe(command)
    assert set(numbers(through)) <= set(numbers(shown))
    assert "…" not in through
    if command == "summary":
        says(through, *(f"die größte Klasse von allen, Nummer {at}" for at in range(4)))


def test_a_dumb_terminal_shows_nothing_that_moves(place: Path) -> None:
    call = reading("verify", place)
    assert on_terminal(call, TERM="dumb") == (0, piped(call).stdout.decode())


def test_a_dumb_terminal_shows_the_same(place: Path, in_a_pipe: Callable[[str], str]) -> None:
    code, shown = on_terminal(reading("summary", place), TERM="dumb")
    assert code == 0
    assert "\x1b" not in shown
    assert set(numbers(in_a_pipe("summary"))) <= set(numbers(shown))


COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:[34][0-8]|9[0-7]|10[0-7])(?=[;m])")
COLOURED = ("run", "verify", "inspect", "summary")


@pytest.mark.parametrize("command", [*COLOURED, "--help", "a refusal", "a traceback"])
def test_no_colour_means_no_colour(place: Path, out: Path, command: str) -> None:
    others = {
        "--help": ["run", "--help"],
        "a refusal": ["summary", place / "r.lca", "--loss", "none"],
        "a traceback": ["--debug", "summary", place / "r.lca", "--loss", "none"],
    }
    arguments = [program("lca"), *{**calls(place, out), **others}[command]]
    _, shown = on_terminal(arguments, NO_COLOR="1")
    assert COLOUR.findall(shown) == []


def test_without_it_there_are_colours(place: Path, out: Path) -> None:
    """The test above can fail."""
    assert COLOUR.search(on_terminal([program("lca"), *calls(place, out)["run"]])[1])


# --- streams that cannot show or take everything --------------------------------------------------

ENCODINGS = {
    "ascii": ASCII,
    "latin-1": {**ASCII, "PYTHONIOENCODING": "latin-1"},
    "shift-jis": {"PYTHONIOENCODING": "shift_jis"},
    "no utf-8 mode": {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    "strict utf-8": {"PYTHONIOENCODING": "utf-8:strict"},
}


def calls(place: Path, out: Path) -> dict[str, list[object]]:
    """A call of every command, none of which fails."""
    run, task = place / "r.lca", place / "task.py"
    copy = out / "copy.lca"
    return {
        "basis": ["basis", place / "ck", "-o", out / "größe"],
        "compare": ["compare", run, f"größer={run}"],
        "demo": ["demo", out / "démo"],
        "export": ["export", run, "-o", out / "größe", "--format", "csv"],
        "import": ["import", out / "saved", out / "importé"],
        "info": ["info", run],
        "inspect": ["inspect", place / "ck"],
        "plan": ["plan", place / "ck", "--task", task],
        "plot": ["plot", run, "layers", "--loss", "per_class", "-o", out / "größe.svg"],
        "remove": ["remove", copy, "--loss", "validation"],
        "repair": ["repair", copy, "--task", task],
        "report": ["report", run, "-o", out / "größe.html"],
        "run": [
            "run",
            place / "ck",
            "--task",
            task,
            "--out",
            out / "größe.lca",
            "--cluster",
            "inline",
            "--loss",
            "all",
        ],
        "status": ["status", run],
        "summary": ["summary", run],
        "verify": ["verify", run],
    }


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])
def test_no_command_fails_for_signs_its_terminal_lacks(
    place: Path, out: Path, command: str
) -> None:
    done = piped([program("lca"), *calls(place, out)[command]], **ASCII)
    assert done.returncode == 0, done.stderr
    assert b"Error" not in done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    done.stdout.decode("ascii")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_shows_every_number(
    place: Path, in_a_pipe: Callable[[str], str], encoding: str
) -> None:
    known = numbers(in_a_pipe("summary"))
    done = piped(reading("summary", place), **ENCODINGS[encoding])
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(
        ENCODINGS[encoding].get("PYTHONIOENCODING", "utf-8").partition(":")[0]
    )
    assert set(known) <= set(numbers(shown))


@pytest.mark.parametrize(
    ("text", "encoding", "shown"),
    [
        ("2.3 → 0.1", "ascii", "2.3 -> 0.1"),
        ("2.3 → 0.1 × 2", "latin-1", "2.3 -> 0.1 × 2"),
        ("größe", "ascii", r"gr\xf6\xdfe"),
        ("\udcff", "utf-8", r"\udcff"),
        ("権", "shift_jis", "権"),
        ("→", "no such encoding", "->"),
    ],
)
def test_signs_become_others(text: str, encoding: str, shown: str) -> None:
    assert showable(text, encoding) == shown


@pytest.mark.moment
@pytest.mark.parametrize(
    "command", ["compare", "summary", "status", "verify", "run", "--help", "summary --json"]
)
def test_a_pipe_that_is_closed_leaves_the_exit_code_and_says_nothing(
    place: Path, out: Path, command: str
) -> None:
    arguments = [
        program("lca"),
        *calls(place, out).get(command, [*command.split(), place / "r.lca"]),
    ]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [str(each) for each in arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment(),
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1 if command == "--help" else 0, b"")


@pytest.mark.moment
@pytest.mark.parametrize("where", ["/dev/full", "closed", "closed pipe"])
@pytest.mark.parametrize("cluster", ["inline", "local"])
def test_a_stderr_that_is_gone_costs_no_run(
    place: Path, out: Path, where: str, cluster: str
) -> None:
    options = [
        "--cluster",
        cluster,
        "--rule",
        "left",
        "--steps",
        ":30",
        *(["--workers", 1] if cluster == "local" else []),
    ]
    command = [
        program("lca"),
        "run",
        place / "ck",
        "--task",
        place / "task.py",
        "--out",
        out / "gone.lca",
        *options,
    ]
    script = {
        "/dev/full": '"$@" 2>/dev/full',
        "closed": '"$@" 2>&-',
        "closed pipe": '{ "$@"; } 2> >(:)',
    }[where]
    arguments = ["bash", "-c", script, "bash", *map(str, command)]
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, env=environment(), check=False, timeout=240
    )
    assert done.returncode == 0
    assert done.stdout.decode().splitlines()[-1] == f"results in {out / 'gone.lca'}"
    assert list(results.verify(out / "gone.lca")) == []


def test_results_that_cannot_be_printed_are_an_error(place: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [program("lca"), "summary", str(place / "r.lca")],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            check=False,
        )
    assert done.returncode == 5
    assert done.stderr.startswith(b"lca: the result cannot be printed")
    assert done.stderr.count(b"\n") == 1


def test_a_stream_that_is_gone_is_written_to_no_more() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as file:
        stream = Stream(file, matters=True)
        print("one", file=stream, flush=True)
        print("two", file=stream, flush=True)
        assert not stream.isatty()
