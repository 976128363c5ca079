"""Spans computed in shards of their data: the numbers of whole spans, the bytes of one process,
whoever computes what and however often it is stopped.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lca_posthoc
from lca_posthoc import Run, open_run, results
from lca_posthoc.base.text import count
from lca_posthoc.cluster import Spec
from lca_posthoc.errors import SpanError
from lca_posthoc.findings import summary
from lca_posthoc.numerics.objective import Objective
from lca_posthoc.replay import pending_spans
from lca_posthoc.replay.events import Note, SpanFailed, silent
from lca_posthoc.replay.plan import plan
from lca_posthoc.replay.shards import choose_shards
from lca_posthoc.replay.worker import replay_in_shards
from tests.helpers.cli import contents, lca, marker, record, refused, step_file, write_task

BATCH, SHARDS = 4, 5  # of 30 examples: eight batches, the last one smaller; of 10: three
WITH_TERM = (
    'Loss(F.cross_entropy, on="validation")',
    'Loss(F.cross_entropy, on="validation"),\n            "l2": Loss(l2=0.1)',
)


UNDISTURBED: list[Spec] = []  # the requests of a run that nothing stopped


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, a task with a term of the parameters, and its run in shards."""
    place = tmp_path_factory.mktemp("shards")
    record(place / "ck")
    write_task(place / "task.py", *WITH_TERM)
    with pytest.MonkeyPatch.context() as patched:
        UNDISTURBED[:] = []
        counting(patched, into=UNDISTURBED)
        replayed(place, "shards.lca")
    return place


def replayed(place: Path, name: str, **options: Any) -> Run:
    given = {
        "losses": ["all"],
        "keep": "units",
        "batch_size": BATCH,
        "shards": SHARDS,
        "tolerance": 1e-6,
        "cluster": "inline",
        "progress": silent,
        **options,
    }
    return lca_posthoc.run(place / "ck", place / "task.py", out=place / name, **given)


def stored(run: Path) -> dict[str, bytes | None]:
    return contents(run / "data.zarr")


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "norm_stats", "keep", "path_band"),
    [
        ("simpson", "running", "tensors", "on"),
        ("simpson", "running", "units", "off"),
        ("trapezoid", "batch", "units", "off"),
        ("gauss-2", "running", "units", "on"),
        ("left", "running", "tensors", "off"),
        ("left", "running", "tensors", "on"),
    ],
)
def test_shards_give_the_numbers_of_whole_spans(
    made: Path, tmp_path: Path, rule: str, norm_stats: str, keep: str, path_band: str
) -> None:
    place = Path(shutil.copytree(made, tmp_path / "place"))
    options = {"rule": rule, "norm_stats": norm_stats, "keep": keep, "path_band": path_band}
    options |= {"precision": "float64", "tolerance": 1e-4}
    whole = replayed(place, "whole.lca", shards=1, **options)
    cut = replayed(place, "cut.lca", **options)
    assert cut.manifest.settings["shards"] == SHARDS
    for name in cut:
        kinds = ["tensors", "steps", *(["units"] if keep == "units" else [])]
        for kind in [*kinds, *(["other_path"] if path_band == "on" else [])]:
            ours, theirs = (getattr(run[name], kind) for run in (cut, whole))
            for field in ours:
                near(ours[field].values, theirs[field].values, f"{name} {kind} {field}")
        assert facts(cut, name) == facts(whole, name)


def near(ours: Any, theirs: Any, what: str) -> None:
    """Within 1e-9 of the sum of sizes, float32 numbers within their rounding; NaN where NaN is."""
    if what.endswith("residual"):  # the rest of numbers a million times as large
        assert np.abs(ours - theirs).max() <= 1e-12
    elif ours.dtype.kind == "f":
        assert (np.isnan(ours) == np.isnan(theirs)).all(), what
        far = 1e-6 if ours.dtype == np.float32 else 1e-9
        assert np.nansum(np.abs(ours - theirs)) <= far * np.nansum(np.abs(theirs)) + 1e-15, what
    else:
        assert (ours == theirs).all(), what


