"""What people see of a replay: notes and progress, how far a run is, what it says of itself."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from rich.cells import cell_len
from rich.console import Console

import lca_posthoc
from lca_posthoc import results
from lca_posthoc.errors import LCAError
from lca_posthoc.replay import display
from lca_posthoc.replay.display import Lines, Progressed, stderr, views
from lca_posthoc.replay.events import Note, Planned, SpanDone, Stage, Stopping, silent
from tests.helpers.cli import (
    contents,
    document,
    lca,
    marker,
    refused,
    run_lca,
    says,
    write_task,
)
from tests.helpers.forked_python import forked, program
from tests.helpers.terminal import environment, on_terminal, piped

NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")
underway_module: Any = sys.modules["lca_posthoc.results.underway"]
starting_module: Any = sys.modules["lca_posthoc.results.starting"]

# --- notes and progress in Python -----------------------------------------------------------------

SCRIPT = """\
import sys
import lca_posthoc
from lca_posthoc.replay import events
if __name__ == "__main__":
    seen = []
    listen = {{"default": None, "silent": events.silent, "callable": seen.append}}[{how!r}]
    lca_posthoc.run({ck!r}, {task!r}, out={out!r}, cluster="inline", progress=listen)  # the user's line
    print([type(event).__name__ for event in seen if isinstance(event, events.Note)])
"""


@pytest.fixture
def gap(place: Path, out: Path) -> Path:
    """Checkpoints a note is due for: one is missing."""
    import shutil

    shutil.copytree(place / "ck", out / "gap")
    (out / "gap" / "step_00000030.safetensors").unlink()
    return out / "gap"


def script_of(how: str, place: Path, gap: Path) -> Path:
    script = gap.parent / "script.py"
    values = {
        "ck": str(gap),
        "task": str(place / "task.py"),
        "out": str(gap.parent / "s.lca"),
        "how": how,
    }
    script.write_text(SCRIPT.format(**values))
    return script


@pytest.mark.parametrize("how", ["default", "silent", "callable"])
def test_notes_reach_python_as_the_caller_wants_them(place: Path, gap: Path, how: str) -> None:
    script = script_of(how, place, gap)
    done = piped([program("python"), script])
    assert done.returncode == 0, done.stderr
    lines = done.stderr.decode().splitlines()
    if how == "default":
        at = 1 + script.read_text().splitlines().index(
            next(line for line in script.read_text().splitlines() if "user's" in line)
        )
        assert lines[0].startswith(f"{script}:{at}: LCAWarning: ")
        assert "20→40" in done.stderr.decode()
    else:
        assert lines == []
    assert done.stdout.decode().strip() == ("['Note']" if how == "callable" else "[]")


def test_warnings_can_be_filtered(place: Path, gap: Path) -> None:
    script = script_of("default", place, gap)
    done = piped([sys.executable, "-W", "ignore::lca_posthoc.errors.LCAWarning", script])
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_shows_stages_a_bar_and_warnings_and_keeps_nothing_that_moves(
    place: Path, gap: Path
) -> None:
    code, shown = on_terminal([program("python"), script_of("default", place, gap)], 120)
    assert code == 0, shown
    says(shown, "building and probing the task", "segments", "worst residual", "LCAWarning")


def test_the_command_shows_stages_and_a_bar_on_a_terminal(place: Path, out: Path) -> None:
    run = ["run", place / "ck", "--task", place / "task.py", "--loss", "all"]
    code, shown = on_terminal(
        [program("lca"), *run, "--out", out / "größe.lca", "--cluster", "inline"], 120
    )
    assert code == 0, shown
    says(
        shown,
        "reading the headers of the checkpoints",
        "building and probing the task",
        "0/2 spans",
        "results in",
    )


# rich erases the lines it showed from the last one to the first
SECOND_LINE = "\x1b[2K\x1b[1A"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
@pytest.mark.parametrize("command", ["run", "plan", "inspect", "verify", "import"])
def test_what_moves_stays_in_one_line_of_any_terminal(
    place: Path, out: Path, command: str, columns: int
) -> None:
    task = ["--task", place / "task.py"]
    call: list[object] = {
        "run": ["run", place / "ck", *task, "--out", out / "s.lca", "--cluster", "inline"],
        "plan": ["plan", place / "ck", *task],
        "inspect": ["inspect", place / "ck"],
        "verify": ["verify", place / "r.lca"],
        "import": ["import", out / "saved", out / "imported"],
    }[command]
    code, shown = on_terminal([program("lca"), *call], columns)
    assert code == 0, shown
    assert "\x1b[2K" in shown  # something moved
    assert SECOND_LINE not in shown
    for line in re.split(r"[\r\n]", CONTROL.sub("", shown)):
        if "imported" not in line and "s.lca" not in line:  # a path is never cut
            assert cell_len(line) <= columns, line


def test_a_second_line_is_seen() -> None:
    """The test above can fail."""
    console = Console(file=io.StringIO(), force_terminal=True, width=40)
    with console.status("word " * 20):
        pass
    assert SECOND_LINE in console.file.getvalue()  # type: ignore[attr-defined]


NOTEBOOK = """\
import sys
import types

