"""A replay that follows a training, and removes what it has done with: nothing it still needs, and
never a number.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lca_posthoc
from lca_posthoc import Recorder, open_run, results
from lca_posthoc.checkpoints.recorded import (
    RecorderSign,
    read_release,
    read_sign,
    steps_there,
    write_sign,
)
from lca_posthoc.errors import InputError, Interrupted, LCAError, ResourceError
from lca_posthoc.recording.writer import Writer
from lca_posthoc.replay import pending_spans
from lca_posthoc.replay.display import Display
from lca_posthoc.replay.events import Following, Note, Planned, SpanDone, Stage
from lca_posthoc.replay.follow import Follower
from lca_posthoc.replay.repair import repair
from lca_posthoc.replay.shards import is_cut
from lca_posthoc.replay.stopping import Stop
from tests.helpers.cli import contents, lca, says, task_namespace, write_task
from tests.helpers.faults import clean_runs
from tests.helpers.followed_training import train
from tests.helpers.json_schemas import faults
from tests.helpers.numbered_training import become, network

STEPS, SPAN = 7, 2
CAUSES: dict[str, Any] = {"causes": True, "signal": "train"}


class Place:
    """A directory of iterates and a task of two losses."""

    def __init__(self, root: Path) -> None:
        self.root, self.iterates, self.out = root, root / "checkpoints", root / "run.lca"
        self.task = write_task(root / "small_task.py")
        self.events: list[Any] = []

    def replay(self, **options: Any) -> None:
        given = {"losses": ["all"], "out": self.out, "cluster": "inline", **options}
        given = {"tolerance": float("inf"), "span": SPAN, "progress": self.events.append, **given}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lca_posthoc.errors.LCAWarning)
            lca_posthoc.run(given.pop("checkpoints", self.iterates), self.task, **given)

    def notes(self) -> str:
        return " ".join(event.text for event in self.events if isinstance(event, Note))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Iterates with moments, and plain runs over them, with causes and without."""
    place = Place(tmp_path_factory.mktemp("recorded"))
    train(place.root, STEPS)
    place.replay(out=place.root / "plain.lca")
    place.replay(out=place.root / "causes.lca", **CAUSES)
    return place.root


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def series(place: Place, recorded: Path) -> Place:
    """The same with a copy of the iterates."""
    shutil.copytree(recorded / "checkpoints", place.iterates)
    return place


def files(place: Place) -> tuple[list[int], list[int]]:
    """The steps that have an iterate, and those that have moments."""
    return steps_there(place.iterates), steps_there(place.iterates / "moments")


@pytest.mark.parametrize(
    ("at_most", "options", "out"),
    [
        (5, {"keep_every": 3}, "plain.lca"),
        ("45kB", CAUSES, "causes.lca"),
        (4, CAUSES, "causes.lca"),
    ],
)
def test_training_and_replay_at_once_give_the_bytes_of_a_plain_run_and_keep_the_bound(
    place: Place, recorded: Path, at_most: int | str, options: dict[str, Any], out: str
) -> None:
    """The bound is looked at with every file that is written; the smallest has room for a span."""
    training = threading.Thread(target=train, args=(place.root, STEPS, at_most))
    training.start()
    place.replay(follow=True, consume=True, **options)
    training.join()
    assert not (place.root / "above").exists()
    clean_runs.same_bytes(place.out, recorded / out)
    assert list(results.verify(place.out)) == []
    # the last span has one segment, and may grow; with causes the motion before it is needed
    first = STEPS - 1 - ("causes" in options)
    stay = [step for step in (0, 3) if "keep_every" in options]
    with_moments = [step for step in stay if step > 0]
    last = [*range(first, STEPS + 1)]
    assert files(place) == ([*stay, *last], [*with_moments, *last])
    ours, plain = (
        json.loads((run / "run.json").read_text()) for run in (place.out, recorded / out)
    )
    assert ours["checkpoints"] == plain["checkpoints"]  # with causes, moments that are gone too
    assert {len(entry) for entry in ours["checkpoints"]} == ({4, 6} if "causes" in options else {4})
    for name, record in plain["losses"].items():
        assert {**ours["losses"][name], "begun": None} == {**record, "begun": None}
    planned = [event for event in place.events if isinstance(event, Planned)]
    assert len(planned) > 1
    assert [event.follows for event in planned] == [True] * (len(planned) - 1) + [False]


