"""Damage is found, named and undone; what is no damage is not called so."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

import lca_posthoc
from lca_posthoc import open_run, results
from lca_posthoc.cluster import broadcast
from lca_posthoc.errors import LCAError, SpanError
from lca_posthoc.numerics.schema import TOTAL_FIELDS
from lca_posthoc.replay.events import SpanDone
from lca_posthoc.results import Damage, Leftover, RunWriter, lock, read_manifest, verify
from lca_posthoc.results.layout import plan_arrays
from lca_posthoc.results.metadata import metadata_files
from lca_posthoc.tasks.task import pack_task
from tests.helpers.cli import contents, document, lca, marker, record, refused, run_lca, write_task
from tests.helpers.faults.store import DAMAGES

STRINGS = (
    'Loss(F.cross_entropy, on="train")',
    'Loss(F.cross_entropy, on="train", group_by=lambda x, y: ["ä", "b"] * 15)',
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six spans in windows of two, one loss with groups and one without."""
    return made_in(tmp_path_factory.mktemp("verify"), every=10)


def made_in(root: Path, every: int) -> Path:
    """Replay checkpoints of every so many steps."""
    record(root / "ck", range(0, 7 * every, every))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lca_posthoc.replay.prepare._Match.room_for_windows", 3)
        task = write_task(root / "task.py", *STRINGS)
        lca_posthoc.run(
            root / "ck", task, losses=["all"], cluster="inline", span=1, out=root / "run.lca"
        )
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def run(place: Path) -> Path:
    return place / "run.lca"


def found(run: Path) -> list[Damage | Leftover]:
    return list(verify(run))


def replayed(place: Path) -> list[tuple[str, int]]:
    events: list[Any] = []
    where = {
        "losses": ["all"],
        "cluster": "inline",
        "out": place / "run.lca",
        "progress": events.append,
    }
    lca_posthoc.run(place / "ck", place / "task.py", **where)
    return [
        (loss, event.span)
        for event in events
        if isinstance(event, SpanDone)
        for loss in event.losses
    ]


def same_data(run: Path, made: Path) -> bool:
    return contents(run / "data.zarr") == contents(made / "run.lca" / "data.zarr")