shown = []

class Handle:
    def update(self, data): shown.append(data)

def display(data, display_id): shown.append(data); return Handle()

ipython, shell = types.ModuleType("IPython"), types.SimpleNamespace(kernel=object())
ipython.get_ipython = lambda: shell
ipython.display = sys.modules["IPython.display"] = types.ModuleType("IPython.display")
ipython.display.HTML, ipython.display.display = str, display
sys.modules["IPython"] = ipython
sys.modules["ipywidgets"] = None
"""


def test_a_notebook_shows_a_bar_without_ipywidgets(place: Path, gap: Path) -> None:
    script = script_of("default", place, gap)
    script.write_text(NOTEBOOK + script.read_text() + "    print(*shown, sep='\\n')\n")
    done = piped([sys.executable, "-W", "ignore::lca_posthoc.errors.LCAWarning", script])
    assert (done.returncode, done.stderr) == (0, b"")
    says(
        done.stdout.decode(),
        "building and probing the task",
        '<progress value="5" max="5">',
        "5 of 5 segments",
    )


# --- a line a minute ------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def done(span: int, segments: int = 10) -> SpanDone:
    return SpanDone(
        span=span,
        losses=["train"],
        segments=segments,
        worst_residual=1e-4,
        unconverged=0,
        evaluations=30,
        forward_passes=0,
        seconds=1.0,
        peak_bytes=1,
        worker="worker",
        workers=2,
    )


def test_without_a_terminal_there_is_a_line_a_minute_and_an_early_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock, lines = Clock(), list[tuple[float, str]]()
    shown = display.Display(clock)

    def until(second: float) -> None:
        while clock.now < second:
            clock.now += 1
            shown.tick()
            lines.extend((clock.now, line) for line in capsys.readouterr().err.splitlines())

    shown(Stage("building and probing the task"))
    until(130)
    assert [at for at, _ in lines] == [60, 120]
    assert lines[0][1] == "lca: building and probing the task, for 1 min now"
    lines.clear()
    shown(Planned(300, 400, 30, 2, "/nowhere"))
    until(175)
    assert lines == []  # no figures yet, and the last line is less than a minute ago
    shown(done(0))
    until(420)
    assert [at for at, _ in lines] == [176, 235, 295, 355, 415]
    assert lines[0][1].startswith("lca: 110 of 400 segments · worst residual 1.0e-04 · 0.")
    says(lines[0][1], "segments/s on 2 workers", "left")


def test_where_there_are_stages_alone_each_is_told_when_it_begins(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    shown = display.Display(clock, stages=True)
    for stage in ("reading", "probing"):
        shown(Stage(stage))
        clock.now += 19
        shown.tick()
        clock.now += 1
        shown.tick()
    assert capsys.readouterr().err.splitlines() == [
        "lca: reading",
        "lca: reading, for 20 s now",
        "lca: probing",
        "lca: probing, for 20 s now",
    ]


def test_a_plan_tells_its_stages_with_and_without_a_terminal(place: Path, out: Path) -> None:
    plan = [program("lca"), "plan", place / "ck", "--task", place / "task.py"]
    lines = piped(plan).stderr.decode().splitlines()
    stages = [
        "reading the headers of the checkpoints",
        "building the task, and probing it on a sample",
        "timing a few batches",
    ]
    assert lines == [f"lca: {stage}" for stage in stages]
    code, shown = on_terminal(plan, 80)
    assert code == 0, shown
    says(shown, *stages)


def test_a_run_of_seconds_prints_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    shown = display.Display(clock)
    shown(Planned(20, 20, 2, 2, "/nowhere"))
    for at in range(2):
        clock.now += 5
        shown(done(at))
        shown.tick()
    assert capsys.readouterr().err == ""


def test_a_line_says_what_is_known() -> None:
    state = Progressed(total=300, before=100, done=100, spans=20, workers=4, began=10.0)
    assert (
        state.line(40.0) == "100 of 300 segments · worst residual 0.0e+00 · 4 workers · after 30 s"
    )
    state.underway, state.retried, state.failed = 13.5, 2, 1
    assert (
        "113 of 300 segments · worst residual 0.0e+00 · 2 retried · 1 failed · 0.45 segments/s"
        in state.line(40.0)
    )
    assert state.seconds_left(40.0) == pytest.approx((300 - 113.5) / (13.5 / 30))


# --- inside a span, and before the first ----------------------------------------------------------

HELD = """\
import os
from pathlib import Path