def test_without_consume_everything_stays(place: Place, recorded: Path) -> None:
    training = threading.Thread(target=train, args=(place.root, STEPS))
    training.start()
    place.replay(follow=True)
    training.join()
    clean_runs.same_bytes(place.out, recorded / "plain.lca")
    assert steps_there(place.iterates) == [*range(STEPS + 1)]


@pytest.mark.parametrize(("keep_every", "stay"), [(None, []), (3, [0, 3])])
def test_consume_alone_frees_the_disk_and_leaves_what_is_to_be_kept(
    series: Place, recorded: Path, keep_every: int | None, stay: list[int]
) -> None:
    series.replay(consume=True, keep_every=keep_every)
    clean_runs.same_bytes(series.out, recorded / "plain.lca")
    assert steps_there(series.iterates) == [*stay, STEPS - 1, STEPS]
    gone, kept = STEPS - 1 - len(stay), 2 + len(stay)
    assert f"removed {gone} iterates of {series.iterates}" in series.notes()
    assert series.notes().endswith(f"and kept {kept}")
    before = contents(series.out / "data.zarr")
    series.replay()  # nothing is left to do, and the run opens, resumes and verifies as any other
    series.task.write_text(f"{series.task.read_text()}\n# a comment\n")
    series.replay()
    assert contents(series.out / "data.zarr") == before
    assert open_run(series.out)["train"].steps.sizes["step"] == STEPS
    assert lca("status", series.out).exit_code == 0


