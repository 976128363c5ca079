"""Where work runs: one suite for this process and for local workers."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
import pytest
from distributed import Status

from lca_posthoc.cluster import Cluster, ClusterConfig, Done, Lost, Retried, Spec, open_cluster
from lca_posthoc.cluster import dask_client as scheduler_module
from lca_posthoc.cluster import dask_local as local_module
from lca_posthoc.cluster.dask_local import gpu_environments, local_workers
from lca_posthoc.errors import ResourceError


def square(spec: Spec) -> int:
    return spec["value"] ** 2


def fail(spec: Spec) -> int:
    raise RuntimeError(f"cannot take {spec['value']}")


def die_once(spec: Spec) -> str:
    """Ends its process the first time it is called."""
    try:
        Path(spec["flag"]).touch(exist_ok=False)
    except FileExistsError:
        return "survived"
    os._exit(1)


def die(spec: Spec) -> None:
    with Path(spec["log"]).open("a") as file:
        file.write("x")
    os._exit(1)


def stop_and_wait(spec: Spec) -> str:
    """Says that it runs, then runs until the driver has asked to drain."""
    Path(spec["running"]).touch()
    while not Path(spec["release"]).exists():
        os.sched_yield()
    return "finished"


@pytest.fixture(scope="module", params=["inline", "local"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with open_cluster(
        ClusterConfig(request.param, 2 if request.param == "local" else None),
        "cpu",
        threading.Event(),
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def local() -> Iterator[Cluster]:
    with open_cluster(ClusterConfig("local", 2), "cpu", threading.Event()) as opened:
        yield opened


def test_every_spec_has_one_outcome(cluster: Cluster) -> None:
    outcomes = list(cluster.map(square, ({"value": value} for value in range(20))))
    assert sorted((done.spec["value"], done.result) for done in outcomes) == [
        (value, value**2) for value in range(20)
    ]
    assert all(isinstance(outcome, Done) for outcome in outcomes)


def test_specs_are_taken_only_when_there_is_room(cluster: Cluster) -> None:
    taken: list[int] = []
    outcomes = cluster.map(
        square, ({"value": value} for value in range(100) if taken.append(value) is None)
    )
    next(outcomes)
    assert len(taken) <= 2 * cluster.crew().workers + 1
    assert len(list(outcomes)) == 99


def test_specs_may_follow_from_outcomes(cluster: Cluster) -> None:
    """Each of the first three calls for the square of its result; until then there is none."""
    ready, awaited = [{"value": value} for value in (5, 6, 7)], 3

    def coming() -> Iterator[Spec | None]:
        while ready or awaited:
            yield ready.pop() if ready else None

    results = []
    for outcome in cluster.map(square, coming()):
        assert isinstance(outcome, Done)
        results.append(outcome.result)
        if outcome.spec["value"] in (5, 6, 7):
            ready.append({"value": outcome.result})
            awaited -= 1
    assert sorted(results) == [25, 36, 49, 625, 1296, 2401]


def test_no_specs_give_no_outcomes(cluster: Cluster) -> None:
    assert list(cluster.map(square, [])) == []


@pytest.mark.moment
def test_a_worker_that_dies_once_costs_a_second_try(local: Cluster, tmp_path: Path) -> None:
    retried, done = local.map(die_once, [{"flag": str(tmp_path / "flag")}])
    assert isinstance(retried, Retried)
    assert retried.why == "its worker died or cannot be reached"
    assert isinstance(done, Done)
    assert done.result == "survived"


@pytest.mark.moment
def test_a_spec_that_kills_its_workers_is_lost_after_two_tries_and_the_rest_goes_on(
    local: Cluster, tmp_path: Path
) -> None:
    _, lost = local.map(die, [{"log": str(tmp_path / "log")}])
    assert isinstance(lost, Lost)
    assert lost.why == "its worker died or cannot be reached"
    assert (tmp_path / "log").read_text() == "xx"
    assert [done.result for done in local.map(square, [{"value": 3}])] == [9]


def test_an_exception_nobody_caught_is_said(local: Cluster) -> None:
    _, lost = local.map(fail, [{"value": 7}])
    assert isinstance(lost, Lost)
    assert lost.why == "RuntimeError: cannot take 7"


@pytest.mark.moment
def test_draining_finishes_what_runs_and_starts_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, release = threading.Event(), tmp_path / "release"
    names = ("first", "second", "third")
    original = scheduler_module._event

    class Told:
        """Lets the first spec end only when every worker can know that the driver drains."""

        def __init__(self, name: str, client: Any) -> None:
            self._event = original(name, client)

        def set(self) -> None:
            self._event.set()
            release.touch()

    def ask() -> None:
        while not (tmp_path / "first").exists():
            os.sched_yield()
        stop.set()

    monkeypatch.setattr(scheduler_module, "_event", Told)
    asking = threading.Thread(target=ask)
    asking.start()
    with open_cluster(ClusterConfig("local", 1), "cpu", stop) as opened:
        specs = [{"running": str(tmp_path / name), "release": str(release)} for name in names]
        outcomes = list(opened.map(stop_and_wait, specs))
    asking.join()
    assert [done.result for done in outcomes] == ["finished", None]
    assert [name for name in names if (tmp_path / name).exists()] == ["first"]


def test_every_listener_is_on_loopback(local: Cluster) -> None:
    driver = psutil.Process()
    listening = [
        connection.laddr.ip
        for process in (driver, *driver.children(recursive=True))
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize(
    ("inherited", "devices"),
    [
        ("3,5", ["3", "5"]),
        (" 1 , 0 ", ["1", "0"]),
        ("GPU-8f2c,GPU-11aa", ["GPU-8f2c", "GPU-11aa"]),
        ("MIG-GPU-8f2c/1/0,MIG-4d1e", ["MIG-GPU-8f2c/1/0", "MIG-4d1e"]),
        ("0,-1,2", ["0"]),
        ("0,,2", ["0"]),
    ],
)
def test_inherited_gpus_are_split_and_never_renumbered(
    inherited: str, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    assert gpu_environments() == [{"CUDA_VISIBLE_DEVICES": device} for device in devices]
    assert local_workers("cuda") == len(devices)


@pytest.mark.parametrize("inherited", ["", "-1", "NoDevFiles"])
def test_no_visible_gpu_is_a_failure_of_the_environment(
    inherited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    with pytest.raises(ResourceError, match="no GPU is visible"):
        gpu_environments()


def seen(spec: Spec) -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_each_local_worker_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker is told; what a GPU makes of it is for machines that have one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,MIG-4d1e")
    with open_cluster(ClusterConfig("local"), "cuda", threading.Event()) as opened:
        assert opened.crew().workers == 2
        opened.settle_on("cuda")
        outcomes = list(opened.map(seen, [{} for _ in range(8)]))
    assert {outcome.result for outcome in outcomes if isinstance(outcome, Done)} == {
        "7",
        "MIG-4d1e",
    }


def test_the_dashboard_is_on_loopback_and_only_when_asked_for() -> None:
    with open_cluster(
        ClusterConfig("local", 1, dashboard=True), "cpu", threading.Event()
    ) as opened:
        dashboard = opened.crew().dashboard
        assert dashboard is not None
        assert urlsplit(dashboard).hostname == "127.0.0.1"
        assert urlopen(dashboard, timeout=30).status == 200
        listening = [
            each.laddr.ip
            for each in psutil.Process().net_connections()
            if each.status == psutil.CONN_LISTEN
        ]
        assert set(listening) <= {"127.0.0.1", "::1"}
    with open_cluster(ClusterConfig("local", 1), "cpu", threading.Event()) as opened:
        assert opened.crew().dashboard is None


@pytest.mark.moment
def test_a_worker_that_dies_whenever_it_starts_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills every worker process until a nanny gives up that never had a connected one."""
    settings = {**local_module._SETTINGS, "distributed.deploy.lost-worker-timeout": "1s"}
    monkeypatch.setattr(local_module, "_SETTINGS", settings)
    of_others = {child.pid for child in psutil.Process().children(recursive=True)}
    with open_cluster(ClusterConfig("local", 1), "cpu", threading.Event()) as opened:
        (first,) = [done.result for done in opened.map(process, [{}]) if isinstance(done, Done)]
        nannies = opened.replace.cluster.workers  # type: ignore[attr-defined]
        while not any(nanny.status == Status.failed for nanny in list(nannies.values())):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.pid not in of_others and "spawn_main" in " ".join(child.cmdline()):
                        child.kill()
            if not nannies:  # Dask has forgotten the last one, and one more may be started
                opened.replace()  # type: ignore[attr-defined]
        (second,) = [done.result for done in opened.map(process, [{}]) if isinstance(done, Done)]
    assert second != first


def process(spec: Spec) -> int:
    return os.getpid()
