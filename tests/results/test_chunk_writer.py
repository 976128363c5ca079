"""Chunks are what zarr writes, whoever writes them and however long it takes; what waits is
bounded; what goes wrong in a thread belongs to its span, and no thread outlives one.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from lca_posthoc.errors import LCAError
from lca_posthoc.numerics.schema import KEEP
from lca_posthoc.results import chunk_writer
from lca_posthoc.results.chunk_writer import ChunkWriter
from lca_posthoc.results.files import seal
from lca_posthoc.results.layout import ArrayPlan
from tests.helpers.cli import contents, says

from ..helpers.wrong_input import Place, before_span, spans_of

LONG = 60.0  # seconds after which a thread is taken to wait for ever, on a busy machine too
ENCODED = chunk_writer.encoded


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lca-write")]


@pytest.fixture(autouse=True)
def _no_writer_stays() -> Iterator[None]:
    yield
    assert writers() == []


def planned(shape: tuple[int, ...], dtype: str, rows: int, block: int | None = None) -> ArrayPlan:
    dims = ("step", "group", *map(str, range(len(shape))))[: len(shape)]
    return ArrayPlan(
        path="part/tensor",
        dims=dims,
        shape=shape,
        dtype=dtype,
        rows=rows,
        attributes={},
        block=block,
    )


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize(
    ("shape", "rows", "block"),
    [
        ((8,), 4, None),
        ((7,), 4, None),
        ((7, 6, 1), 2, 3),
        ((6, 10, 300, 113), 4, 4),
        ((3, 1200, 700), 1, None),
        ((5, 2, 3, 400_000), 2, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int32", "int8"])
def test_chunks_are_those_of_zarr(
    tmp_path: Path, shape: tuple[int, ...], rows: int, block: int | None, dtype: str, durable: bool
) -> None:
    """Row by row and block by block, as spans come; the last of each may be shorter."""
    if np.prod(shape) > 10**6 and (durable or dtype not in ("float32", "int8")):
        shape = (*shape[:-1], shape[-1] // 8)
    plan = planned(shape, dtype, rows, block)
    generator = np.random.default_rng(0)
    values = generator.integers(-9, 9, shape).astype(dtype)
    if dtype.startswith("float"):
        values[generator.random(shape) < 0.1] = np.nan
    array = zarr.create_array(
        tmp_path / "theirs",
        shape=shape,
        chunks=plan.chunks,
        dtype=dtype,
        fill_value=plan.fill,
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
        config={"write_empty_chunks": True},
    )
    array[...] = values
    seals: dict[str, list[int]] = {}
    with ChunkWriter(tmp_path, durable, packed=False) as chunks:
        for row in range(0, shape[0], rows):
            for group in range(0, shape[1] if block else 1, block or 1):
                corner = (row, group) if block else (row,)
                part: Any = (slice(row, row + rows),)
                part += (slice(group, group + block),) if block else ()
                chunks.write("ours", plan, values[part], corner)
            seals |= chunks.sealed(
                [f"ours/{file}" for file in plan.row_files(row // rows)], tmp_path / "pack"
            )
    ours = contents(tmp_path / "ours" / plan.path / "c")
    assert ours == contents(tmp_path / "theirs" / "c")
    assert len(seals) == plan.files
    assert all(seal(tmp_path / path, False) == sealed for path, sealed in seals.items())


class Idle:
    """In place of threads: nothing is done before somebody waits for it."""

    def __init__(self, *_: object) -> None:
        self.stopped = False

    def submit(self, work: Callable[[Any], None], part: Any) -> SimpleNamespace:
        return SimpleNamespace(result=lambda: work(part))

    def shutdown(self, *, cancel_futures: bool) -> None:
        self.stopped = cancel_futures


@pytest.mark.parametrize("keep", KEEP)
def test_a_run_is_the_same_whether_chunks_are_written_at_once_or_at_last(
    place: Place, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    stored = []
    for threads, waiting in ((ThreadPoolExecutor, 0), (Idle, 2**30)):
        place.out = place.data / f"{waiting}.lca"
        with monkeypatch.context() as patch:
            patch.setattr(chunk_writer, "ThreadPoolExecutor", threads)
            patch.setattr(chunk_writer, "WAITING", waiting)
            assert place.run("--keep", keep, "--loss", "all").exit_code == 0
        stored.append(contents(place.out / "data.zarr"))
    assert stored[0] == stored[1]


def test_who_hands_over_goes_on_while_a_chunk_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over = threading.Event()

    def encoded(plan: ArrayPlan, part: np.ndarray[Any, Any]) -> bytes:
        assert handed_over.wait(LONG)
        return ENCODED(plan, part)

    monkeypatch.setattr(chunk_writer, "encoded", encoded)
    plan = planned((4, 3), "float32", 4)
    with ChunkWriter(tmp_path, durable=False, packed=False) as chunks:
        chunks.write("loss", plan, np.zeros((4, 3), "float32"), (0,))
        handed_over.set()
    assert [*contents(tmp_path)][-1] == "loss/part/tensor/c/0/0"


@pytest.mark.parametrize("columns", [3, 100_000, 2**20])
def test_what_waits_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    encoded = list[int]()

    def encoding(plan: ArrayPlan, part: np.ndarray[Any, Any]) -> bytes:
        encoded.append(part.nbytes)
        return b""

    monkeypatch.setattr(chunk_writer, "encoded", encoding)
    monkeypatch.setattr(chunk_writer, "ThreadPoolExecutor", Idle)
    plan, values = planned((40, columns), "float32", 1), np.zeros((1, columns), "float32")
    with ChunkWriter(tmp_path, durable=False, packed=False) as chunks:
        for row in range(40):
            chunks.write("loss", plan, values, (row,))
            assert (row + 1) * values.nbytes - sum(encoded) <= chunk_writer.WAITING
    assert sum(encoded) == 40 * values.nbytes


class Odd(Exception):
    """An exception that nobody else raises."""


@pytest.mark.parametrize("call", ["write", "wait", "sealed", "the end"])
def test_what_goes_wrong_in_a_thread_is_raised_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def encoding(plan: ArrayPlan, part: np.ndarray[Any, Any]) -> bytes:
        raise Odd("here")

    monkeypatch.setattr(chunk_writer, "encoded", encoding)
    monkeypatch.setattr(chunk_writer, "WAITING", 0 if call == "write" else 2**23)
    plan, reached = planned((2, 3), "float32", 1), list[str]()

    def write() -> None:
        with ChunkWriter(tmp_path, durable=False, packed=False) as chunks:
            calls: dict[str, Callable[[], object]] = {
                "write": lambda: chunks.write("loss", plan, np.zeros((1, 3), "float32"), (0,)),
                "wait": chunks.wait,
                "sealed": lambda: chunks.sealed([], tmp_path / "pack"),
                "the end": lambda: None,
            }
            for name in dict.fromkeys(("write", call)):
                reached.append(name)
                calls[name]()
            reached.append("the end")

    with pytest.raises(Odd, match="here"):
        write()
    assert reached[-1] == call
    assert contents(tmp_path) == {}


def test_what_was_not_begun_when_a_span_is_left_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is in the first chunk when the interruption comes; it ends with that."""
    begun, left = threading.Event(), threading.Event()

    def encoding(plan: ArrayPlan, part: np.ndarray[Any, Any]) -> bytes:
        begun.set()
        assert left.wait(LONG)
        return ENCODED(plan, part)

    monkeypatch.setattr(chunk_writer, "encoded", encoding)
    monkeypatch.setattr(chunk_writer, "_AT_A_TIME", 1)
    shutdown = ThreadPoolExecutor.shutdown

    def leave(threads: ThreadPoolExecutor, **options: Any) -> None:
        shutdown(threads, wait=False, **options)
        left.set()
        shutdown(threads)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", leave)
    plan, values = planned((9, 3), "float32", 1), np.zeros((9, 3), "float32")

    def interrupted() -> None:
        with ChunkWriter(tmp_path, durable=False, packed=False) as chunks:
            chunks.write("loss", plan, values, (0,))
            assert begun.wait(LONG)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path for path, data in contents(tmp_path).items() if data is not None] == [
        "loss/part/tensor/c/0/0"
    ]