def test_no_iterate_goes_before_all_it_is_needed_for_is_committed(
    series: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each span everything it reads is there, and what went is of committed spans alone."""
    seen, original = [], pending_spans.replay_span

    def hooked(spec: dict[str, Any]) -> dict[str, Any]:
        first = SPAN * spec["span"]
        needed = set(range(max(0, first - 1), min(first + SPAN, STEPS) + 1))
        assert needed <= set(files(series)[0])
        assert needed - {0} <= set(files(series)[1])
        seen.append(set(range(STEPS + 1)) - set(files(series)[0]))
        return original(spec)

    monkeypatch.setattr(pending_spans, "replay_span", hooked)
    series.replay(consume=True, **CAUSES)
    assert seen == [set(range(max(0, SPAN * span - 1))) for span in range(4)]


def test_one_loss_of_two_is_no_reason_to_remove_what_the_other_needs(series: Place) -> None:
    series.replay()
    for marker in series.out.glob("commits/train/000001-*.json"):
        marker.unlink()
    series.replay(losses=["validation"], consume=True)
    assert steps_there(series.iterates) == [*range(SPAN, STEPS + 1)]
    series.replay(consume=True)
    assert steps_there(series.iterates) == [STEPS - 1, STEPS]


def test_a_run_that_was_consumed_grows(series: Place, recorded: Path) -> None:
    """The last short span is computed again, with the iterates that stayed for it."""
    last = range(STEPS - 1, STEPS + 1)
    for step in last:
        (series.iterates / f"step_{step:08d}.safetensors").unlink()
    series.replay(consume=True, keep="units", **CAUSES)
    assert steps_there(series.iterates) == [STEPS - 4, STEPS - 3, STEPS - 2]
    for step in last:
        name = f"step_{step:08d}.safetensors"
        shutil.copy(recorded / "checkpoints" / name, series.iterates)
    series.replay(consume=True)
    assert steps_there(series.iterates) == [STEPS - 2, STEPS - 1, STEPS]
    plain = series.root / "plain.lca"
    series.replay(checkpoints=recorded / "checkpoints", out=plain, keep="units", **CAUSES)
    clean_runs.same_bytes(series.out, plain)


def test_what_needs_removed_iterates_is_refused_with_the_reason(
    series: Place, recorded: Path
) -> None:
    series.replay(losses=["train"], consume=True)
    before = contents(series.out)
    with pytest.raises(InputError, match=r"'validation' cannot .* removed the iterates of steps 0"):
        series.replay(losses=["validation"])
    assert contents(series.out) == before
    chunks = series.out.glob("data.zarr/train/allocation/out.weight/c/1/**/0")
    next(path for path in chunks if path.is_file()).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"on steps 2 to 4: .* removed the iterates of steps 2"):
        repair(series.out, series.task, cluster="inline")
    # of a copy that has them it is repaired
    copy = recorded / "checkpoints"
    repair(series.out, series.task, checkpoints=copy, cluster="inline")
    assert contents(series.out / "data.zarr") == {
        name: data
        for name, data in contents(recorded / "plain.lca" / "data.zarr").items()
        if not name.startswith("validation")
    }


def test_what_was_removed_otherwise_is_missing_as_ever(series: Place) -> None:
    series.replay(losses=["train"], consume=True)
    (series.iterates / ".released.json").unlink()
    with pytest.raises(InputError, match="step 0 is missing"):
        series.replay(losses=["train"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"consume": True, "durability": "none"}, "--durability none does not wait for"),
        ({"consume": True, "steps": "0:4"}, "--steps selects a part"),
        ({"consume": True, "segments": "0.5@1"}, "--segments draws .* with --consume"),
        ({"follow": True, "segments": "0.5@1"}, "--segments draws .* with --follow"),
        ({"follow": True, "path_band": "on"}, "--path-band on needs .* with --follow"),
        ({"consume": True, "path_band": "on"}, "--path-band on needs .* with --consume"),
        ({"follow": True, "checkpoints": ["a", "b"]}, "--follow takes the one directory"),
        ({"consume": True, "checkpoints": "a/step{step}"}, "--consume takes the one directory"),
        ({"follow": True, "pattern": r"step_(?P<step>\d+)"}, "--pattern selects a part"),
        ({"keep_every": 2}, "--keep-every selects the iterates that --consume keeps"),
        ({"consume": True, "keep_every": 0}, "--keep-every 0"),
        ({"consume": True, "checkpoints": "memory://x"}, "is remote"),
        ({"follow": True, "checkpoints": "memory://x"}, "is remote"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    series: Place, options: dict[str, Any], words: str
) -> None:
    before = contents(series.iterates)
    with pytest.raises(InputError, match=words):
        series.replay(**options)
    assert contents(series.iterates) == before
    assert not series.out.exists()


@pytest.mark.parametrize(
    ("part", "words"),
    [({"segments": "0.5@1", "keep": "units"}, "--segments"), ({"steps": "0:4"}, "--steps")],
)
def test_a_run_of_a_part_removes_nothing_although_the_part_is_not_asked_for_again(
    series: Place, part: dict[str, Any], words: str
) -> None:
    series.replay(**part)
    before = contents(series.iterates)
    for option in ({"consume": True}, {"follow": True}):
        with pytest.raises(InputError, match=words):
            series.replay(**option)
    assert contents(series.iterates) == before


def test_files_of_no_recorder_are_not_removed(series: Place) -> None:
    path = series.iterates / "step_00000003.safetensors"
    path.rename(series.iterates / "iterate_step_3.safetensors")
    with pytest.raises(
        InputError, match=r"step_3.safetensors \(step 3\) has no name that a recorder"
    ):
        series.replay(consume=True)


def test_two_runs_do_not_remove_the_same_iterates_and_one_keeps_what_it_began_to(
    series: Place,
) -> None:
    series.replay(out=series.root / "other.lca")
    series.replay(losses=["train"], consume=True, keep_every=3)
    with pytest.raises(InputError, match="began to remove iterates with --keep-every 3"):
        series.replay(losses=["train"], consume=True)
    with pytest.raises(InputError, match="is missing"):
        series.replay(out=series.root / "other.lca", consume=True)
    with pytest.raises(InputError, match=r"another run, .*run.lca, removes iterates"):
        series.replay(out=series.root / "third.lca", consume=True, keep_every=3)


def test_of_far_apart_iterates_no_other_path_is_told(place: Place) -> None:
    train(place.root, 8, every=2)
    place.replay(path_band="off", out=place.root / "plain.lca")
    place.replay(consume=True)
    clean_runs.same_bytes(place.out, place.root / "plain.lca")
    assert open_run(place.out).manifest.settings["path_band"] == "off"


# --- bursts, and shards ---------------------------------------------------------------------------

BURSTS = (5, 3)  # iterates 0, 1, 2, 5, 6, 7, …: two segments each


@pytest.mark.parametrize(
    ("at_most", "span", "options", "stay"),
    [
        (5, 2, {}, []),  # the whole bursts: a span and the end of the one before
        (6, 2, CAUSES, []),
        (3, 1, {}, []),
        (9, 4, {"keep_every": 6}, [0, 6, 12]),
        (None, 4, CAUSES, []),
    ],
)
def test_bursts_are_followed_and_consumed_without_the_gaps_between_them(
    place: Place, at_most: int | None, span: int, options: dict[str, Any], stay: list[int]
) -> None:
    """The bytes of a plain run over the same bursts; the last burst is cut short by the end."""
    steps, plain = 16, place.root / "plain.lca"
    train(place.root, steps, directory="copy", bursts=BURSTS)
    causes = {name: value for name, value in options.items() if name != "keep_every"}
    place.replay(checkpoints=place.root / "copy", out=plain, span=span, **causes)
    place.events.clear()

    def record() -> None:
        train(place.root, steps, at_most, bursts=BURSTS, until=steps)

    training = threading.Thread(target=record)
    training.start()
    place.replay(follow=True, consume=True, span=span, **options)
    training.join()
    assert not (place.root / "above").exists()
    clean_runs.same_bytes(place.out, plain)
    assert list(results.verify(place.out)) == []
    rows = open_run(place.out)["train"].steps["step"].values
    assert rows.tolist() == [0, 1, 5, 6, 10, 11, 15]
    assert set(steps_there(place.iterates)) >= {*stay, steps}
    assert not set(steps_there(place.iterates)) & ({0, 1, 5, 6} - {*stay})
    place.replay(consume=True, keep_every=options.get("keep_every"))  # resumed: nothing is left
    assert place.events[-1].pending == 0
    clean_runs.same_bytes(place.out, plain)


def test_a_run_over_bursts_that_were_consumed_grows(place: Place) -> None:
    """Where segments end is known of iterates that went, and of those that stay for good."""
    plain = place.root / "plain.lca"
    train(place.root, 21, directory="copy", bursts=BURSTS)
    place.replay(checkpoints=place.root / "copy", out=plain, keep="units", **CAUSES)
    train(place.root, 11, bursts=BURSTS)
    place.replay(consume=True, keep_every=6, keep="units", **CAUSES)
    assert steps_there(place.iterates) == [0, 6, 7, 10, 11]
    train(place.root, 21, bursts=BURSTS)
    place.replay(consume=True, keep_every=6)
    clean_runs.same_bytes(place.out, plain)
    assert steps_there(place.iterates) == [0, 6, 12, 17, 20, 21]


def test_what_needs_removed_iterates_of_bursts_is_refused(place: Place) -> None:
    train(place.root, 12, bursts=BURSTS)
    place.replay(losses=["train"], consume=True)
    with pytest.raises(InputError, match=r"on steps 0 to 2: .* iterates of steps 0, 1, 2"):
        place.replay(losses=["validation"])


def test_spans_in_shards_are_followed_and_consumed(place: Place) -> None:
    options: dict[str, Any] = {"keep": "units", "batch_size": 4, "shards": 2}
    plain = place.root / "plain.lca"
    train(place.root, STEPS, directory="copy")
    place.replay(checkpoints=place.root / "copy", out=plain, **options)
    manifest = results.read_manifest(plain)
    assert all(is_cut(manifest, name) for name in manifest.losses)
    training = threading.Thread(target=train, args=(place.root, STEPS, 6))
    training.start()
    place.replay(follow=True, consume=True, **options)
    training.join()
    assert not (place.root / "above").exists()
    clean_runs.same_bytes(place.out, plain)
    assert steps_there(place.iterates) == [STEPS - 1, STEPS]


# --- a recorder that is there, or is not ----------------------------------------------------------


def sign_of(pid: int, **changes: Any) -> RecorderSign:
    sign = RecorderSign.of_this_process(None, None, None, None)
    return replace(sign, pid=pid, **changes)


def test_a_series_without_a_sign_is_not_followed(series: Place) -> None:
    (series.iterates / ".recorder.json").unlink()
    with pytest.raises(InputError, match="no recorder is registered"):
        series.replay(follow=True)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"most_iterates": 4}, {}, "nothing makes room without --consume"),
        ({"most_iterates": 4}, {"consume": True, "span": 4}, "a span of 4 segments needs 5 at"),
        ({"most_bytes": 20_000}, {"consume": True}, "a span of 2 segments needs 3 at once"),
    ],
)
def test_a_bound_that_would_never_let_go_is_refused(
    series: Place, changes: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    write_sign(series.iterates, sign_of(os.getpid(), **changes))
    with pytest.raises(InputError, match=words):
        series.replay(follow=True, **options)


@pytest.mark.parametrize(
    ("room", "has_causes", "span"), [(3, True, 1), (5, False, 2), (64, True, 16), (65, False, 32)]
)
def test_spans_fit_the_room_twice(
    series: Place, room: int, has_causes: bool, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sign(series.iterates, sign_of(os.getpid(), most_iterates=room))
    follower = Follower(
        series.iterates,
        Stop(),
        lambda *_: None,
        lambda _: None,
        consumes=True,
        has_causes=has_causes,
    )
    monkeypatch.setattr(follower, "_wait", lambda _: None)
    follower._sign = read_sign(series.iterates)
    follower.wait_for_first(None, None)
    assert follower.span == span


def interrupts_where_it_waits(place: Place, number: signal.Signals = signal.SIGINT) -> None:
    """Send a signal once the replay has done all whole spans and waits."""

    def listen(event: object) -> None:
        place.events.append(event)
        following = any(isinstance(earlier, Following) for earlier in place.events)
        if isinstance(event, Stage) and following and "waiting" in event.text:
            os.kill(os.getpid(), number)

    place.replay(follow=True, progress=listen)


def test_a_follower_of_a_dead_recorder_says_so_and_ctrl_c_ends_it_with_what_is_there(
    series: Place, recorded: Path
) -> None:
    write_sign(series.iterates, sign_of(os.getpid(), began=0.0))  # another process had the number
    interrupts_where_it_waits(series)
    assert f"died without closing, after the iterate of step {STEPS}" in series.notes()
    assert "Ctrl-C ends the run with the existing iterates" in series.notes()
    clean_runs.same_bytes(series.out, recorded / "plain.lca")


def test_ctrl_c_while_the_recorder_lives_stops_and_the_same_command_goes_on(
    series: Place, recorded: Path
) -> None:
    write_sign(series.iterates, sign_of(os.getpid()))
    with pytest.raises(Interrupted):
        interrupts_where_it_waits(series, signal.SIGTERM)
    assert open_run(series.out)["train"].steps.sizes["step"] == STEPS - 1
    write_sign(series.iterates, sign_of(os.getpid(), state="closed"))
    series.replay(follow=True)
    clean_runs.same_bytes(series.out, recorded / "plain.lca")


def test_status_says_that_a_run_follows_and_where_it_waits(series: Place) -> None:
    said: list[str] = []
    write_sign(series.iterates, sign_of(os.getpid()))

    def listen(event: object) -> None:
        series.events.append(event)
        if isinstance(event, SpanDone) and not said:
            said.append(lca("status", series.out).stdout)
        following = any(isinstance(earlier, Following) for earlier in series.events)
        if isinstance(event, Stage) and following and len(said) == 1:
            said.append(lca("status", series.out).stdout)
            said.append(lca("status", series.out, "--json").stdout)
            write_sign(series.iterates, sign_of(os.getpid(), state="closed"))

    series.replay(follow=True, progress=listen)
    working, waits, document = said
    assert "it follows a recorder" in working
    assert "waits for more" not in working
    words = " ".join(waits.split())
    assert "complete so far; following" in words
    assert f"it has replayed up to step {STEPS - 1} and waits for more" in words
    assert json.loads(document)["following"] == {"waits_after": STEPS - 1}
    assert faults("status", json.loads(document)) == []
    assert "following" not in json.loads(lca("status", series.out, "--json").stdout)


@pytest.mark.parametrize(
    ("state", "began", "words"),
    [
        ("recording", None, ["is still running. The same `lca run` follows it again"]),
        ("closed", None, ["has closed since. The same `lca run` replays the rest"]),
        ("failed", None, ["ended without closing", "Resume the training", "leave --follow out"]),
        ("recording", 0.0, ["ended without closing", "Resume the training", "leave --follow out"]),
    ],
)
def test_status_of_a_follower_that_was_stopped_says_how_the_training_stands(
    series: Place, state: Any, began: float | None, words: list[str]
) -> None:
    write_sign(series.iterates, sign_of(os.getpid()))
    with pytest.raises(Interrupted):
        interrupts_where_it_waits(series)
    ends = sign_of(os.getpid(), state=state)
    write_sign(series.iterates, ends if began is None else replace(ends, began=began))
    said = " ".join(lca("status", series.out).stdout.split())
    says(said, "complete so far; stopped following", "it was stopped while following", *words)


def test_a_finished_follower_is_told_that_nothing_comes_and_not_that_nothing_is_to_do(
    series: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    series.replay(follow=True)
    capsys.readouterr()
    with Display() as listen:
        series.replay(follow=True, progress=listen)
    said = " ".join(capsys.readouterr().err.split())
    says(said, "no more iterates are expected, and every span of the existing ones is committed")
    assert "nothing to do" not in said


def test_a_loss_that_is_not_asked_for_is_not_left_behind_where_iterates_go(series: Place) -> None:
    series.replay()
    write_sign(series.iterates, sign_of(os.getpid()))
    with pytest.raises(InputError, match="loss 'validation' of this run is not asked for"):
        series.replay(losses=["train"], follow=True, consume=True)


def test_a_full_disk_stops_the_replay_and_the_same_command_goes_on(
    series: Place, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what is said of iterates that go cannot be written, none goes."""
    import errno

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lca_posthoc.replay.consume.write_release", full)
        with pytest.raises(ResourceError, match="no space left"):
            series.replay(consume=True)
    assert steps_there(series.iterates) == [*range(STEPS + 1)]
    assert read_release(series.iterates) is None
    series.replay(consume=True)
    clean_runs.same_bytes(series.out, recorded / "plain.lca")
    assert steps_there(series.iterates) == [STEPS - 1, STEPS]


def test_still_stretches_are_measured_alike_where_their_iterates_go(tmp_path: Path) -> None:
    """Where nothing moves at first, which segment is measured hangs on iterates that went."""
    runs = []
    for name in ("plain", "consumed"):
        (tmp_path / name).mkdir()
        place = Place(tmp_path / name)
        torch.manual_seed(0)
        with Recorder(place.iterates, model := task_namespace()["Net"]()) as recorder:
            for step in range(STEPS + 1):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.01 * (step >= 5))
                recorder.save(step)
        place.replay(consume=name == "consumed")
        runs.append(place.out)
    measured = open_run(runs[0])["train"].steps["precision_error"].values
    assert [row for row, error in enumerate(measured) if error > 0] == [4]
    clean_runs.same_bytes(runs[1], runs[0])


