"""Checkpoints that are damaged, and checkpoints that change while they are read."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from click.testing import Result
from safetensors.torch import load, save

from lca_posthoc.replay import driver, prepare
from tests.helpers.cli import run_lca, says, step_file

from . import clean_runs, fault
from .processes import complete, drive, laid_out, named, undamaged, whole

SEGMENTS = 12
Spoil = Callable[[bytes], bytes | None]


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_header(text: bytes, body: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + body


def _entry(change: Callable[[dict[str, Any]], None]) -> Spoil:
    """A header in which one entry is another one."""

    def spoil(data: bytes) -> bytes:
        entries, body = _header(data)
        change(entries)
        return _with_header(json.dumps(entries).encode(), body)

    return spoil


def _overlap(entries: dict[str, Any]) -> None:
    begin, end = entries["out.weight"]["data_offsets"]
    entries["out.weight"]["data_offsets"] = [begin - 4, end - 4]


def _size(entries: dict[str, Any]) -> None:
    entries["hidden.bias"]["shape"] = [9]


def _type(entries: dict[str, Any]) -> None:
    entries["hidden.bias"]["dtype"] = "F33"


def _twice(data: bytes) -> bytes:
    entries, body = _header(data)
    again = json.dumps({"out.bias": entries["out.bias"]})[1:-1]
    return _with_header(f"{json.dumps(entries)[:-1]}, {again}}}".encode(), body)


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(data: bytes) -> bytes:
        tensors = load(data)
        change(tensors)
        return save(tensors, metadata=_header(data)[0]["__metadata__"])

    return spoil


def _pickled(_: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"out.bias": torch.zeros(4)}, file)
    return file.getvalue()


DIRECTORY = b"a directory in its place"
DAMAGE: dict[str, Spoil] = {
    "missing": lambda data: None,
    "a directory": lambda data: DIRECTORY,
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:50],
    "cut in the body": lambda data: data[:-400],
    "minus one byte": lambda data: data[:-1],
    "plus one byte": lambda data: data + b"\0",
    "garbage": lambda data: random.Random(7).randbytes(len(data)),
    "a pickle": _pickled,
    "a huge length": lambda data: (2**62).to_bytes(8, "little") + data[8:],
    "not UTF-8": lambda data: data[:10] + b"\xff" + data[11:],
    "zeros": lambda data: bytes(len(data)),
    "overlapping offsets": _entry(_overlap),
    "a wrong size": _entry(_size),
    "an unknown dtype": _entry(_type),
    "a missing tensor": _tensors(lambda tensors: tensors.pop("out.bias")),
    "a wrong shape": _tensors(lambda tensors: tensors.update({"out.bias": torch.zeros(5)})),
    "NaN": _tensors(lambda tensors: tensors["out.weight"].view(-1)[5:6].fill_(float("nan"))),
    "Inf": _tensors(lambda tensors: tensors["out.weight"].view(-1)[5:6].fill_(float("inf"))),
    "a duplicate key": _twice,
}


def _put(file: Path, data: bytes | None) -> None:
    """What stands under a name from now on, whatever did before."""
    if file.is_dir():
        file.rmdir()
    file.unlink(missing_ok=True)
    if data == DIRECTORY:
        file.mkdir()
    elif data is not None:
        file.write_bytes(data)


def _run(place: Path, out: Path) -> Result:
    with mock.patch.object(prepare, "choose_span", return_value=clean_runs.SPAN):
        return run_lca(
            place / "checkpoints",
            place / "small_task.py",
            out,
            "--loss",
            "all",
            "--tolerance",
            "inf",
        )


def _run_damaged_later(place: Path, out: Path, file: Path, spoilt: bytes | None) -> Result:
    """The damage is done when the headers have been read and the task has been looked at."""
    prepare = driver.prepare

    def prepared(*arguments: Any, **named: Any) -> Any:
        found = prepare(*arguments, **named)
        _put(file, spoilt)
        return found

    with mock.patch.object(driver, "prepare", prepared):
        return _run(place, out)


def _said(result: Result, file: Path, step: int) -> None:
    """A refusal of one line that names the file or the step."""
    line = named(result.stderr).splitlines()[-1]
    assert line.startswith("lca: "), result.stderr
    ways = (file.name, f"step {step} ", "at the first step" if step == 0 else file.name)
    assert any(way in line for way in ways), line


def _others_complete(out: Path, index: int) -> None:
    """All spans are committed but those that a checkpoint is an end or the middle of."""
    touched = {
        segment // clean_runs.SPAN for segment in (index - 1, index) if 0 <= segment < SEGMENTS
    }
    for loss in ("train", "validation"):
        done = {int(file.name[:6]) for file in out.glob(f"commits/{loss}/0*.json")}
        assert done == set(range(SEGMENTS // clean_runs.SPAN)) - touched, (done, touched)


@fault("R7", "damaged checkpoints", ci=20, full=60)
def damaged(count: int, _: Path) -> str:
    """Each case twice: found by a run that began before, and done while a new one reads."""
    codes = {2: 0, 3: 0}
    steps = (0, SEGMENTS // 2, SEGMENTS)
    cases = [(what, steps[(at + turn) % 3]) for turn in range(3) for at, what in enumerate(DAMAGE)][
        :count
    ]
    with laid_out(SEGMENTS) as (place, clean):
        started = drive(place, place / "begun.lca", "--cluster", "inline")
        assert started.until(
            lambda: len(list(place.glob("begun.lca/commits/validation/0*"))) >= 2
        ), started.said
        started.kill()
        for number, (what, step) in enumerate(cases):
            file = step_file(place / "checkpoints", step)
            whole_file = file.read_bytes()
            spoilt = DAMAGE[what](whole_file)
            assert spoilt != whole_file
            for later in (False, True):
                out = place / f"run-{number}-{later}.lca"
                if later:
                    result = _run_damaged_later(place, out, file, spoilt)
                else:
                    shutil.copytree(place / "begun.lca", out)
                    _put(file, spoilt)
                    result = _run(place, out)
                try:
                    assert result.exit_code in ((3,) if later else (2, 3)), (
                        what,
                        step,
                        later,
                        result.output,
                    )
                    codes[result.exit_code] += 1
                    _said(result, file, step)
                    undamaged(out)
                    if result.exit_code == 3:
                        _others_complete(out, step)
                finally:
                    _put(file, whole_file)
                again = _run(place, out)
                assert again.exit_code == 0, (what, step, later, again.output)
                whole(out, clean)
                shutil.rmtree(out)
    return (
        f"{count} damages: {codes[2]} exit 2, {codes[3]} exit 3, each named, bytes equal once put "
        "right"
    )


@fault("R8", "a checkpoint replaced or truncated while it is read", ci=2, full=20)
def replaced(count: int, _: Path) -> str:
    chance, harmless, found = random.Random(8), 0, 0
    with laid_out() as (place, clean):
        files = sorted((place / "checkpoints").glob("*.safetensors"))
        for number in range(count):
            out, at = place / f"run-{number}.lca", chance.randrange(1, len(files))
            file, data = files[at], files[at].read_bytes()
            driver = drive(place, out, "--cluster", "inline")
            assert driver.until(out.exists), driver.said
            moments = 0
            while not driver.wait(chance.uniform(0, 0.05)):
                _disturb(chance, file, data, files[at - 1].read_bytes())
                moments += 1
            assert moments > 0
            code = driver.finished()
            _whole_again(file, data)
            assert code in (0, 2, 3), (code, driver.said)
            undamaged(out)
            if code:
                says(named(driver.said).splitlines()[-1], file.name)
                found += 1
                complete(place, out, clean)
            harmless += code == 0
            whole(out, clean)
    return (
        f"{count} runs under changing files: {found} named the file, {harmless} had read it, bytes "
        "equal"
    )


def _disturb(chance: random.Random, file: Path, data: bytes, other: bytes) -> None:
    """Cut it where it lies, put another one in its place, write into it, or put it right."""
    what = chance.randrange(5)
    if what == 0:
        with file.open("r+b") as opened:
            opened.truncate(chance.randrange(len(data)))
    elif what == 1:
        beside = file.with_name(f".{file.name}")
        beside.write_bytes(other)
        beside.replace(file)
    elif what == 2:
        with file.open("r+b") as opened:
            opened.seek(chance.randrange(len(data) // 2, len(data)))
            opened.write(b"\x55")
    else:
        _whole_again(file, data)


def _whole_again(file: Path, data: bytes) -> None:
    beside = file.with_name(f".{file.name}")
    beside.write_bytes(data)
    beside.replace(file)
