"""Faults of the disk and of whoever shares it: calls that fail, bytes that change, records that
lie, work done twice.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lca_posthoc
from lca_posthoc import open_run
from lca_posthoc.cluster import broadcast
from lca_posthoc.errors import LCAError
from lca_posthoc.replay import prepare
from lca_posthoc.replay.display import Display
from lca_posthoc.replay.events import SpanDone
from lca_posthoc.replay.repair import repair
from lca_posthoc.replay.worker import replay_span
from lca_posthoc.results import Damage, SpanReport, verify
from lca_posthoc.results.files import write_json
from lca_posthoc.results.runfile import FORMAT
from lca_posthoc.tasks.task import pack_task
from tests.helpers.cli import contents, lca, marker, refused

from . import by_level, drawn_levels, fault
from .clean_runs import SPAN, clean_run, lay_out, near_the_oracle, same_bytes

OPTIONS = ("--cluster", "inline", "--tolerance", "inf", "--loss", "all")

Change = Callable[[Path], object]


def run_in_spans(place: Path, out: Path, keep: str = "parameters") -> Any:
    """`lca run` over every loss in this process, in spans of two segments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "choose_span", lambda *_: SPAN)
        patch.setattr(prepare._Match, "room_for_windows", 4)
        arguments = (
            place / "checkpoints",
            "--task",
            place / "small_task.py",
            "--out",
            out,
            "--keep",
            keep,
            *OPTIONS,
        )
        return lca("run", *arguments)


def _resumed(place: Path, out: Path) -> list[tuple[str, int]]:
    """Run again from Python; the losses and spans that were replayed."""
    events: list[Any] = []
    where = {"losses": ["all"], "out": out, "cluster": "inline", "progress": events.append}
    lca_posthoc.run(place / "checkpoints", place / "small_task.py", **where)
    done = [event for event in events if isinstance(event, SpanDone)]
    return [(loss, event.span) for event in done for loss in event.losses]


# --- R4: the N-th call fails ----------------------------------------------------------------------


class _Writing:
    """A file whose writes count."""

    def __init__(self, file: Any, count: Callable[[object], None], path: object) -> None:
        self._file, self._count, self._path = file, count, path

    def write(self, data: Any) -> int:
        self._count(self._path)
        return int(self._file.write(data))

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def _failing(out: Path, number: int | None, code: int) -> Iterator[list[int]]:
    """Count the calls that open, write, flush or rename something of a run; the `number`-th
    fails.
    """
    made, place, lock = [0], str(out), threading.Lock()  # several threads write and flush

    def count(path: object) -> None:
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)  # type: ignore[call-overload]
        if str(name).startswith(place):
            with lock:
                made[0] += 1
                is_the_one = made[0] == number
            if is_the_one:
                raise OSError(code, os.strerror(code), str(name))

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(path: Any, *arguments: Any, **options: Any) -> Any:
            count(path)
            return call(path, *arguments, **options)

        return failing

    original = io.open

    def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not isinstance(path, int):
            count(path)
        file = original(path, mode, *arguments, **options)
        inside = not isinstance(path, int) and str(os.fspath(path)).startswith(place)
        return _Writing(file, count, path) if inside and set(mode) & set("wxa+") else file

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "fsync", "open"):
            patch.setattr(os, name, wrapped(getattr(os, name)))
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        # what is written and looked up every few seconds may fail: a display shows less
        patch.setattr(SpanReport, "_write", lambda report: None)
        patch.setattr(Display, "_read_reports", lambda display: None)
        yield made


@fault(
    "R4",
    "the N-th call that opens, writes, flushes or renames fails (EIO, ENOSPC)",
    ci=20,
    full=200,
)
def fail_a_call(count: int, place: Path) -> str:
    lay_out(place, 5)
    calls, codes, beyond, trials = dict[str, int](), list[int](), 0, list[str]()
    for at, keep in zip(range(count), drawn_levels(4), strict=False):
        clean = place / f"{keep}.lca"
        if keep not in calls:
            calls[keep] = _calls(place, clean, keep)
        number, out = 1 + at * calls[keep] // count, place / f"{at}" / "run.lca"
        code = (errno.EIO, errno.ENOSPC)[at % 2]
        with _failing(out, number, code) as reached:
            result = run_in_spans(place, out, keep)
        if reached[0] < number:  # the first run of a process opens a few files more than later ones
            beyond += 1
            assert result.exit_code == 0, (number, result.exit_code, result.stderr)
            continue
        assert result.exit_code in (1, 3, 5), (number, result.exit_code, result.stderr)
        assert result.stderr.splitlines()[-1].startswith("lca: "), result.stderr
        codes.append(result.exit_code)
        trials.append(keep)
        if out.exists():
            assert [each for each in verify(out) if isinstance(each, Damage)] == [], number
        assert run_in_spans(place, out, keep).exit_code == 0, number
        same_bytes(out, clean)
        shutil.rmtree(out.parent)
    assert beyond <= count // 20, beyond
    told = ", ".join(f"{codes.count(code)} with exit {code}" for code in sorted(set(codes)))
    return (
        f"{len(codes)} of up to {max(calls.values())} calls ({by_level(trials)}): {told}; all "
        "resumed to the same bytes"
    )