# --- the recorder's side --------------------------------------------------------------------------


@pytest.mark.parametrize("at_most", [2, 0, True, "20", "many GB", "2 iterates", 2.5])
def test_a_bound_is_a_number_of_iterates_or_bytes(tmp_path: Path, at_most: Any) -> None:
    with pytest.raises(InputError, match="at_most"):
        Recorder(tmp_path, network(), at_most=at_most)


def test_a_bound_below_what_a_replay_needs_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    recorder = Recorder(tmp_path / "ck", network(), at_most="20kB")
    with pytest.raises(InputError, match=r"a replay needs 3 at once, .* Give more"):
        recorder.save(0)
    assert not (tmp_path / "ck").exists()


def test_a_training_that_ends_while_it_waits_for_room_says_what_is_not_written(
    tmp_path: Path,
) -> None:
    """The warning says what it waits for; an error that ends the training ends the waiting."""
    waited, model = threading.Event(), network()

    def train_and_fail() -> None:
        with recorder_waits(waited), Recorder(tmp_path, model, at_most=3) as recorder:
            for step in range(5):
                become(model, step)
                recorder.save(step)
            assert waited.wait(60)
            raise RuntimeError("ends")

    says = r"3 iterates .* of at most 3 iterates: recording and training wait"
    with pytest.warns(UserWarning, match=says), pytest.raises(RuntimeError, match="ends") as raised:
        train_and_fail()
    assert "recording ended while the iterate of step 3 waited for room" in str(
        raised.value.__notes__
    )
    assert steps_there(tmp_path) == [0, 1, 2]
    sign = read_sign(tmp_path)
    assert sign is not None
    assert sign.state == "failed"


