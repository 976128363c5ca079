"""Scheduler, workers and driver in network namespaces of their own: other addresses, a wire between
them, and the wire cut.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lca_posthoc
from tests.helpers.dask_cluster import Standing, end, standing
from tests.helpers.faults import clean_runs
from tests.helpers.object_server import SECRETS, plain_server

ADDRESSES = {
    "scheduler": "10.77.0.1",
    "one": "10.77.0.2",
    "other": "10.77.0.3",
    "driver": "10.77.0.4",
}
# after which a silent peer is given up; the least there is, 30 s unless told
NOTICED = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "11s"}
SPANS = 24


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


class Net:
    """A namespace for each, all wired to a bridge in that of the scheduler; the host's own network
    is not touched.
    """

    def __init__(self) -> None:
        self.names = {who: f"lca-{os.getpid()}-{who}" for who in ADDRESSES}

    def lay(self) -> None:
        sweep()
        for name in self.names.values():
            made = ip("netns", "add", name)
            if made.returncode:
                pytest.skip(f"cannot make a network namespace: {made.stderr.strip()}")
        self._in("scheduler", "link", "add", "bridge", "type", "bridge")
        for who, address in ADDRESSES.items():
            if who != "scheduler":
                peer = ("peer", "name", "wire", "netns", self.names[who])
                self._in("scheduler", "link", "add", who, "type", "veth", *peer)
                self._in("scheduler", "link", "set", who, "master", "bridge", "up")
            here = "bridge" if who == "scheduler" else "wire"
            self._in(who, "addr", "add", f"{address}/24", "dev", here)
            self._in(who, "link", "set", here, "up")
            self._in(who, "link", "set", "lo", "up")

    def set(self, who: str, state: str) -> None:
        """The wire of somebody "up" or "down"."""
        self._in("scheduler", "link", "set", who, state)

    def inside(self, who: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[who]]

    def _in(self, who: str, *words: str) -> None:
        made = ip("-n", self.names[who], *words)
        assert made.returncode == 0, (words, made.stderr)


def sweep() -> None:
    """Remove the namespaces of tests that were killed."""
    for line in ip("netns", "list").stdout.splitlines():
        first, _, rest = line.partition(" ")[0].partition("-")
        pid = rest.partition("-")[0]
        if first == "lca" and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            ip("netns", "del", line.partition(" ")[0])


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    made = Net()
    try:
        made.lay()
        yield made
    finally:
        for name in made.names.values():
            ip("netns", "del", name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training whose replay takes a while, for its loss is over many examples, and its
    undisturbed run.
    """
    made = clean_runs.lay_out(tmp_path_factory.mktemp("place"), SPANS * clean_runs.SPAN)
    heavier(made / "small_task.py")
    clean_runs.finish(made, made / "clean.lca")
    return made


def heavier(file: Path) -> None:
    text = file.read_text()
    for few, many in (("(40, 64,", "(8_000, 64,"), ("(40,)", "(8_000,)"), ("30", "5_000")):
        assert few in text
        text = text.replace(few, many)
    file.write_text(text)


@contextlib.contextmanager
def pair(net: Net, place: Path) -> Iterator[Standing]:
    """A worker on each of two hosts."""
    address = ADDRESSES["scheduler"]
    with standing(place, host=address, prefix=net.inside("scheduler"), **NOTICED) as made:
        for who in ("one", "other"):
            made.hire("--name", who, "--host", ADDRESSES[who], prefix=net.inside(who), **NOTICED)
        yield made