def _calls(place: Path, clean: Path, keep: str) -> int:
    """How many calls a clean run makes."""
    with _failing(clean, None, 0) as made:
        assert run_in_spans(place, clean, keep).exit_code == 0
    near_the_oracle(place, clean)
    return made[0]


# --- R6: stored bytes change ----------------------------------------------------------------------


def _flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Change] = {
    "deleted": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "a byte short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "a bit flipped": _flipped,
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}
ARRAYS = {
    "tensors": ("tensors/allocated", "tensors/motion"),
    "units": ("tensors/allocated", "units/hidden.weight", "units/out.bias"),
    "statistics": ("tensors/gradient", "tensors/helping", "units/out.bias"),
    "parameters": ("allocation/hidden.weight", "tensors/helping", "units/out.bias"),
}


@fault(
    "R6",
    "a chunk is damaged: six ways, first, middle and last span, some arrays of each level",
    ci=12,
    full=54,
)
def damage_a_chunk(count: int, place: Path) -> str:
    lay_out(place, 9)
    chance, trials = random.Random(0), list[str]()
    cases = [(how, span) for how in DAMAGES for span in (0, 2, 4)] * -(-count // 18)
    chance.shuffle(cases)
    for (how, span), keep in zip(cases[:count], drawn_levels(6), strict=False):
        trials.append(keep)
        clean, out = place / f"{keep}.lca", place / f"run-{keep}.lca"
        if not clean.exists():
            shutil.copytree(clean_run(place, clean, keep=keep), out)
        _damaged(out, place, how, span, chance.choice(ARRAYS[keep]))
        same_bytes(out, clean)
    return (
        f"{count} damaged chunks ({by_level(trials)}): all named, all repaired alone to the same "
        "bytes"
    )


def _damaged(out: Path, place: Path, how: str, span: int, array: str) -> None:
    """Damage a chunk of a span: whoever reads it is told, and it is repaired alone."""
    part, _, key = array.partition("/")
    row = out / "data.zarr" / "train" / array / "c" / str(span)
    DAMAGES[how](next(file for file in sorted(row.rglob("*")) if file.is_file()))
    line = refused_by_verify(out, 1)
    assert f"lca repair {out}" in line
    (found,) = document_of_damages(out)
    name = key if part != "tensors" else None
    assert (found["loss"], found["tensor"], found["span"]) == ("train", name, span), (how, found)
    assert found["array"] in (part, array)
    assert (found["first_step"], found["last_step"]) == (2 * span, min(9, 2 * span + 2))
    with pytest.raises(LCAError, match=rf"{key}.* \(steps {2 * span} to "):
        getattr(open_run(out)["train"], part).load()
    events: list[Any] = []
    repair(out, place / "small_task.py", cluster="inline", progress=events.append)
    done = [(event.span, event.losses) for event in events if isinstance(event, SpanDone)]
    assert done == [(span, ["train"])], (how, span, array)
    assert lca("verify", out).exit_code == 0


def refused_by_verify(out: Path, damages: int) -> str:
    """`lca verify` ends with exit 4 and counts the damages; its last line."""
    result = lca("verify", out)
    line = result.stderr.splitlines()[-1]
    assert (result.exit_code, line.startswith(f"lca: {damages} damaged file")) == (4, True), (
        result.output
    )
    assert len(result.stdout.splitlines()) == 1 + damages, result.stdout
    return line


def document_of_damages(out: Path) -> list[dict[str, Any]]:
    result = lca("verify", out, "--json")
    assert result.exit_code == 4
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["schema"] == 1
    return list(found["damages"])


# --- R15: a span replayed twice at once -----------------------------------------------------------


def _replay(specs: list[Any], out: Path, clean: Path, together: Any, first: bool) -> None:
    """Replay some spans in step with another process; the first of the two takes markers away and
    looks at what came.
    """
    for spec in specs:
        if first:
            marker(out, "train", spec["span"]).unlink()
        together.wait()
        answer = replay_span(spec)
        assert "error" not in answer, answer
        together.wait()
        if first:
            assert marker(out, "train", spec["span"]).is_file()  # there is exactly one
            same_bytes(out, clean)


@fault("R15", "the same span replayed by two processes at once", ci=50, full=50)
def replay_twice(count: int, place: Path) -> str:
    lay_out(place, 9)
    clean, out = clean_run(place, place / "clean.lca"), place / "run.lca"
    shutil.copytree(clean, out)
    specs: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for span in range(5):
            marker(out, "train", span).unlink()
        patch.setattr(
            "lca_posthoc.replay.pending_spans.replay_span",
            lambda spec: specs.append(spec) or replay_span(spec),
        )
        _resumed(place, out)
    assert [spec["span"] for spec in specs] == list(range(5))
    broadcast.take_in(specs[0]["setup"]["parcel"], pack_task(place / "small_task.py")[1])
    context = multiprocessing.get_context("fork")
    cases, together = (
        [specs[at % len(specs)] for at in range(count)],
        context.Barrier(2, timeout=60),
    )
    both = [
        context.Process(target=_replay, args=(cases, out, clean, together, first))
        for first in (True, False)
    ]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert [each.exitcode for each in both] == [0, 0]
    assert list(verify(out)) == []
    return f"{count} spans replayed by two processes at once: the same bytes, one marker each"


# --- R17: records of other releases, and records that lie -----------------------------------------


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        for name in path[:-1]:
            record = record[name]
        record[path[-1]] = to

    return change


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
    "a newer format": (
        _set("format", to=FORMAT + 1),
        (f"format {FORMAT + 1} of a newer release", "Install"),
    ),
    "an older format": (
        _set("format", to=FORMAT - 1),
        (f"format {FORMAT - 1} of an older release", "--out"),
    ),
    "an unknown field": (_set("colour", to="red"), ("'colour' is unknown",)),
    "a missing field": (lambda record: record.pop("window"), ("'window' is missing",)),
    "a missing tensor's key": (
        lambda record: record["tensors"][0].pop("key"),
        ("'tensors.key' is missing",),
    ),
    "text for a number": (_set("span", to="2"), ("'span' must be",)),
    "a span that is no power of two": (_set("span", to=3), ("'span' must be a power of two",)),
    "an absurd shape": (
        _set("tensors", 0, "shape", to=[2**40, 2**40]),
        ("'tensors.shape' must be fewer than 2**63",),
    ),
    "a tensor above the run": (
        _set("tensors", 0, "key", to="../../up"),
        ("'tensors.key' must be",),
    ),
    "a loss above the run": (_set("losses", "train", "key", to=".."), ("'losses.key' must be",)),
    "checkpoints elsewhere": (
        _set("checkpoints", 0, 1, to=["../secret"]),
        ("'checkpoints' must be files below",),
    ),
    "checkpoints out of order": (
        _set("checkpoints", 0, 0, to=10**6),
        ("'checkpoints' must be in ascending order",),
    ),
    "two tensors with one key": (
        _set("tensors", 0, "key", to="OUT.bias"),
        ("'tensors.key' must be another one",),
    ),
    "more tensors than a model has": (
        lambda record: record["tensors"].extend(record["tensors"][:1] * 100_001),
        ("'tensors' must be a list of 0 to 100000 entries",),
    ),
    "a tensor of another shape": (
        _set("tensors", 0, "shape", to=[2**40, 64]),
        ("it is not what follows from run.json",),
    ),
}


@fault(
    "R17", "run.json of another release, or one that lies, rightly sealed", ci=10, full=len(LIES)
)
def lie_in_the_record(count: int, place: Path) -> str:
    lay_out(place, 9)
    out = clean_run(place, place / "run.lca")
    honest = json.loads((out / "run.json").read_text())
    cases = list(LIES)
    if count < len(cases):
        random.Random(1).shuffle(cases)
    for case in cases[:count]:
        change, words = LIES[case]
        record = json.loads(json.dumps(honest))
        change(record)
        del record["crc32"]
        write_json(out / "run.json", record)
        before = contents(place)
        if case != "a tensor of another shape":  # which other arrays do not depend on
            for command in ("summary", "status"):
                refused(lca(command, out), str(out), *words, code=1)
            assert run_in_spans(place, out).exit_code == 1, case
        with pytest.raises(LCAError) as told:
            _ = open_run(out)["train"].allocation
        assert "\n" not in str(told.value)
        assert [word for word in words if word not in str(told.value)] == []
        assert lca("verify", out).exit_code in (1, 4)
        assert contents(place) == before, case
    return f"{count} records refused in one line, nothing written"
