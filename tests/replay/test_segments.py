"""Runs of a part of the segments: a random one, or one with gaps left out."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection

import lca_posthoc
from lca_posthoc import Recorder, findings, open_run, open_trajectory, plots, results
from lca_posthoc.errors import InputError, LCAError
from lca_posthoc.numerics.sampling import SegmentSample, scale, standard_error
from lca_posthoc.replay import prepare
from lca_posthoc.replay.events import Note
from lca_posthoc.replay.repair import repair
from tests.helpers.cli import contents, lca, refused, says, task_namespace, write_task
from tests.replay.test_replay import arrays, identical, record_training

SEGMENTS = 60
SEEDS = range(40)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of 60 segments, a task, and the run of all of them."""
    root = tmp_path_factory.mktemp("segments")
    record_training(root / "checkpoints", range(SEGMENTS + 1))
    write_task(root / "task.py")
    replayed(root, root / "whole.lca", keep="units")
    return root


@pytest.fixture(scope="module")
def dense(place: Path) -> Path:
    """A run of all segments that keeps every parameter."""
    replayed(place, place / "dense.lca", keep="parameters", losses=["train"])
    return place / "dense.lca"


def replayed(place: Path, out: Path, **options: Any) -> list[str]:
    """Run; returns the notes."""
    events: list[Any] = []
    given: dict[str, Any] = {"cluster": "inline", "losses": ["all"], "durability": "none"}
    given |= {"progress": events.append, **options}
    lca_posthoc.run(place / "checkpoints", place / "task.py", out=out, **given)
    return [event.text for event in events if isinstance(event, Note)]


def same_as_in(whole: Path, part: Path) -> None:
    """Every number of a run is that of the same segment in one of its level, but for the error of the
    precision, which is measured on the first segments of each.
    """
    runs = open_run(whole)
    for name, own in open_run(part).items():
        for table in ("steps", "tensors", "units"):
            numbers = getattr(own, table)
            others = getattr(runs[name], table).sel(step=numbers["step"])
            for variable in numbers.data_vars.keys() - {"precision_error"}:
                one, other = others[variable].values, numbers[variable].values
                assert np.array_equal(one, other, equal_nan=True), (name, table, variable)


# --- a random part --------------------------------------------------------------------------------


def test_a_random_part_has_the_bits_of_the_whole_and_costs_its_share(
    place: Path, tmp_path: Path
) -> None:
    notes = replayed(place, tmp_path / "part.lca", segments="0.1@7")
    says(" ".join(notes), "6 of 60 segments", "estimates with standard errors")
    same_as_in(place / "whole.lca", tmp_path / "part.lca")
    whole, part = open_run(place / "whole.lca")["train"], open_run(tmp_path / "part.lca")["train"]
    assert sorted(SegmentSample.parse("0.1@7").drawn(SEGMENTS)) == list(part.steps["step"].values)
    assert part.manifest.keep == "units"
    spent = [sum(one["evaluations"] for one in every.markers) for every in (part, whole)]
    assert spent[0] <= 0.15 * spent[1]
    assert list(results.verify(tmp_path / "part.lca")) == []


def test_sums_over_training_are_estimates_with_their_errors(place: Path, tmp_path: Path) -> None:
    replayed(place, tmp_path / "part.lca", segments="0.2@7")
    part = open_run(tmp_path / "part.lca")["train"]
    layers, summary = findings.layers(part), findings.summary(part)
    drawn = layers["allocated"].values
    np.testing.assert_allclose(layers["total"].values, 5 * drawn.sum(0), rtol=1e-12)
    assert (layers["segments"].values == standard_error(drawn, SEGMENTS)).all()
    assert summary["sampled_of"] == SEGMENTS
    whole = standard_error(drawn.sum(1), SEGMENTS)
    assert summary["segments_error"] == pytest.approx(whole, rel=1e-12)  # added in another order
    assert summary["allocated"] == pytest.approx(5 * drawn.sum())
    units = findings.units(part)
    assert (units["segments"].values > 0).any()
    shown = lca("summary", tmp_path / "part.lca")
    says(shown.output, "change, estimated", "± standard error", "12 segments of 60")
    whole = findings.summary(open_run(place / "whole.lca")["train"])  # of fewer than 256 examples
    assert summary["identity_change"] == pytest.approx(whole["loss_change"], rel=1e-5)
    assert (whole["sampled_of"], whole["segments_error"], whole["identity_change"]) == (None,) * 3
    everything = findings.layers(open_run(place / "whole.lca")["train"])
    assert "segments" not in everything