def facts(run: Run, loss: str) -> list[object]:
    """What the markers say of evaluations, and of tensors that no gradient reached."""
    fields = ("evaluations", "forward_passes", "batch_size", "unconverged", "silent", "hidden")
    markers = results.RunWriter.open(run.path).commits(loss).all_facts()
    return [[marker[field] for field in fields] for marker in markers]  # type: ignore[literal-required]


def test_segments_are_refined_and_stay_near_whole_spans_in_float32(
    made: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(made, tmp_path / "place"))
    whole, cut = replayed(place, "whole.lca", shards=1), open_run(made / "shards.lca")
    assert max(cut["train"].steps["level"].values) > 2
    for name in cut:
        ours, theirs = (run[name].tensors["allocated"].values for run in (cut, whole))
        assert np.abs(ours - theirs).sum() <= 1e-6 * np.abs(theirs).sum()


@pytest.mark.parametrize("rule", ["simpson", "trapezoid", "left", "midpoint", "gauss-2"])
def test_a_plan_counts_the_evaluations_of_shards(made: Path, tmp_path: Path, rule: str) -> None:
    place = Path(shutil.copytree(made, tmp_path / "place"))
    options: dict[str, Any] = {"rule": rule, "keep": "tensors", "tolerance": math.inf}
    options |= {"shards": SHARDS, "batch_size": BATCH, "losses": ["all"]}
    planned = plan(place / "ck", place / "task.py", **options)
    run = replayed(place, "run.lca", **options)
    assert run.manifest.settings["path_band"] == "on"
    assert {name: loss.evaluations for name, loss in planned.losses.items()} == {
        name: summary(run[name])["evaluations"] for name in run
    }


# --- whoever computes it --------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_in_processes_of_their_own_give_the_same_bytes(
    made: Path, tmp_path: Path, workers: int
) -> None:
    place = Path(shutil.copytree(made, tmp_path / "place"))
    replayed(place, "apart.lca", cluster="local", workers=workers)
    assert stored(place / "apart.lca") == stored(made / "shards.lca")
    assert not (place / "apart.lca" / "shards").exists()


class Stopped(Exception):
    """Ends a driver in the middle, as a kill does."""


def counting(
    monkeypatch: pytest.MonkeyPatch, most: float = math.inf, into: list[Spec] | None = None
) -> list[Spec]:
    """Requests that are computed; the one after the most of them ends the driver."""
    asked: list[Spec] = [] if into is None else into

    def compute(spec: Spec) -> Spec:
        if len(asked) >= most:
            raise Stopped
        asked.append(spec)
        return replay_in_shards(spec)

    monkeypatch.setattr(pending_spans, "replay_in_shards", compute)
    return asked