def cross_entropy(model, batch):
    if {when}:
        {wait}
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""
DRIVE = """\
import sys
from lca_posthoc import results
from lca_posthoc.replay.display import listener, views
sys.modules["lca_posthoc.results.underway"].EVERY = 0.0
listener.LOOK, views.FIRST, views.MINUTE = 0.02, 0.0, 0.02
from lca_posthoc.cli import main
if __name__ == "__main__":
    main()
"""


INLINE: list[object] = ["--cluster", "inline"]
LOCAL: list[object] = ["--cluster", "local", "--workers", 1]
IN_SPAN, BEFORE = "Path({out!r}, 'log', '.span-000000.json').exists()", "not Path({out!r}).exists()"
UNTIL_OPENED = "open({fifo!r}).close()"  # waits until the test opens the other end


Held = tuple[subprocess.Popen[str], Path, Path]


def held_run(
    place: Path, root: Path, when: str, *options: object, wait: str = UNTIL_OPENED
) -> Held:
    """`lca run` that waits inside a loss while `when` holds there, its directory, and what to open
    to let it go on.
    """
    fifo, out = root / "fifo", root / "held.lca"
    os.mkfifo(fifo)
    text = write_task(root / "held.py", "def cross_entropy(", "def old_cross_entropy(").read_text()
    text = text.replace(
        "def task():",
        HELD.format(when=when.format(out=str(out)), wait=wait.format(fifo=str(fifo)))
        + "\n\ndef task():",
    )
    (root / "held.py").write_text(
        text.replace('"train": Loss(F.cross_entropy, on', '"train": Loss(call=cross_entropy, on')
    )
    (root / "drive.py").write_text(DRIVE)
    command = [
        program("python"),
        root / "drive.py",
        "run",
        place / "ck",
        "--task",
        root / "held.py",
        "--out",
        out,
        *options,
    ]
    process = subprocess.Popen(
        [str(each) for each in command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    return process, out, fifo


@pytest.fixture
def held(place: Path, tmp_path: Path) -> Iterator[Callable[..., Held]]:
    """`held_run`, whose process ends with the test in any case."""
    with contextlib.ExitStack() as ends:

        def begin(when: str, *options: object, wait: str = UNTIL_OPENED) -> Held:
            begun = held_run(place, tmp_path, when, *options, wait=wait)
            ends.enter_context(begun[0])  # waits for it
            ends.callback(begun[0].kill)
            return begun

        yield begin


def let_go_on(process: subprocess.Popen[str], fifo: Path) -> str:
    """Open the other end for as long as somebody comes to wait there; returns the rest of
    stderr.
    """
    rest = list[str]()
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: rest.append(process.stderr.read()))  # type: ignore[union-attr]
    reader.start()
    keeps = os.open(fifo, os.O_RDWR)  # a reader that comes now finds a writer
    reader.join()
    os.close(keeps)
    process.wait()
    return rest[0]


@pytest.mark.moment
@pytest.mark.parametrize("cluster", [INLINE, LOCAL], ids=["inline", "local"])
def test_how_far_a_span_is_can_be_seen_while_it_is_computed(
    held: Callable[..., Held], cluster: list[object]
) -> None:
    process, out, fifo = held(IN_SPAN, *cluster)
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("lca: 1 of 6 segments"))
    says(line, "worst residual", "segments/s on 1 worker", "left")
    found = document(lca("status", out, "--json"))["losses"]["train"]
    assert (found["segments_done"], found["segments_underway"], found["running"]) == (0, 1.0, True)
    says(lca("status", out).stdout, "0 / 6 + 1.0 underway", "running", "segments/s", "left")
    assert found["segments_per_second"] > 0
    assert found["seconds_left"] >= 0
    assert repr(results.open_run(out)) == f"<Run {str(out)!r}: losses train (0 of 6 segments)>"
    let_go_on(process, fifo)
    assert process.returncode == 0
    assert [path.name for path in (out / "log").iterdir()] == ["run.jsonl"]
    assert list(results.verify(out)) == []