def test_over_forty_seeds_errors_of_a_training_are_the_spread_of_its_estimates(
    place: Path,
) -> None:
    allocated = open_run(place / "whole.lca")["train"].tensors["allocated"].values
    values = np.column_stack([allocated, allocated.sum(1)])
    drawn = [values[sorted(SegmentSample.parse(f"0.3@{seed}").drawn(SEGMENTS))] for seed in SEEDS]
    estimates = np.stack([scale(SEGMENTS, len(rows)) * rows.sum(0) for rows in drawn])
    errors = np.stack([standard_error(rows, SEGMENTS) for rows in drawn])
    spread = estimates.std(0, ddof=1)
    ratios = np.sqrt((errors**2).mean(0)) / spread
    assert (ratios > 1 / 1.5).all(), ratios
    assert (ratios < 1.5).all(), ratios
    assert (abs(estimates.mean(0) - values.sum(0)) < 3 * spread / np.sqrt(len(SEEDS))).all()


@pytest.mark.parametrize(
    "finding",
    ["helping", "oscillation", "peaks", "distribution", "microscope", "candidates", "blocks"],
)
def test_what_needs_every_segment_is_held_back_with_the_reason(
    sampled: Path, tmp_path: Path, finding: str
) -> None:
    with pytest.raises(LCAError, match=r"need every segment .*--segments 0\.5@1.*without"):
        getattr(findings, finding)(open_run(sampled)["train"])
    refused(lca("plot", sampled, finding, "-o", tmp_path / "x.png"), "need every segment")


def test_two_losses_beside_each_other_totals_and_statistics_are_held_back(sampled: Path) -> None:
    run = open_run(sampled)
    with pytest.raises(LCAError, match="need every segment"):
        findings.generalisation(run["train"], run["validation"])
    for part in ("totals", "histogram", "allocation"):
        with pytest.raises(LCAError, match="need every segment"):
            getattr(run["train"], part)


def test_figures_of_a_random_part_say_which_in_words_and_draw_its_errors(sampled: Path) -> None:
    layers = findings.layers(open_run(sampled)["train"])
    error = 2 * layers["segments"].values
    words = f"a random 50 % of the segments ({SEGMENTS // 2} of {SEGMENTS}, seed 1)"
    for quantity, axis in (("total", 0), ("cumulative", 1)):
        axes = plots.layers(layers, quantity=quantity)
        caption = axes.figure.get_supxlabel()
        says(" ".join(caption.split()), words, "two standard errors from drawing segments")
        assert "`segments`" not in caption
        drawn = [
            piece[:, axis]
            for lines in axes.collections
            if isinstance(lines, LineCollection)
            for piece in lines.get_segments()
        ]
        for total, size in zip(layers["total"].values, error, strict=True):
            assert any(np.allclose(ends, [total - size, total + size]) for ends in drawn)


def test_report_and_export_of_a_random_part_leave_out_the_rest(
    sampled: Path, tmp_path: Path
) -> None:
    assert lca("report", sampled, "-o", tmp_path / "page.html").exit_code == 0
    says((tmp_path / "page.html").read_text(), "drawn at random all over training")
    exported = lca("export", sampled, "-o", tmp_path / "tables", "--format", "csv")
    assert exported.exit_code == 0, exported.output
    says(exported.output, "--segments 0.5@1", "missing: ", "peaks", "oscillation")
    written = {path.name.partition("_")[0] for path in (tmp_path / "tables/train").iterdir()}
    assert written == {"curve.csv", "layers", "units"}


