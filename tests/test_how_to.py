"""The commands of docs/how-to and of the tutorial: blocks marked `run` are run in order, after the
files marked `file=` before them.

What the tutorial shows as `seen` is compared with what is seen here.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lca_posthoc
from lca_posthoc.cli import COMMANDS
from tests.helpers.faults import clean_runs
from tests.helpers.forked_python import program, programs

DOCS = Path(__file__).parents[1] / "docs"
TEXTS = {
    page.stem: page.read_text()
    for page in (*sorted((DOCS / "how-to").glob("*.md")), DOCS / "tutorial.md")
}
BLOCK = re.compile(r"^```(\w+) (run|seen|file=[\w.]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")
ELSEWHERE = {"slurm", "dask-cuda", "kubernetes"}
END = "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n"


def blocks(page: str, mark: str) -> list[str]:
    return [text for _, found, text in BLOCK.findall(TEXTS[page]) if found == mark]


def script(page: str) -> str:
    """What a reader of the page types and saves, in order, for bash."""
    steps = []
    for language, mark, text in BLOCK.findall(TEXTS[page]):
        if mark.startswith("file="):
            steps.append(
                f"cat > {mark.removeprefix('file=')} <<'END OF BLOCK'\n{text}END OF BLOCK\n"
            )
        elif mark == "run":
            steps.append(
                text if language == "sh" else f"python - <<'END OF BLOCK'\n{text}END OF BLOCK\n"
            )
    return END + "\n".join(steps)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a page is followed: checkpoints, and a task file under the name the pages give it."""
    clean_runs.lay_out(tmp_path, 24)
    (tmp_path / "small_task.py").rename(tmp_path / "my_task.py")
    return tmp_path


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