@pytest.mark.moment
def test_a_status_tells_of_a_run_that_is_not_there_yet(
    held: Callable[..., Held], tmp_path: Path
) -> None:
    process, out, fifo = held(BEFORE, *INLINE)
    assert process.stderr is not None
    assert next(line for line in process.stderr if "building and probing the task, for" in line)
    driver = forked(psutil.Process(process.pid)).pid
    result = lca("status", out)
    assert result.exit_code == 0
    says(
        result.stdout,
        "does not exist yet: building and probing the task",
        f"process {driver} on ",
    )
    found = document(lca("status", out, "--json"))
    assert (found["losses"], found["preparing"]["pid"]) == ({}, driver)
    let_go_on(process, fifo)
    assert process.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"held.lca"}
    assert [path.name for path in tmp_path.iterdir() if "starting" in path.name] == []
    assert "complete" in lca("status", out).stdout


BUSY = (
    # minutes in one call of C, where no handler of Python's runs
    'hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)'
)
STOPS: dict[str, tuple[list[object], signal.Signals, str, str, str]] = {
    "a span inline": (
        INLINE,
        signal.SIGINT,
        IN_SPAN,
        "when the span underway is committed",
        "Press Ctrl-C again",
    ),
    "a span on a worker": (
        LOCAL,
        signal.SIGTERM,
        IN_SPAN,
        "when the span underway is",
        "Send SIGTERM again",
    ),
    "the preparation": (
        INLINE,
        signal.SIGINT,
        BEFORE,
        "when this is done: building and probing the task",
        "no span has",
    ),
}


@pytest.mark.moment
@pytest.mark.parametrize(("cluster", "number", "when", "waits", "again"), STOPS.values(), ids=STOPS)
def test_a_first_signal_says_at_once_what_it_waits_for_and_a_second_one_stops(
    held: Callable[..., Held],
    cluster: list[object],
    number: signal.Signals,
    when: str,
    waits: str,
    again: str,
) -> None:
    process, _, _ = held(when, *cluster)
    assert process.stderr is not None
    next(
        line
        for line in process.stderr
        if ("1 of 6 segments" if when == IN_SPAN else "probing the task, for") in line
    )
    process.send_signal(number)
    told = next(line for line in process.stderr if "stopping" in line)  # while the loss is held
    says(told, waits, again, "to stop now")
    process.send_signal(number)
    _, rest = process.communicate()
    assert process.returncode == 128 + number, rest
    assert [line for line in rest.splitlines() if not line.startswith("lca: ")] == []
    says(rest, "Run the same command again to resume.")
    assert "segments" not in rest.splitlines()[-1]