@pytest.fixture(scope="module")
def sampled(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sampled") / "run.lca"
    replayed(place, out, segments="0.5@1", span=4)
    return out


def test_a_larger_fraction_adds_and_keeps_what_is_there(place: Path, tmp_path: Path) -> None:
    out, once = tmp_path / "run.lca", tmp_path / "once.lca"
    replayed(place, out, segments="0.2@3", span=4, losses=["train"])
    before = contents(out)
    replayed(place, out, segments="0.5@3", losses=["train"])
    after = contents(out)
    numbers = [name for name in before if "/c/" in name and "/step" not in name.partition("/c/")[0]]
    kept = [*numbers, *(name for name in before if name.startswith("commits/train/"))]
    assert len(kept) > 20
    assert [name for name in kept if before[name] != after[name]] == []
    replayed(place, once, segments="0.5@3", span=4, losses=["train"])
    assert data_of(out) == data_of(once)
    replayed(place, out, losses=["validation"])  # the part that is recorded, without a word of it
    replayed(place, once, losses=["validation"])
    assert data_of(out) == data_of(once)
    same_as_in(place / "whole.lca", out)
    assert replayed(place, out, segments="0.5@3", losses=["validation"]) == []


def data_of(out: Path) -> dict[str, bytes | None]:
    return {name: data for name, data in contents(out).items() if name.startswith("data.zarr")}


def test_a_loss_left_behind_keeps_its_smaller_part(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.lca"
    replayed(place, out, segments="0.2@3", span=4)
    notes = replayed(place, out, segments="0.5@3", losses=["train"])
    says(" ".join(notes), "loss 'validation' stays as it is, over 12 of the 30 segments")
    behind = findings.layers(open_run(out)["validation"])
    assert behind.sizes["step"] == 12
    np.testing.assert_allclose(behind["total"], 5 * behind["allocated"].sum("step"), rtol=1e-12)
    same_as_in(place / "whole.lca", out)


REFUSED = {
    "another seed": ({"segments": "0.5@2"}, ["another seed than 1", "0.5@1"]),
    "a smaller fraction": (
        {"segments": "0.1@1"},
        ["0.5@1, which includes 0.1@1", "nothing to do"],
    ),
    "another level": ({"keep": "parameters"}, ["made with --keep units"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_part_than_the_recorded_one_is_refused(
    place: Path, sampled: Path, name: str
) -> None:
    options, words = REFUSED[name]
    with pytest.raises(InputError) as refusal:
        replayed(place, sampled, **options)
    says(str(refusal.value), *words, "--out")


def test_a_part_of_a_run_of_all_segments_and_statistics_of_a_part_are_refused(
    place: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="made with all segments"):
        replayed(place, place / "whole.lca", segments="0.1@7")
    with pytest.raises(
        InputError, match=r"--keep statistics needs every segment.*tensors or units"
    ):
        replayed(place, tmp_path / "run.lca", segments="0.1@7", keep="statistics")


def test_a_random_part_stays_one_of_the_checkpoints_it_was_drawn_from(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(place / "task.py", tmp_path)
    files = sorted((place / "checkpoints").glob("*.safetensors"))
    for file in files[:41]:
        shutil.copy(file, tmp_path / "checkpoints")
    out = tmp_path / "run.lca"
    replayed(tmp_path, out, segments="0.2@3")
    before = data_of(out)
    for file in files[41:]:
        shutil.copy(file, tmp_path / "checkpoints")
    says(" ".join(replayed(tmp_path, out)), "20 checkpoints after step 40 are not used")
    assert data_of(out) == before
    replayed(tmp_path, out, segments="0.4@3")
    assert open_run(out)["train"].steps["step_end"].max() <= 40
    assert list(results.verify(out)) == []


KILLED = """
import os, signal, sys
import lca_posthoc
from lca_posthoc.replay.events import SpanDone

def kill(event):
    if isinstance(event, SpanDone) and event.span == 2:
        os.kill(os.getpid(), signal.SIGKILL)

place, out = sys.argv[1:]
lca_posthoc.run(f"{place}/checkpoints", f"{place}/task.py", out=out, losses=["all"], span=4,
                segments="0.5@1", cluster="inline", progress=kill)
"""


def test_killed_and_damaged_it_comes_to_the_same_bytes_also_on_several_workers(
    place: Path, sampled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.lca"
    driver = subprocess.run([sys.executable, "-c", KILLED, str(place), str(out)], check=False)
    assert driver.returncode == -signal.SIGKILL
    assert 0 < open_run(out)["train"].progress()["segments_done"] < 30
    estimate = findings.summary(open_run(out)["train"])  # of those that are there
    assert estimate["segments"] == 12
    replayed(place, out)
    assert data_of(out) == data_of(sampled)
    files = (out / "data.zarr/train/tensors/allocated/c/3").rglob("*")
    chunk = next(path for path in files if path.is_file())
    chunk.write_bytes(b"\0" * 10)
    assert list(results.verify(out)) != []
    repair(out, place / "task.py", cluster="inline")
    assert data_of(out) == data_of(sampled)
    several = tmp_path / "several.lca"
    replayed(place, several, segments="0.5@1", span=4, cluster="local", workers=2)
    assert data_of(several) == data_of(sampled)


# --- gaps left out --------------------------------------------------------------------------------

RANGES = "0:6,9:10,20:33,50:59"


def turns_of(values: np.ndarray, stretches: list[slice]) -> np.ndarray:
    """Changes of sign between numbers that are not zero with only zeros between them, (…)."""
    turns = np.zeros(values.shape[1:], dtype=int)
    for rows in stretches:
        for place in np.ndindex(values.shape[1:]):
            signs = [sign for sign in np.sign(values[(rows, *place)]) if sign]
            turns[place] += sum(one != other for one, other in itertools.pairwise(signs))
    return turns


@pytest.mark.parametrize(("span", "windows"), [(4, 2), (8, 64), (32, 64), (1, 3)])
def test_gaps_are_left_out_and_nothing_turns_across_them(
    place: Path,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    span: int,
    windows: int,
) -> None:
    monkeypatch.setattr(prepare._Match, "room_for_windows", windows)
    out = tmp_path / "part.lca"
    notes = replayed(place, out, steps=RANGES, span=span, keep="parameters", losses=["train"])
    says(" ".join(notes), "3 gaps between checkpoints are skipped", "33→50", "29 of 59 training")
    same_as_in(dense, out)
    part = open_run(out)["train"]
    ends = list(zip(part.steps["step"].values, part.steps["step_end"].values, strict=True))
    assert all(end - start == 1 for start, end in ends)
    assert part.progress()["steps_done"] == [[0, 6], [9, 10], [20, 33], [50, 59]]
    borders = [0, 6, 7, 20, 29]
    stretches = [slice(low, high) for low, high in itertools.pairwise(borders)]
    for name, allocation in part.allocation.items():
        totals = part.totals[name].sel(total="allocation_turns").values
        assert (totals == turns_of(allocation.values, stretches)).all()
        several = turns_of(allocation.values, [slice(0, 29)])
        assert (totals <= several).all()
    assert list(results.verify(out)) == []


def test_turns_across_gaps_would_be_more(dense: Path) -> None:
    """The test above can fail: to count across gaps gives other numbers."""
    whole = open_run(dense)["train"].allocation
    rows = np.r_[0:6, 9:10, 20:33, 50:59]
    stretches = [slice(0, 6), slice(6, 7), slice(7, 20), slice(20, 29)]
    values = whole["hidden.weight"].values[rows]
    assert turns_of(values, stretches).sum() < turns_of(values, [slice(0, 29)]).sum()


def test_several_ranges_grow_as_one_does(place: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(place / "task.py", tmp_path)
    files = sorted((place / "checkpoints").glob("*.safetensors"))
    options: dict[str, Any] = {"steps": "0:5,20:", "span": 4, "keep": "parameters"}
    options["losses"] = ["train"]
    for last in (24, 33, 60):
        for file in files[: last + 1]:
            shutil.copy(file, tmp_path / "checkpoints")
        replayed(tmp_path, tmp_path / "grown.lca", **options)
    replayed(tmp_path, tmp_path / "once.lca", **options)
    identical(arrays(tmp_path / "grown.lca"), arrays(tmp_path / "once.lca"))


def test_ranges_of_single_checkpoints_have_no_segment_and_are_refused(
    place: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"no segment joins any two of the 2 checkpoints"):
        replayed(place, tmp_path / "run.lca", steps="0:0,9:9")


# --- bursts ---------------------------------------------------------------------------------------


def test_bursts_are_recorded_and_replayed_without_the_gaps_between_them(tmp_path: Path) -> None:
    made = task_namespace()
    model = made["Net"]()
    with Recorder(tmp_path / "checkpoints", model, bursts=(10, 3)) as recorder:
        for step in range(25):
            recorder.save(step)
            for parameter in model.parameters():
                parameter.data += 0.01 * (step % 7 - 2)
    trajectory = open_trajectory(tmp_path / "checkpoints")
    assert trajectory.steps == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert trajectory.breaks == {2, 5}
    assert not any("longer than one step" in note for note in trajectory.notes)
    write_task(tmp_path / "task.py")
    notes = replayed(tmp_path, tmp_path / "run.lca")
    says(" ".join(notes), "2 gaps", "sees 6 of 22 training steps (27.3%)")
    run = open_run(tmp_path / "run.lca")["train"]
    assert list(run.steps["step"].values) == [0, 1, 10, 11, 20, 21]
    assert findings.summary(run)["segments"] == 6
    summary = lca("summary", tmp_path / "run.lca").output
    says(summary, "6 of 22 training steps", "loss change, over the segments replayed")
    says(summary, "loss change in the gaps, not replayed")
    figures = findings.summary(run)
    ends = run.steps["loss_end"].values[[1, 3]], run.steps["loss_start"].values[[2, 4]]
    assert figures["gaps"] == 2
    assert figures["gaps_change"] == pytest.approx(float((ends[1] - ends[0]).sum()), abs=1e-12)
    replayed(tmp_path, tmp_path / "part.lca", segments="0.5@1")
    part = lca("summary", tmp_path / "part.lca").output
    says(part, "without the gaps, estimated", "change over all of training with its gaps")
    assert findings.summary(open_run(tmp_path / "part.lca")["train"])["gaps_change"] is None
    listed = open_trajectory(tmp_path / "checkpoints", steps="0,10,20")  # asked for
    assert listed.breaks == frozenset()


# --steps, and the segments it gives of bursts of four every ten steps
THINNED = {
    "every second": ("::2", [(0, 2), (10, 12), (20, 22)]),
    "every third, of which a burst has one or two": ("::3", [(0, 3)]),
    "one of each": ("::4", [(0, 10), (10, 20)]),
    "ranges": ("0:1,10:11", [(0, 1), (10, 11)]),
    "a single step beside a range": ("3,10:11", [(3, 10), (10, 11)]),
}


@pytest.mark.parametrize("case", THINNED)
def test_gaps_between_thinned_bursts_stay_unless_one_of_each_is_chosen(
    tmp_path: Path, case: str
) -> None:
    steps, segments = THINNED[case]
    with Recorder(tmp_path, task_namespace()["Net"](), bursts=(10, 4)) as recorder:
        for step in range(25):
            recorder.save(step)
    chosen = open_trajectory(tmp_path, steps=steps, compare=False)
    ends = [(chosen.steps[start], chosen.steps[start + 1]) for start in chosen.starts]
    assert ends == segments
    across = any(before // 10 != after // 10 for before, after in ends)
    assert any("longer than one step" in note for note in chosen.notes) is across


@pytest.mark.parametrize("bursts", [(10,), (10, 1), (10, 10), (0, 2), "10:3", (10, 2.5)])
def test_bursts_without_a_segment_or_a_gap_are_refused(tmp_path: Path, bursts: Any) -> None:
    with pytest.raises(InputError, match=r"give \(every, length\), such as \(100, 8\)"):
        Recorder(tmp_path / "checkpoints", task_namespace()["Net"](), bursts=bursts)


def test_bursts_and_every_exclude_each_other_and_space_is_reckoned_with(tmp_path: Path) -> None:
    model = task_namespace()["Net"]()
    with pytest.raises(InputError, match="one of the two"):
        Recorder(tmp_path / "checkpoints", model, bursts=(10, 3), every=2)
    recorder = Recorder(tmp_path / "checkpoints", model, bursts=(10, 3))
    wanted = [step for step in range(60) if recorder._is_wanted(step)]
    assert [recorder._wanted_up_to(step) for step in range(60)] == [
        sum(one <= step for one in wanted) for step in range(60)
    ]