def test_a_whole_run_is_whole_wherever_it_is(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    checked = verify(run)
    assert list(checked) == []
    held = [
        path for path in run.rglob("*") if path.is_file() and path.name not in ("lock", "run.jsonl")
    ]
    assert (checked.files, checked.bytes) == (len(held), sum(path.stat().st_size for path in held))
    result = lca("verify", run.rename(tmp_path / "elsewhere"))
    assert (result.exit_code, result.stdout.endswith(": whole\n"), result.stderr) == (0, True, "")
    assert contents(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("how", DAMAGES)
def test_any_damaged_file_is_found_and_undone(place: Path, run: Path, made: Path, how: str) -> None:
    """One file of every kind: chunks, totals, waiting totals, markers, metadata, coordinates."""
    files = {
        "chunk": "data.zarr/train/allocation/hidden.weight/c/2/0/0/0",
        "totals": "data.zarr/validation/totals/out.bias/c/1/0/0",
        "marker": marker(run, "validation", 3).relative_to(run).as_posix(),
        "window marker": "commits/validation/window-000001-2.json",
        "array": "data.zarr/train/steps/residual/zarr.json",
        "group": "data.zarr/validation/zarr.json",
        "root": "data.zarr/zarr.json",
        "labels": "data.zarr/train/steps/group/c/0",
        "steps": "data.zarr/validation/steps/step/c/0",
    }
    for kind, path in files.items():
        DAMAGES[how](run / path)
        listed = [each for each in found(run) if isinstance(each, Damage)]
        # what has no marker is not there: nothing is damaged
        gone = how == "deleted" and "marker" in kind
        unfolded = [f"partial/validation/00000{span}-0-1" for span in (2, 3)]
        expected = unfolded if kind == "window marker" and how in ("deleted", "empty") else []
        assert [each.path for each in listed] == expected + ([] if gone else [path]), kind
        writer = RunWriter.open(run)
        writer.discard(listed)
        writer.restore_metadata()
        again = replayed(place)
        assert again == {
            "chunk": [("train", 2)],
            "totals": [("validation", 2), ("validation", 3)],
            "marker": [("validation", 3)],
            "window marker": [("validation", 2), ("validation", 3)],
        }.get(kind, []), kind
        assert same_data(run, made), kind
        assert found(run) == [], kind


def test_waiting_totals_that_are_damaged_are_never_folded(
    place: Path, run: Path, made: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunWriter, "fold", lambda *_: [])
        RunWriter.open(run).discard([Damage(path="", what="", loss="train", window=0)])
        assert replayed(place) == [("train", 0), ("train", 1)]
    waiting = run / "partial" / "train" / "000001-0-1"
    data = bytearray(waiting.read_bytes())
    data[-1] ^= 1
    waiting.write_bytes(data)
    (damage,) = [each for each in found(run) if isinstance(each, Damage)]
    assert (damage.span, damage.path, damage.array) == (
        1,
        waiting.relative_to(run).as_posix(),
        "totals",
    )
    assert RunWriter.open(run).fold_all("train") == [1]
    assert replayed(place) == [("train", 1)]
    assert same_data(run, made)
    assert found(run) == []


def test_totals_that_were_folded_do_not_wait_again(place: Path, run: Path) -> None:
    marker(run, "train", 1).unlink()
    assert replayed(place) == [("train", 1)]
    assert list(run.glob("partial/*/*")) == []


def test_swapped_chunks_and_markers_are_found(run: Path) -> None:
    one, other = (run / f"data.zarr/train/steps/residual/c/{span}/0" for span in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    assert first != second
    one.write_bytes(second)
    other.write_bytes(first)
    assert [each.span for each in found(run) if isinstance(each, Damage)] == [0, 1]
    with pytest.raises(
        LCAError,
        match=r"steps/residual, span [01] \(steps .*\): a chunk differs "
        r"from the committed one",
    ):
        _ = open_run(run)["train"].steps
    shutil.copy(marker(run, "train", 4), marker(run, "train", 5))
    (damage,) = [each for each in found(run) if isinstance(each, Damage) and each.span == 5]
    assert damage.what == "its commit marker is that of another span"


def test_a_marker_of_another_run_is_not_taken(run: Path, place: Path) -> None:
    lca_posthoc.run(
        place / "ck",
        place / "task.py",
        losses=["all"],
        cluster="inline",
        span=1,
        out=place / "other.lca",
    )
    shutil.copy(marker(place / "other.lca", "train", 0), marker(run, "train", 0))
    (damage,) = found(run)
    assert isinstance(damage, Damage)
    assert damage.what == "its commit marker is that of another run"


def test_links_are_damage_and_nothing_is_written_through_them(
    place: Path, run: Path, tmp_path: Path
) -> None:
    chunk = run / "data.zarr/train/steps/residual/c/1/0"
    shutil.move(chunk, tmp_path / "chunk")
    chunk.symlink_to(tmp_path / "chunk")
    (damage,) = found(run)
    assert isinstance(damage, Damage)
    assert (damage.span, damage.what) == (1, "it is a link")
    RunWriter.open(run).discard([damage])
    before = (tmp_path / "chunk").read_bytes()
    (tmp_path / "chunk").write_bytes(b"mine")
    assert replayed(place) == [("train", 1)]
    assert ((tmp_path / "chunk").read_bytes(), chunk.is_symlink(), chunk.read_bytes()) == (
        b"mine",
        False,
        before,
    )


@pytest.mark.parametrize(
    "directory", ["commits", "partial/train", "data.zarr", "data.zarr/train/steps/level", "lock"]
)
def test_a_run_with_a_link_inside_is_not_written_to(
    place: Path, run: Path, tmp_path: Path, directory: str
) -> None:
    marker(run, "train", 1).unlink()
    shutil.move(run / directory, tmp_path / "outside")
    (run / directory).symlink_to(tmp_path / "outside")
    before = contents(tmp_path / "outside")
    result = run_lca(place / "ck", place / "task.py", run, "--loss", "all")
    refused(result, directory, "is a link", code=1)
    assert contents(tmp_path / "outside") == before


def test_a_chunk_row_behind_a_link_is_not_written_to(
    place: Path, run: Path, tmp_path: Path
) -> None:
    row = run / "data.zarr/train/steps/residual/c/1"
    marker(run, "train", 1).unlink()
    shutil.move(row, tmp_path / "outside")
    row.symlink_to(tmp_path / "outside")
    before = contents(tmp_path / "outside")
    result = run_lca(place / "ck", place / "task.py", run, "--loss", "all")
    assert (result.exit_code, "is a link" in result.stderr) == (3, True)
    assert contents(tmp_path / "outside") == before


def test_a_run_may_itself_be_a_link(place: Path, run: Path, made: Path) -> None:
    run.rename(place / "really.lca")
    run.symlink_to(place / "really.lca")
    marker(run, "train", 1).unlink()
    assert replayed(place) == [("train", 1)]
    assert same_data(run, made)


def test_leftovers_are_told_apart_from_damage(run: Path) -> None:
    marker(run, "train", 1).unlink()
    own = (path.as_posix() for path in run.glob("data.zarr/train/**/c/**/*") if path.is_file())
    totals = re.compile(rf"/({'|'.join(TOTAL_FIELDS)})/")
    chunks = sum(
        re.search(r"/c/1(/|$)", path) is not None and not totals.search(path) for path in own
    )
    (run / "data.zarr" / "train" / "mine.txt").write_text("mine")
    (run / "data.zarr" / "train" / "steps" / "residual" / "c" / "07").mkdir()
    (run / "data.zarr" / "train" / "steps" / "residual" / "c" / "07" / "0").write_bytes(b"")
    listed = found(run)
    assert all(isinstance(each, Leftover) for each in listed)
    assert len(listed) == chunks + 2
    result = lca("verify", run)
    assert (result.exit_code, "belong to nothing that is committed" in result.stderr) == (0, True)
    assert len(document(lca("verify", run, "--json"))["leftovers"]) == chunks + 2


@pytest.mark.parametrize(
    "hostile",
    [
        lambda file: _edit(file, shape=[2**40, 2]),
        lambda file: _edit(file, fill_value=0),
        lambda file: _edit(file, data_type="float32"),
        lambda file: _edit(file, codecs=[{"name": "numcodecs.pickle", "configuration": {}}]),
        lambda file: _edit(file, dimension_names=["step", "other"]),
        lambda file: (
            file.unlink(),
            (file.parent / ".zarray").write_text(
                '{"zarr_format": 2, "filters": [{"id": "pickle"}]}'
            ),
        ),
        lambda file: file.write_text("[" * 10**6),
    ],
    ids=["shape", "fill", "dtype", "pickle", "names", "zarr 2", "nested"],
)
def test_metadata_other_than_planned_is_refused_before_anything_is_read(
    run: Path, hostile: Callable[[Path], object]
) -> None:
    hostile(run / "data.zarr/train/steps/residual/zarr.json")
    with pytest.raises(LCAError, match=r"steps/residual/zarr.json.*lca repair"):
        _ = open_run(run)["train"].steps
    refused(lca("summary", run), "steps/residual/zarr.json", "lca repair", code=1)
    assert lca("verify", run).exit_code == 4


def _edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_metadata_is_what_zarr_itself_would_write(run: Path, tmp_path: Path) -> None:
    """The documents, against those of zarr for arrays of the same kind."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    manifest = read_manifest(run)
    written = dict(metadata_files(manifest, "train"))
    group = zarr.create_group(tmp_path / "zarr", zarr_format=3)
    for plan in plan_arrays(manifest, "parameters", manifest.losses["train"]):
        group.create_array(
            plan.path,
            shape=plan.shape,
            chunks=plan.chunks,
            dtype=plan.dtype,
            fill_value=plan.fill,
            compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
            dimension_names=plan.dims,
            attributes=plan.attributes,
        )
        theirs = json.loads((tmp_path / "zarr" / plan.path / "zarr.json").read_text())
        assert json.loads(written[f"{plan.path}/zarr.json"]) == theirs
    tree = xr.open_datatree(run / "data.zarr", engine="zarr", consolidated=False)
    assert tree["train/histogram"].group.values.tolist() == ["b", "ä"]
    assert tree["train/histogram"].step.values.tolist() == manifest.steps
    np.testing.assert_array_equal(
        tree["train/histogram"].edge.values, results.metadata.histogram_edges()
    )


def test_verifying_while_a_run_goes_on_finds_nothing(place: Path, run: Path) -> None:
    """Between any two files that are looked at a span is taken back and committed again."""
    specs: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        from lca_posthoc.replay.worker import replay_span

        marker(run, "train", 0).unlink()
        patch.setattr(
            "lca_posthoc.replay.pending_spans.replay_span",
            lambda spec: specs.append(spec) or replay_span(spec),
        )
        replayed(place)
    broadcast.take_in(specs[0]["setup"]["parcel"], pack_task(place / "task.py")[1])
    checking, seen = results.verify(run), 0
    original = type(checking)._not_plain

    def meanwhile(self: Any, path: str) -> str | None:
        nonlocal seen
        seen += 1
        if seen % 40 == 0:
            marker(run, "train", 0).unlink()
            assert "error" not in replay_span(specs[0])
        return original(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(checking), "_not_plain", meanwhile)
        assert [each for each in checking if isinstance(each, Damage)] == []
    assert seen > 200


@pytest.mark.parametrize(("every", "whole"), [(1, 6), (10, 5)])
def test_a_run_that_is_just_growing_can_be_read_and_is_whole(
    tmp_path: Path, every: int, whole: int
) -> None:
    """The driver was killed after it wrote longer metadata, and before run.json. The last of several
    long segments has a neighbour to come, by which another path bends: its span is to be replayed.
    """
    run = made_in(tmp_path, every) / "run.lca"
    before, writer = open_run(run)["train"].steps, RunWriter.open(run)
    more = [*writer.manifest.checkpoints, replace(writer.manifest.checkpoints[-1], step=7 * every)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results.writer, "write_manifest", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            writer.take_up(
                replace(writer.manifest, checkpoints=more, starts=[*range(len(more) - 1)]),
                {name: record.identity for name, record in writer.manifest.losses.items()},
            )
    assert json.loads((run / "data.zarr/train/steps/level/zarr.json").read_text())["shape"][0] == 7
    (run / "lock").write_text('{"host": "here"}')
    left = found(run)
    assert [one for one in left if not (isinstance(one, Leftover) and "/c/5" in one.path)] == []
    assert bool(left) == (whole < 6)
    xr.testing.assert_identical(open_run(run)["train"].steps, before.isel(step=slice(whole)))
    (run / "lock").write_text("")
    assert len(found(run)) > 20


def raising(error: type[BaseException]) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise error

    return call


# --- late workers, the lock, what is kept of run.json ---------------------------------------------


def test_a_late_worker_commits_nothing_that_has_changed_meanwhile(run: Path) -> None:
    before, late = contents(run), RunWriter.open(run)
    statistics: Any = None
    changes: list[Callable[[Any], Any]] = [
        lambda now: now.grown_to(
            replace(now, checkpoints=now.checkpoints[:-1], starts=now.starts[:-1]),
            {name: each.identity for name, each in now.losses.items()},
        ),
        lambda now: now.without("train"),
        lambda now: results.Manifest(**{**now.__dict__, "id": "0" * 32}),
    ]
    for change in changes:
        results.writer.write_manifest(change(late.manifest), run)
        for write in (late.write_block, lambda *given: late.write_span(*given[:-1], {}, given[-1])):
            with (
                pytest.raises(SpanError, match=r"span 5 .*is not committed"),
                late.chunks() as chunks,
            ):
                write("train", 5, statistics, chunks)
        results.writer.write_manifest(late.manifest, run)
    assert contents(run) == before


def test_a_marker_of_a_shorter_span_is_not_one_of_the_whole(run: Path) -> None:
    whole = marker(run, "train", 5)
    whole.rename(whole.with_name("000005-0.json"))
    assert RunWriter.open(run).pending("train") == [5]
    assert RunWriter.open(run).span_summary("train", 5) is None
    summary = RunWriter.open(run).span_summary("train", 4)
    assert summary is not None
    assert summary["steps"] == [40]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_HEARTBEAT", 0.01)


@pytest.mark.usefixtures("quick")
def test_a_driver_whose_lock_was_taken_over_is_told_and_leaves_it_alone(run: Path) -> None:
    theirs = '{"host": "elsewhere", "pid": 1}'
    with results.hold(run) as held:
        assert not held.unclean
        assert not held.lost.is_set()
        (run / "lock").write_text(theirs)
        assert held.lost.wait(30)
    assert (run / "lock").read_text() == theirs


def test_a_driver_that_was_killed_leaves_the_lock_unclean(run: Path) -> None:
    (run / "lock").write_text(json.dumps({"host": os.uname().nodename, "pid": 1}))
    with results.hold(run) as held:
        assert held.unclean
    with results.hold(run) as held:
        assert held.unclean  # nobody has swept it
        held.unclean = False
    with results.hold(run) as held:
        assert not held.unclean


def test_run_json_is_parsed_once_until_it_changes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(run / "run.json", (0, 0))
    first = read_manifest(run)
    assert read_manifest(run) is first
    RunWriter.open(run).note({"task": "another"})
    assert read_manifest(run).provenance["task"] == "another"


@pytest.mark.parametrize("name", ["run.json", "marker"])
def test_a_flipped_digit_is_never_another_number(run: Path, name: str) -> None:
    file = run / "run.json" if name == "run.json" else marker(run, "train", 2)
    text = file.read_text()
    digits = [at for at, letter in enumerate(text) if letter.isdigit()]
    for at in digits[:: max(1, len(digits) // 60)]:
        changed = f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}"
        with contextlib.suppress(ValueError):
            if json.loads(changed) == json.loads(text):  # the seventeenth digit of a float
                continue
        file.write_text(changed)
        with pytest.raises(LCAError):
            _ = open_run(run)["train"].markers
    file.write_text(text)
    assert open_run(run)["train"].markers


def test_nothing_is_flushed_without_durability(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    manifest = read_manifest(run)
    results.create(tmp_path / "not.lca", manifest, durable=False)
    assert flushed == []
    results.create(tmp_path / "durable.lca", manifest)
    assert len(flushed) > 100
    for name in ("not.lca", "durable.lca"):
        assert list(verify(tmp_path / name)) == []
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "run.json",
            "data.zarr",
            "commits",
            "partial",
            "log",
        }


def test_a_power_cut_takes_neither_the_place_of_a_run_nor_the_word_that_it_was_at_work(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda number: flushed.append(os.readlink(f"/proc/self/fd/{number}"))
    )
    path = tmp_path / "new" / "durable.lca"
    results.create(path, read_manifest(run))
    assert {str(tmp_path), str(path.parent)} <= {*flushed}
    flushed.clear()
    with lock.hold(path):
        assert flushed == [str(path / "lock"), str(path)]
    flushed.clear()
    with lock.hold(path, durable=False):
        pass
    assert flushed == []


def test_many_readers_at_once_read_the_same(run: Path) -> None:
    allocation = open_run(run)["validation"].allocation["hidden.weight"]
    expected, different = allocation.values, list[int]()

    def read(at: int) -> None:
        if not np.array_equal(
            open_run(run)["validation"].allocation["hidden.weight"].values, expected
        ):
            different.append(at)

    threads = [threading.Thread(target=read, args=(at,)) for at in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert different == []