@pytest.mark.moment
def test_a_first_signal_is_answered_while_the_main_thread_is_in_one_long_call(
    held: Callable[..., Held],
) -> None:
    process, _, _ = held(IN_SPAN, *INLINE, wait=f"import hashlib; {BUSY}")
    assert process.stderr is not None
    next(line for line in process.stderr if "1 of 6 segments" in line)
    process.send_signal(signal.SIGINT)
    assert any("stopping when the span underway is committed" in line for line in process.stderr)
    assert process.poll() is None
    process.kill()
    process.communicate()


@pytest.mark.moment
def test_a_caller_in_python_catches_a_stop_as_a_keyboard_interrupt(
    place: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    listened: list[object] = []

    def listen(event: object) -> None:
        listened.append(event)
        if isinstance(event, Stage) and "probing" in event.text:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        lca_posthoc.run(
            place / "ck",
            place / "task.py",
            out=tmp_path / "x.lca",
            cluster="inline",
            progress=cast(Any, listen),
        )
    assert isinstance(caught.value, LCAError)
    assert [event for event in listened if isinstance(event, Stopping)] != []
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "x.lca").exists()  # it goes no further than the stage it was in
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.moment
def test_a_driver_that_was_killed_while_it_prepared_is_not_in_the_way(
    held: Callable[..., Held], place: Path, tmp_path: Path
) -> None:
    process, out, _ = held(BEFORE, *INLINE)
    assert process.stderr is not None
    assert next(line for line in process.stderr if "building and probing the task, for" in line)
    forked(psutil.Process(process.pid)).kill()
    process.communicate()
    assert [path.name for path in tmp_path.iterdir() if ".starting-" in path.name] != []
    refused(lca("status", out), "is not a run directory")
    assert run_lca(place / "ck", place / "task.py", out).exit_code == 0
    assert [path.name for path in tmp_path.iterdir() if ".starting-" in path.name] == []


def test_a_refusal_leaves_nothing_behind(place: Path, tmp_path: Path) -> None:
    write_task(
        tmp_path / "task.py", "self.out = torch.nn.Linear(8, 4)", "self.out = torch.nn.Linear(8, 5)"
    )
    before = set(contents(tmp_path))
    refused(
        run_lca(place / "ck", tmp_path / "task.py", tmp_path / "deep" / "er" / "x.lca"),
        "out.weight",
    )
    assert {name for name in contents(tmp_path) if "pycache" not in name} == before


def test_a_driver_elsewhere_is_believed_while_its_heart_beats(tmp_path: Path) -> None:
    out = tmp_path / "x.lca"
    with results.announced(out) as announcement:
        announcement.stage("probing")
        file = next(tmp_path.iterdir())
        elsewhere = file.with_name(".x.lca.starting-another-host-77")
        elsewhere.write_bytes(file.read_bytes())
    found = results.starting(out)
    assert found is not None
    assert found.stage == "probing"
    os.utime(elsewhere, (time.time() - 1000,) * 2)
    assert results.starting(out) is None
    with results.announced(out):
        assert not elsewhere.exists()


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\x00", '{"run": 1}', "x" * 100_000])
def test_what_is_no_report_is_passed_over(text: str, place: Path, tmp_path: Path) -> None:
    import shutil

    out = shutil.copytree(place / "r.lca", tmp_path / "x.lca")
    marker(out, "train", 1).unlink()
    (out / "log" / ".span-000001.json").write_text(text)
    (tmp_path / ".x.lca.starting-another-host-1").write_text(text)
    (out / "log" / "run.jsonl").write_text(text)
    with results.hold(out):
        assert document(lca("status", out, "--json"))["losses"]["train"]["segments_underway"] == 0
    assert lca("status", out).exit_code == 0


def test_a_report_that_cannot_be_written_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(underway_module, "EVERY", 0.0)
    with underway_module.SpanReport(tmp_path / "gone", 1) as report:
        report.begin(["train"])
        report.reach(1.0, 0.5)
    assert list(tmp_path.iterdir()) == []


def test_reports_of_killed_workers_are_swept(place: Path, tmp_path: Path) -> None:
    import shutil

    out = shutil.copytree(place / "r.lca", tmp_path / "x.lca")
    marker(out, "train", 1).unlink()
    left = out / "log" / ".span-000001.json"
    left.write_text("{}")
    assert run_lca(place / "ck", place / "task.py", out, "--loss", "train").exit_code == 0
    assert not left.exists()