@pytest.mark.parametrize("keep", ["tensors", "parameters"])
@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left", 5),
        (OSError(errno.EIO, "Input/output error"), "Input/output error", 3),
        (Odd("odd"), "Odd: odd", 3),
        (LCAError("of ours"), "of ours", 3),
    ],
    ids=["full", "input/output", "odd", "ours"],
)
def test_an_error_in_a_thread_is_that_of_its_span(
    place: Place,
    clean_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep: str,
    error: Exception,
    words: str,
    code: int,
) -> None:
    """It is raised in the last span of three; the others are there, and the run goes on."""
    raised, last = list[str](), 2

    def encoding(plan: ArrayPlan, part: np.ndarray[Any, Any]) -> bytes:
        if spans and spans[-1] == last:
            raised.append(threading.current_thread().name)
            raise error
        return ENCODED(plan, part)

    spans = list[int]()
    with monkeypatch.context() as patch:
        for span in range(3):
            before_span(patch, span, lambda span=span: spans.append(span))  # type: ignore[misc]
        patch.setattr(chunk_writer, "encoded", encoding)
        result = place.run("--keep", keep)
    assert result.exit_code == code, result.stderr
    says(result.stderr, words)
    assert raised
    assert all(name.startswith("lca-write") for name in raised)
    assert spans_of(place) == (last, 3, False)
    assert place.run().exit_code == 0
    assert spans_of(place) == (3, 3, True)


def test_chunks_leave_nothing_else_and_go_through_no_link(tmp_path: Path) -> None:
    run, plan = tmp_path / "run", planned((2, 3), "float32", 1)
    ones, twos = np.full((1, 3), 1, "float32"), np.full((1, 3), 2, "float32")
    with ChunkWriter(run, durable=True, packed=False) as chunks:
        chunks.write("loss", plan, ones, (0,))
    place = run / "loss" / plan.path / "c"
    assert [path.name for path in (place / "0").iterdir()] == ["0"]
    before = (place / "0" / "0").read_bytes()
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(LCAError, match="is a link"),
        ChunkWriter(run, durable=True, packed=False) as chunks,
    ):
        chunks.write("loss", plan, twos, (0,))
    assert (tmp_path / "elsewhere" / "0" / "0").read_bytes() == before