@pytest.mark.parametrize("most", [2, 9])
def test_what_was_summed_before_a_kill_is_not_computed_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    place = Path(shutil.copytree(made, tmp_path / "place"))
    before = counting(monkeypatch, most)
    with pytest.raises(Stopped):
        replayed(place, "run.lca")
    assert list(results.verify(place / "run.lca")) == []
    after = counting(monkeypatch)
    replayed(place, "run.lca")
    assert len(before) + len(after) == len(UNDISTURBED)
    assert stored(place / "run.lca") == stored(made / "shards.lca")
    assert not (place / "run.lca" / "shards").exists()


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[:-9],
    "a flipped bit": lambda data: bytes([*data[:40], data[40] ^ 1, *data[41:]]),
    "a flipped bit of a number": lambda data: bytes([*data[:-12], data[-12] ^ 1, *data[-11:]]),
    "empty": lambda data: b"",
    "short": lambda data: data[:7],
    "something else": lambda data: b"x" * 1000,
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_damaged_sums_are_as_if_they_were_not_there(
    tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    name, numbers = results.sums_name(3, "a"), np.arange(5.0)
    assert results.read_sums(tmp_path, name) is None
    results.write_sums(tmp_path, name, {"entries": []}, numbers, durable=False)
    stored = results.read_sums(tmp_path, name)
    assert stored is not None
    assert (stored[0], stored[1].tolist()) == ({"entries": []}, numbers.tolist())
    file = tmp_path / "shards" / name
    file.write_bytes(spoil(file.read_bytes()))
    assert results.read_sums(tmp_path, name) is None


def test_sums_that_were_damaged_are_computed_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(shutil.copytree(made, tmp_path / "place"))
    counting(monkeypatch, 4)
    with pytest.raises(Stopped):
        replayed(place, "run.lca")
    files = sorted((place / "run.lca" / "shards").iterdir())
    assert len(files) == 4
    files[1].write_bytes(files[1].read_bytes()[:-1])
    after = counting(monkeypatch)
    replayed(place, "run.lca")
    assert len(after) == len(UNDISTURBED) - 3
    assert stored(place / "run.lca") == stored(made / "shards.lca")


def test_sums_of_another_checkpoint_do_not_count(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that no committed number relies on may be put right, and is taken up."""
    place = Path(shutil.copytree(made, tmp_path / "place"))
    counting(monkeypatch, 3)
    with pytest.raises(Stopped):
        replayed(place, "run.lca")
    file = step_file(place / "ck", 20)
    moved = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
    save_file(moved, file, {"format": "pt", "step": "20", "every": "10"})
    counting(monkeypatch)
    replayed(place, "run.lca")
    replayed(place, "fresh.lca")
    assert stored(place / "run.lca") == stored(place / "fresh.lca")
    assert stored(place / "run.lca") != stored(made / "shards.lca")


def test_a_damaged_span_is_repaired_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(made, tmp_path / "place"))
    run = place / "shards.lca"
    (chunk, *_) = sorted((run / "data.zarr/train/units/out.bias/c/0").rglob("*"))
    chunk.write_bytes(b"")
    done = lca("repair", run, "--task", place / "task.py", "--cluster", "inline")
    assert (done.exit_code, done.stdout) == (0, "loss 'train': recomputed span 0\n")
    assert stored(run) == stored(made / "shards.lca")


def test_leftover_sums_of_committed_spans_are_named_and_swept(made: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(made, tmp_path / "place"))
    run = place / "shards.lca"
    (run / "shards").mkdir()
    (run / "shards" / results.sums_name(0, "late")).write_bytes(b"of a worker that was cut off")
    (leftover,) = results.verify(run)
    assert leftover.path == "shards/000000-late.sums"
    assert lca("repair", run, "--task", place / "task.py").exit_code == 0
    assert list(results.verify(run)) == []


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_finite_fails_its_span_once_and_no_other(
    made: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(made, tmp_path / "place"))
    tensors = load_file(step_file(place / "ck", 10))
    tensors["out.bias"][0] = math.nan
    save_file(tensors, step_file(place / "ck", 10), {"format": "pt", "step": "10", "every": "10"})
    events: list[Any] = []
    with pytest.raises(SpanError, match="1 span failed; the others are complete"):
        replayed(place, "run.lca", progress=events.append)
    (failure,) = (event for event in events if isinstance(event, SpanFailed))
    assert (failure.span, failure.not_finite) == (0, 10)
    assert open_run(place / "run.lca")["train"].progress()["missing"] == [0]


def test_memory_that_runs_out_halves_the_batch_within_a_shard(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(shutil.copytree(made, tmp_path / "place"))
    original = Objective.evaluate_parts

    def tight(objective: Objective, point: Any, parts: Any, along: Any) -> Iterator[Any]:
        splits = {objective.losses[loss].split for part in parts for loss in part} - {None}
        if any(objective.batch_sizes[split] > 2 for split in splits if split is not None):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(objective, point, parts, along)

    monkeypatch.setattr(Objective, "evaluate_parts", tight)
    run = replayed(place, "run.lca")
    summary = results.RunWriter.open(run.path).span_summary("train", 0)
    assert summary is not None
    assert summary["batch_size"] == 2
    whole = open_run(made / "shards.lca")
    for name in run:
        ours, theirs = (each[name].tensors["allocated"].values for each in (run, whole))
        assert np.abs(ours - theirs).sum() <= 1e-6 * np.abs(theirs).sum()


# --- what can be cut, and into how many -----------------------------------------------------------

GROUPS = (
    'Loss(F.cross_entropy, on="validation")',
    'Loss(F.cross_entropy, on="validation", group_by=lambda inputs, targets: targets)',
)
EXAMPLES = (GROUPS[0], 'Loss(F.cross_entropy, on="validation", per="example")')


@pytest.mark.parametrize(
    ("task", "options", "why"),
    [
        (("", ""), ("--keep", "parameters"), "--keep parameters needs the whole gradient"),
        (("", ""), ("--subset", "0.5@1"), "is over a random subset"),
        (GROUPS, ("--loss", "validation"), "loss 'validation' has groups"),
        (EXAMPLES, ("--loss", "validation"), "loss 'validation' gives results per example"),
        (("", ""), ("--norm-stats", "recalibrated"), "at every checkpoint"),
        (("", ""), ("--shards", "none"), "must be auto, or a number from 1 on"),
    ],
)
def test_a_number_of_shards_that_cannot_be_had_is_refused(
    made: Path, tmp_path: Path, task: tuple[str, str], options: tuple[str, ...], why: str
) -> None:
    write_task(tmp_path / "task.py", *task)
    given = ("--task", tmp_path / "task.py", "--out", tmp_path / "run.lca", "--cluster", "inline")
    result = lca("run", made / "ck", *given, "--keep", "tensors", "--shards", 3, *options)
    refused(result, why)
    assert not (tmp_path / "run.lca").exists()


def test_a_loss_added_later_that_cannot_be_cut_is_replayed_whole_and_that_is_said(
    made: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(made, tmp_path / "place"))
    write_task(place / "task.py", *GROUPS)
    replayed(place, "run.lca", losses=["train"])
    events: list[Any] = []
    run = replayed(place, "run.lca", losses=["validation"], shards=None, progress=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("'validation' are replayed whole, not in shards" in note for note in notes), notes
    assert run["validation"].progress()["complete"]
    assert marker(run.path, "validation", 0).exists()


@pytest.mark.parametrize(
    ("segments", "workers", "examples", "shards"),
    [(10, 1, 4096, 1), (10, 16, 4096, 16), (10, 16, 40, 10), (63, 16, 4096, 16), (64, 16, 4096, 1)],
)
def test_shards_are_one_for_each_worker_where_segments_are_few(
    made: Path, segments: int, workers: int, examples: int, shards: int
) -> None:
    manifest = open_run(made / "shards.lca").manifest
    losses = {
        name: replace(record, examples=examples) if record.on else record
        for name, record in manifest.losses.items()
    }
    assert choose_shards(segments, workers, losses, manifest.settings, "units") == shards
    assert choose_shards(segments, workers, losses, manifest.settings, "statistics") == 1


@pytest.mark.parametrize(("batch_size", "batches"), [(30, "1 batch"), (15, "2 batches")])
def test_fewer_shards_than_asked_for_are_said_with_the_reason(
    made: Path, batch_size: int, batches: str
) -> None:
    options: dict[str, Any] = {"losses": ["train"], "keep": "tensors", "batch_size": batch_size}
    planned = plan(made / "ck", made / "task.py", shards=3, **options)
    (note,) = (note for note in planned.notes if "shard" in note)
    assert f"cut into {count(planned.shards, 'shard')}, not the 3 of --shards" in note
    assert f"it has {batches} and a shard takes at least one" in note
    assert planned.shards == int(batches[0])


def test_a_plan_says_the_shards_a_run_would_choose(made: Path) -> None:
    options: dict[str, Any] = {"workers": 8, "batch_size": BATCH, "losses": ["train"]}
    cut = plan(made / "ck", made / "task.py", keep="tensors", **options)
    assert cut.shards == 8
    assert any("cut into 8 shards" in note for note in cut.notes)
    assert not any("busy" in note and "at most" in note for note in cut.notes)
    whole = plan(made / "ck", made / "task.py", keep="parameters", **options)
    assert whole.shards == 1
    assert any("not cut into shards" in note for note in whole.notes)