def test_segments_of_several_passes_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(underway_module, "EVERY", 0.0)
    (tmp_path / "log").mkdir()
    file = tmp_path / "log" / ".span-000003.json"
    with underway_module.SpanReport(tmp_path, 3) as report:
        for losses, segments, expected in (
            (["a", "b"], 2.0, 2.0),
            (["a", "b"], 1.0, 1.0),  # made again with smaller batches
            (["a", "b"], 4.0, 4.0),
            (["c"], 0.5, 4.5),
        ):
            report.begin(losses) if segments != 4.0 else None
            report.reach(segments, 1e-3)
            assert json.loads(file.read_text())["segments"] == expected
    assert not file.exists()


# --- what a run says of itself --------------------------------------------------------------------


@pytest.fixture
def stopped(place: Path, tmp_path: Path) -> Path:
    import shutil

    out = shutil.copytree(place / "r.lca", tmp_path / "stopped.lca")
    marker(out, "train", 1).unlink()
    return out


def test_a_stopped_run_says_how_much_of_it_is_there(stopped: Path) -> None:
    run = lca_posthoc.open_run(stopped)
    assert repr(run) == (
        f"<Run {str(stopped)!r}: losses train (4 of 6 segments), per_class (complete), validation "
        "(complete)>"
    )
    assert repr(run["train"]) == f"<LossResults 'train' of {str(stopped)!r}: 4 of 6 segments>"
    assert repr(run["validation"]) == f"<LossResults 'validation' of {str(stopped)!r}: complete>"


@pytest.mark.parametrize("what", ["gone", "a damaged marker", "no permission", "a hostile name"])
def test_a_repr_never_raises(stopped: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    run = lca_posthoc.open_run(stopped)
    if what == "gone":
        shutil.rmtree(stopped)
    elif what == "a damaged marker":
        marker(stopped, "train", 0).write_text("{")
    elif what == "no permission":
        monkeypatch.setattr(
            Path, "stat", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no"))
        )
    else:
        run.manifest.losses["a\x1b[31m"] = run.manifest.losses["train"]
    assert repr(run).startswith("<Run ")
    assert repr(run["train"]).startswith("<LossResults 'train'")
    assert "\x1b" not in repr(run)


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (
            '{"time": "2026-01-01T00:00:01Z", "event": "Ended", "error": "SpanError: 1 span '
            'failed"}',
            "ended with SpanError: 1 span",
        ),
        ("", "its driver was killed"),
        (
            '{"time": "2026-01-01T00:00:01Z", "event": "Ended", "error": null}',
            "finished what it was asked for",
        ),
    ],
)
def test_a_run_that_ended_says_how_and_what_to_do(stopped: Path, ended: str, words: str) -> None:
    planned = '{"time": "2026-01-01T00:00:00Z", "event": "Planned", "pending": 6, "total": 6, "spans": 3, "workers": 1, "follows": false}'
    (stopped / "log" / "run.jsonl").write_text(f"{planned}\n{ended}\n")
    says(lca("status", stopped).stdout, words, "stopped: run `lca run` again to finish")


def test_the_last_call_is_found_in_a_log_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results.local_files, "_BLOCK_FROM_THE_END", 64)
    (tmp_path / "log").mkdir()
    lines = [{"event": "Started"}]
    for call in range(3):
        lines.append(
            {
                "event": "Planned",
                "time": "2026-01-01T00:00:00Z",
                "pending": 100 + call,
                "workers": 2,
                "follows": False,
            }
        )
        lines += [{"event": "SpanDone", "segments": 4, "losses": ["a", "b"]}] * (5 + call)
        lines.append({"event": "Ended", "error": f"call {call}"})
    (tmp_path / "log" / "run.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    last = results.last_run(tmp_path)
    assert last is not None
    assert (last.pending, last.done, last.ended) == (102, 56, "call 2")


def test_silence_is_a_listener() -> None:
    assert silent(Note("nobody reads this")) is None
    assert stderr().file is not None
    assert isinstance(views.view_for(stderr(), 0.0), Lines)