def recorder_waits(waited: threading.Event) -> Any:
    """Set an event when the recorder has found no room."""
    from unittest import mock

    from lca_posthoc.recording.ring import Ring

    say = Ring._say

    def say_and_set(ring: Ring) -> None:
        say(ring)
        waited.set()

    return mock.patch.object(Ring, "_say", say_and_set)


def test_a_sign_says_that_the_recorder_is_there_and_that_it_has_closed(tmp_path: Path) -> None:
    with Recorder(tmp_path, network(), until=7, at_most="1 GB") as recorder:
        recorder.save(0)
        recorder.flush()
        sign = read_sign(tmp_path)
        assert sign is not None
        assert sign.is_recording(tmp_path)
        assert (sign.segments, sign.most_bytes, sign.most_iterates) == (7, 10**9, None)
    closed = read_sign(tmp_path)
    assert closed == replace(sign, state="closed")
    assert not closed.is_recording(tmp_path)
    assert not replace(sign, began=0.0).is_recording(tmp_path)


def test_a_recorder_that_goes_on_passes_over_what_a_replay_removed(
    place: Place, recorded: Path
) -> None:
    """It is not written again, and what is still there is compared."""
    train(place.root, STEPS)
    place.replay(consume=True)
    (place.root / "checkpoints.pt").unlink()
    train(place.root, STEPS)  # from the first step on
    assert steps_there(place.iterates) == [STEPS - 1, STEPS]
    model = task_namespace()["Net"]()
    with (
        pytest.raises(LCAError, match="holds other weights"),
        Recorder(place.iterates, model) as recorder,
    ):
        recorder.save(STEPS)


def test_an_iterate_that_cannot_be_written_takes_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    model, put = network(), Writer._put

    def full(writer: Writer, files: Any) -> None:
        if files[0].path.endswith("step_00000001.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        put(writer, files)

    monkeypatch.setattr(Writer, "_put", full)

    def record() -> None:
        with Recorder(tmp_path, model, at_most=3, on_full="pause") as recorder:
            for step in range(4):
                become(model, step)
                recorder.save(step)

    with pytest.warns(UserWarning, match="recording pauses until there is"):
        record()
    assert steps_there(tmp_path) == [0, 2, 3]


def test_a_training_that_an_error_ends_is_not_taken_for_finished(place: Place) -> None:
    def interrupted() -> None:
        with Recorder(place.root / "other", network()) as recorder:
            recorder.save(0)
            raise KeyboardInterrupt

    train(place.root, 4)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    signs = [read_sign(folder) for folder in (place.iterates, place.root / "other")]
    assert [sign.state for sign in signs if sign is not None] == ["closed", "failed"]