@pytest.fixture(scope="module")
def hosts(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    with pair(net, tmp_path_factory.mktemp("cluster")) as made:
        yield made


def drive(net: Net, made: Standing, place: Path, out: Path) -> subprocess.Popen[str]:
    options = (*made.options, "--insecure", "--workers", 2)
    return clean_runs.start(
        [*net.inside("driver"), *clean_runs.command(place, out, *options)], **NOTICED
    )


def events(out: Path) -> list[dict[str, Any]]:
    file = out / "log" / "run.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def told(out: Path, what: str) -> int:
    return sum(event["event"] == what for event in events(out))


def lost(out: Path) -> int:
    """Spans whose worker was out of reach: tried again, or found committed although nobody could
    say so.
    """
    return sum(
        event["event"] == "SpanRetried"
        or (event["event"] == "SpanDone" and event["peak_bytes"] == 0)
        for event in events(out)
    )


def who_worked(out: Path) -> set[str]:
    return {
        event["worker"].partition(" ")[0] for event in events(out) if event["event"] == "SpanDone"
    }


def waited(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    while not ready():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
            raise AssertionError(process.communicate())


def ended(process: subprocess.Popen[str]) -> str:
    """What it said, once it is over and all is well."""
    try:
        _, said = process.communicate(timeout=90)
    finally:
        end(process)  # type: ignore[arg-type]
    assert process.returncode == 0, said
    return said


@pytest.mark.moment
def test_hosts_of_their_own_give_the_bytes_of_this_process(
    net: Net, hosts: Standing, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.lca"
    assert hosts.address.startswith(f"tcp://{ADDRESSES['scheduler']}:")
    ended(drive(net, hosts, place, out))
    clean_runs.same_bytes(out, place / "clean.lca")
    assert who_worked(out) == {"one", "other"}


@pytest.mark.moment
def test_a_wire_that_is_cut_for_a_moment_costs_nothing(
    net: Net, hosts: Standing, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.lca"
    process = drive(net, hosts, place, out)
    waited(process, lambda: told(out, "SpanDone") >= 4)
    net.set("one", "down")
    before = told(out, "SpanDone")
    waited(process, lambda: told(out, "SpanDone") >= before + 2)
    net.set("one", "up")
    ended(process)
    clean_runs.same_bytes(out, place / "clean.lca")
    assert told(out, "SpanRetried") == told(out, "SpanFailed") == 0


@pytest.mark.moment
def test_a_wire_that_stays_cut_loses_the_worker_and_no_number(
    net: Net, hosts: Standing, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.lca"
    process = drive(net, hosts, place, out)
    waited(process, lambda: told(out, "SpanDone") >= 4)
    net.set("one", "down")
    waited(process, lambda: lost(out) == 1)
    net.set("one", "up")
    said = ended(process)
    clean_runs.same_bytes(out, place / "clean.lca")
    assert said.count("is retried: its worker died or cannot be reached (one") == told(
        out, "SpanRetried"
    )


@pytest.mark.moment
def test_without_any_wire_left_the_run_waits_for_workers_that_are_started_again(
    net: Net, place: Path, tmp_path: Path
) -> None:
    """A worker whose scheduler is out of reach for so long ends itself, and its nanny with it."""
    out = tmp_path / "out.lca"
    with pair(net, tmp_path / "cluster") as made:
        process = drive(net, made, place, out)
        waited(process, lambda: told(out, "SpanDone") >= 4)
        for who in ("one", "other"):
            net.set(who, "down")
        waited(process, lambda: lost(out) == 2)
        for worker in made.workers:
            worker.wait(timeout=60)
        for who in ("one", "other"):
            net.set(who, "up")
        made.hire(
            "--name", "again", "--host", ADDRESSES["other"], prefix=net.inside("other"), **NOTICED
        )
        said = ended(process)
    clean_runs.same_bytes(out, place / "clean.lca")
    assert said.count("is retried: its worker died or cannot be reached") == told(
        out, "SpanRetried"
    )
    assert "again" in who_worked(out)


IN_THE_CLOUD = """
import sys
from pathlib import Path
from lca_posthoc.checkpoints.paths import path_of
from lca_posthoc.results import disk
from tests.helpers.faults.clean_runs import same_bytes
match sys.argv[1:]:
    case "upload", here, there:
        for file in sorted(Path(here).iterdir()):
            disk.write_whole(path_of(there) / file.name, file.read_bytes(), durable=True)
    case "compare", out, clean:
        same_bytes(path_of(out), Path(clean))
        print(sum(1 for _ in disk.walk(path_of(out))))
"""


@pytest.mark.moment
def test_without_a_shared_disk_all_goes_through_the_object_store(
    net: Net, place: Path, tmp_path: Path
) -> None:
    """Neither worker sees a file of the driver: checkpoints are read from a store and results are
    written to it.
    """
    address = ADDRESSES["scheduler"]
    hidden = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(place))
    tried = subprocess.run([*hidden, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"cannot hide a directory from a process: {tried.stderr.strip()}")
    with plain_server(address, net.inside("scheduler")) as port:
        environment = {
            **NOTICED,
            "AWS_ACCESS_KEY_ID": SECRETS[0],
            "AWS_SECRET_ACCESS_KEY": SECRETS[1],
            "AWS_ENDPOINT_URL": f"http://{address}:{port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "PYTHONPATH": str(Path(lca_posthoc.__file__).parents[1]),
        }

        def in_the_cloud(*words: object) -> None:
            command = [*net.inside("driver"), sys.executable, "-c", IN_THE_CLOUD, *map(str, words)]
            done = subprocess.run(
                command,
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr

        bucket = f"http://{address}:{port}/lca"
        made = subprocess.run(
            [*net.inside("driver"), sys.executable, "-c", CREATE, bucket], check=False
        )
        assert made.returncode == 0
        in_the_cloud("upload", place / "checkpoints", "s3://lca/checkpoints")
        with standing(
            tmp_path / "cluster", host=address, prefix=net.inside("scheduler"), **environment
        ) as cluster:
            for who in ("one", "other"):
                cluster.hire(
                    *("--name", who, "--host", ADDRESSES[who]),
                    prefix=[*net.inside(who), *hidden],
                    **environment,
                )
            command = clean_runs.command(
                place,
                Path("run.lca"),
                *(*cluster.options, "--insecure", "--workers", 2),
            )
            command = [URLS.get(Path(word).name, word) for word in command]
            ended(clean_runs.start([*net.inside("driver"), *command], **environment))
        in_the_cloud("compare", URLS["run.lca"], place / "clean.lca")


CREATE = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], method='PUT'))"
URLS = {"checkpoints": "s3://lca/checkpoints", "run.lca": "s3://lca/run.lca"}