@contextlib.contextmanager
def following(place: Path, arguments: list[str], **more: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has the commands of this environment, with all it started ended afterwards."""
    path = os.pathsep.join(
        [
            *map(str, (place / "bin", programs(), Path(sys.executable).parent)),
            os.environ["PATH"],
        ]
    )
    package = str(Path(lca_posthoc.__file__).parents[1])
    given = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": package,
        "HEAD": "127.0.0.1",
        "HERE": "127.0.0.1",
        "PORT": str(free_port()),
    }
    process = subprocess.Popen(
        arguments,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**given, **more},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def said(place: Path, arguments: list[str], code: int = 0, **more: str) -> str:
    # what was started in the background may outlive the script and hold a pipe open
    file = place / "said"
    with (
        file.open("w") as out,
        following(
            place, ["sh", "-c", f'exec "$@" > {file} 2>&1', "sh", *arguments], **more
        ) as process,
    ):
        assert process.wait(timeout=240) == code, (out.flush(), file.read_text())[1]
    return file.read_text()


@pytest.mark.parametrize(
    "page", [page for page in TEXTS if page not in {*ELSEWHERE, "cluster", "tutorial"}]
)
def test_a_page_can_be_followed(page: str, place: Path) -> None:
    assert blocks(page, "run")
    said(place, ["bash", "-euc", script(page)])


def numbers(text: str) -> list[float]:
    return [float(each.replace(",", "")) for each in NUMBER.findall(text)]


def shape(text: str) -> str:
    """Its words, with a sign in the place of every number and one space between them."""
    return " ".join(NUMBER.sub("#", text).split())


def test_the_tutorial_can_be_followed_from_an_empty_directory_and_shows_what_is_seen(
    tmp_path: Path,
) -> None:
    heard = said(tmp_path, ["bash", "-euc", script("tutorial")])
    shown = blocks("tutorial", "seen")
    assert len(shown) >= 3
    for each in shown:
        before, found, _ = shape(heard).partition(shape(each))
        assert found, (each, heard)
        start = before.count("#")
        there = numbers(heard)[start : start + len(numbers(each))]
        assert there == pytest.approx(numbers(each), rel=0.05, abs=0.02), each


LISTENERS = """
import os
import psutil

for process in psutil.process_iter():
    try:
        found = process.net_connections() if os.getsid(process.pid) == os.getsid(0) else []
    except (psutil.Error, ProcessLookupError):
        found = []
    for each in found:
        if each.status == "LISTEN":
            print("listens on", each.laddr.ip, each.laddr.port, *process.cmdline()[:4])
"""


def test_the_page_about_several_hosts_can_be_followed_and_nothing_listens_beyond_its_addresses(
    place: Path,
) -> None:
    (place / "listeners.py").write_text(LISTENERS)
    heard = said(
        place, ["bash", "-euc", END + "\n".join([*blocks("cluster", "run"), "python listeners.py"])]
    )
    found = re.findall(r"^listens on (\S+)", heard, re.MULTILINE)
    # scheduler, two nannies, two workers: each its own protocol, most the web as well
    assert len(found) >= 8, heard
    assert set(found) == {"127.0.0.1"}


def test_every_page_says_what_was_run_and_what_was_not() -> None:
    for page, text in TEXTS.items():
        assert "*Run for this page:*" in text, page
        assert "*Not run:*" in text or "*Run for this page:* nothing" in text, page


def test_options_in_the_pages_are_those_of_the_commands() -> None:
    """Also in the blocks nobody runs."""
    for command in COMMANDS:
        known = subprocess.run(
            [program("lca"), command, "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for page, text in TEXTS.items():
            for line in re.findall(
                rf"^\s*(?:[A-Z_]+=\S+ )*lca {command} (?:.*\\\n)*.*", text, re.MULTILINE
            ):
                for option in re.findall(r"(?<!\S)--[a-z-]+", line.partition("#")[0]):
                    assert option in known, (page, line)


# --- SLURM, with stand-ins for its commands -------------------------------------------------------

SRUN = '#!/bin/sh\nexec "$@"\n'
SBATCH = """#!/bin/sh
cp "$1" "$JOBS/$$.sh"
setsid sh "$JOBS/$$.sh" > "$JOBS/$$.log" 2>&1 &
echo $! > "$JOBS/$$.pid"
echo "Submitted batch job $$"
"""
SCANCEL = '#!/bin/sh\nkill -TERM -- "-$(cat "$JOBS/$1.pid")"\n'


@pytest.fixture
def slurm(place: Path) -> Path:
    """The page's files beside checkpoints, a task and certificates, and commands that start what
    they are given here.
    """
    (place / "bin").mkdir()
    (place / "jobs").mkdir()
    for name, text in (("srun", SRUN), ("sbatch", SBATCH), ("scancel", SCANCEL)):
        (place / "bin" / name).write_text(text)
        (place / "bin" / name).chmod(0o755)
    certificates = blocks("cluster", "run")[0]
    said(place, ["bash", "-euc", certificates])
    for name in ("replay.sh", "replay.py"):
        (place / name).write_text(blocks("slurm", f"file={name}")[0])
    return place


def test_the_batch_script_replays(slurm: Path) -> None:
    said(slurm, ["bash", "replay.sh"], SLURM_JOB_ID="7")
    clean_runs.same_bytes(slurm / "run.lca", undisturbed(slurm))
    assert not (slurm / "scheduler-7.json").exists()


@pytest.mark.moment
def test_the_batch_script_that_is_told_to_end_stops_in_time_and_goes_on_when_submitted_again(
    slurm: Path,
) -> None:
    task = slurm / "my_task.py"
    slower = (
        task.read_text()
        .replace("(40, 64,", "(100_000, 64,")
        .replace("(40,)", "(100_000,)")
        .replace("30", "90_000")
    )
    task.write_text(slower)
    markers = slurm / "run.lca" / "commits" / "train"
    with following(
        slurm, ["bash", "-c", "exec bash replay.sh > said 2>&1"], SLURM_JOB_ID="7"
    ) as process:
        while not (markers.is_dir() and any(markers.iterdir())):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.02)
                raise AssertionError((slurm / "said").read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143, (slurm / "said").read_text()
    said(slurm, ["bash", "replay.sh"], SLURM_JOB_ID="8")
    clean_runs.same_bytes(slurm / "run.lca", undisturbed(slurm))


def test_jobs_of_dask_jobqueue_replay_and_their_script_is_the_one_of_the_page(slurm: Path) -> None:
    try:
        heard = said(slurm, ["python", "replay.py", "2"], JOBS=str(slurm / "jobs"))
    finally:
        for file in (slurm / "jobs").glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(file.read_text()), signal.SIGKILL)
    clean_runs.same_bytes(slurm / "run.lca", undisturbed(slurm))
    (script, *_) = [file.read_text() for file in (slurm / "jobs").glob("*.sh")]
    for line in (
        "#SBATCH -n 1",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH -t 04:00:00",
        "#SBATCH --gres=gpu:1",
    ):
        assert line in script.splitlines(), script
        assert line in heard
    (worker,) = [line for line in script.splitlines() if "dask_worker" in line]
    # the last one counts
    assert worker.index("--memory-limit 0") > worker.index("--memory-limit 2")
    for option in (
        "tls://",
        "--nthreads 1",
        "--resources GPU=1",
        "--lifetime 220m",
        "--lifetime-stagger 10m",
        "--tls-key",
    ):
        assert option in worker, worker
    assert script.index("export MALLOC_TRIM_THRESHOLD_=268435456") < script.index(worker)


def undisturbed(place: Path) -> Path:
    clean = place / "clean.lca"
    lca_posthoc.run(
        place / "checkpoints",
        place / "my_task.py",
        out=clean,
        cluster="inline",
        span=lca_posthoc.open_run(place / "run.lca").manifest.span,
    )
    return clean
