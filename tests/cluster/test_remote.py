"""Workers of a scheduler somebody else started: reaching them, being turned away, coming and
going.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lca_posthoc.cluster import (
    ClusterConfig,
    Done,
    Lost,
    Refused,
    Retried,
    Slow,
    Spec,
    Waiting,
    assignments,
    open_cluster,
)
from lca_posthoc.cluster import dask_remote as remote_module
from lca_posthoc.errors import InputError, ResourceError
from tests.helpers.dask_cluster import Standing, certificates, end, standing


def pid(spec: Spec) -> int:
    return os.getpid()


def meet(spec: Spec) -> int:
    """Says who it is and ends when everybody expected has come; a later spec finds them there
    already.
    """
    Path(spec["place"], str(os.getpid())).touch()
    while len(list(Path(spec["place"]).iterdir())) < spec["expected"]:
        os.sched_yield()
    return os.getpid()


def until_released(spec: Spec) -> str:
    with Path(spec["log"]).open("a") as log:
        log.write(f"{spec['value']}\n")
    while not Path(spec["release"]).exists():
        os.sched_yield()
    Path(spec["done"]).touch()
    return "finished"


def imported(spec: Spec) -> list[str]:
    return [name for name in ("torch", "zarr") if name in sys.modules]


def unfit(spec: Spec) -> dict[str, str]:
    first = Path(spec["flag"])
    if first.exists():
        return {"error": "has nothing to say"}
    first.touch()
    return {"fit": "yes"}


def silent(spec: Spec) -> dict[str, str]:
    """The second to be asked does not answer before everything else is done."""
    if Path(spec["flag"]).exists():
        while not Path(spec["over"]).exists():
            os.sched_yield()
    Path(spec["flag"]).touch()
    return {"fit": "yes"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    with standing(tmp_path_factory.mktemp("pair"), 2) as made:
        yield made


def opened(where: ClusterConfig | str, stop: threading.Event | None = None) -> Any:
    where = ClusterConfig(where, 1) if isinstance(where, str) else where
    return open_cluster(where, "cpu", stop or threading.Event())


def results(outcomes: Any) -> list[Any]:
    return [outcome.result for outcome in outcomes if isinstance(outcome, Done)]


@pytest.mark.parametrize("by", ["address", "file"])
def test_work_is_done_on_the_workers_at_an_address(pair: Standing, by: str) -> None:
    kind = pair.address if by == "address" else f"file:{pair.place / 'scheduler.json'}"
    with opened(ClusterConfig(kind, 2)) as cluster:
        crew = cluster.crew()
        assert crew.workers == crew.max_per_host == 2
        assert str(crew.dashboard).startswith("http://127.0.0.1:")
        pids = set(results(cluster.map(pid, [{} for _ in range(12)])))
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_the_scheduler_imports_no_torch_and_nothing_of_the_user(pair: Standing) -> None:
    with opened(pair.address) as cluster:
        list(cluster.map(imported, [{}]))
        found = cluster._scheduler.client.run_on_scheduler(
            lambda: [
                name
                for name in sys.modules
                if name in ("torch", "zarr", "tests", "lca_posthoc.replay.worker")
            ]
        )
    assert found == []


def test_what_is_delivered_is_there_and_gone_afterwards(pair: Standing) -> None:
    with opened(ClusterConfig(pair.address, 2)) as cluster:
        key = cluster.deliver(b"parcel")
        assert set(results(cluster.map(lookup, [{"key": key}] * 4))) == {b"parcel"}
    with opened(ClusterConfig(pair.address, 2)) as cluster:
        assert set(results(cluster.map(lookup, [{"key": key}] * 4))) == {None}


def lookup(spec: Spec) -> bytes | None:
    from lca_posthoc.cluster import delivered

    try:
        return delivered(spec["key"])
    except KeyError:
        return None


@pytest.mark.moment
def test_a_late_worker_takes_part_and_finds_what_was_delivered(tmp_path: Path) -> None:
    with standing(tmp_path / "cluster", 1) as made, opened(made.address) as cluster:
        key = cluster.deliver(b"parcel")
        cluster.check_workers(pid_answer, {})
        meeting = tmp_path / "meeting"
        meeting.mkdir()
        outcomes = cluster.map(meet, [{"place": str(meeting), "expected": 2}] * 6)
        made.hire()
        assert len(set(results(outcomes))) == 2
        assert set(results(cluster.map(lookup, [{"key": key}] * 6))) == {b"parcel"}


def pid_answer(spec: Spec) -> dict[str, int]:
    return {"pid": os.getpid()}


def heard_with_one_more(made: Standing, cluster: Any, tmp_path: Path) -> list[Any]:
    """What is heard while three specs wait for a worker to be hired and refused."""
    release = tmp_path / "release"
    spec = {
        "log": str(tmp_path / "log"),
        "release": str(release),
        "done": str(tmp_path / "done"),
        "value": 0,
    }
    made.hire()
    heard: list[Any] = []
    for outcome in cluster.map(until_released, [spec] * 3):
        heard.append(outcome)
        if isinstance(outcome, Refused):
            release.touch()
    return heard


def test_a_late_worker_that_is_unfit_is_named_and_given_nothing(tmp_path: Path) -> None:
    with standing(tmp_path / "cluster", 1) as made, opened(made.address) as cluster:
        (only,) = results(cluster.map(pid, [{}]))
        assert list(cluster.check_workers(unfit, {"flag": str(tmp_path / "flag")}).values()) == [
            {"fit": "yes"}
        ]
        heard = heard_with_one_more(made, cluster, tmp_path)
        assert [type(outcome) for outcome in heard] == [Refused, Done, Done, Done]
        assert heard[0].why == "has nothing to say"
        assert set(results(cluster.map(pid, [{}] * 4))) == {only}


@pytest.mark.moment
def test_a_late_worker_that_does_not_answer_is_named_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with standing(tmp_path / "cluster", 1) as made, opened(made.address) as cluster:
        cluster.check_workers(
            silent, {"flag": str(tmp_path / "flag"), "over": str(tmp_path / "over")}
        )
        monkeypatch.setattr(assignments, "ANSWER_SECONDS", 3.0)
        heard = heard_with_one_more(made, cluster, tmp_path)
        (tmp_path / "over").touch()
    assert [type(outcome) for outcome in heard] == [Refused, Done, Done, Done]
    assert "did not answer" in heard[0].why


@pytest.mark.moment
def test_who_joins_while_a_first_question_is_put_is_asked_again_for_the_next(
    tmp_path: Path,
) -> None:
    """A worker that came too late for one piece of work is not forgotten for the next."""
    with standing(tmp_path / "cluster", 1) as made, opened(made.address) as cluster:
        cluster.check_workers(pid_answer, {})
        made.hire()
        cluster._scheduler.client.wait_for_workers(2)
        list(cluster.map(pid, [{}]))
        meeting = tmp_path / "meeting"
        meeting.mkdir()
        assert (
            len(set(results(cluster.map(meet, [{"place": str(meeting), "expected": 2}] * 6)))) == 2
        )


@pytest.mark.moment
def test_a_worker_that_is_told_to_go_finishes_and_nothing_is_done_twice(tmp_path: Path) -> None:
    with standing(tmp_path / "cluster", 1) as made, opened(made.address) as cluster:
        release, log = tmp_path / "release", tmp_path / "log"
        specs = [
            {
                "value": value,
                "log": str(log),
                "release": str(release),
                "done": str(tmp_path / f"done-{value}"),
            }
            for value in range(4)
        ]
        (first,) = cluster._members.able
        over = threading.Event()

        def retire() -> None:
            while not log.exists():
                os.sched_yield()
            made.hire()
            cluster._scheduler.client.wait_for_workers(2)
            cluster._scheduler.client.retire_workers([first])
            release.touch()
            over.wait()  # a process ends with the thread that started it

        leaving = threading.Thread(target=retire)
        leaving.start()
        settled = lambda spec: "settled" if Path(spec["done"]).exists() else None  # noqa: E731
        outcomes = list(cluster.map(until_released, specs, settled))
        over.set()
        leaving.join()
    assert not [outcome for outcome in outcomes if isinstance(outcome, Retried | Lost)]
    assert len(results(outcomes)) == 4
    assert sorted(log.read_text().split()) == ["0", "1", "2", "3"]


@pytest.mark.moment
def test_what_merely_waited_on_a_worker_that_died_is_not_held_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two deaths lose a spec; the one that waited behind it each time is done."""
    with standing(tmp_path / "cluster", 1) as made, opened(made.address) as cluster:
        outcomes = list(
            cluster.map(die_if_told, [{"die": True, "value": 0}, {"die": False, "value": 1}])
        )
    assert [outcome.spec["value"] for outcome in outcomes if isinstance(outcome, Lost)] == [0]
    assert results(outcomes) == [1]
    assert [outcome.spec["value"] for outcome in outcomes if isinstance(outcome, Retried)] == [0]


def die_if_told(spec: Spec) -> int:
    if spec["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return spec["value"]


@pytest.mark.moment
def test_without_any_worker_left_it_waits_and_then_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignments, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(assignments, "ALONE_SECONDS", 1.0)
    with standing(tmp_path / "cluster", 1) as made, opened(made.address) as cluster:
        spec = {
            "value": 0,
            "log": str(tmp_path / "log"),
            "release": str(tmp_path / "no"),
            "done": str(tmp_path / "done"),
        }
        outcomes = cluster.map(until_released, [spec])
        threading.Thread(target=lambda: (_wait_for(tmp_path / "log"), end(made.workers[0]))).start()
        assert [type(next(outcomes)), type(next(outcomes))] == [Retried, Waiting]
        with pytest.raises(ResourceError, match="no worker is left"):
            next(outcomes)


def _wait_for(file: Path) -> None:
    while not file.exists():
        os.sched_yield()


@pytest.mark.moment
def test_a_scheduler_that_goes_is_said_to_be_gone(tmp_path: Path) -> None:
    with standing(tmp_path / "cluster", 1) as made, opened(made.address) as cluster:
        cluster.deliver(b"parcel")
        spec = {
            "value": 0,
            "log": str(tmp_path / "log"),
            "release": str(tmp_path / "no"),
            "done": str(tmp_path / "done"),
        }
        threading.Thread(target=lambda: (_wait_for(tmp_path / "log"), end(made.scheduler))).start()
        with pytest.raises(ResourceError, match=r"scheduler is gone.*run the same command again"):
            list(cluster.map(until_released, [spec]))


@pytest.mark.moment
def test_a_spec_that_takes_far_longer_than_its_peers_is_named_with_what_it_does(
    pair: Standing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignments, "SLOW_SECONDS", 1.0)
    release = tmp_path / "release"
    with opened(ClusterConfig(pair.address, 2)) as cluster:
        list(cluster.map(pid, [{}] * 4))
        spec = {
            "value": 0,
            "log": str(tmp_path / "log"),
            "release": str(release),
            "done": str(tmp_path / "done"),
        }
        heard = []
        monkeypatch.setattr(assignments.statistics, "median", lambda _: 0.01)
        for outcome in cluster.map(until_released, [spec]):
            heard.append(outcome)
            release.touch()
    assert [type(outcome) for outcome in heard] == [Slow, Done]
    assert heard[0].seconds > 1
    assert any("until_released" in frame for frame in heard[0].doing)


# --- who is turned away ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (ClusterConfig("tcp://10.1.2.3:8786"), "open to the network without TLS"),
        (ClusterConfig("tcp://head:8786"), "open to the network without TLS"),
        (ClusterConfig("ucx://10.1.2.3:8786"), "is unknown"),
        (ClusterConfig("somewhere"), "is unknown"),
        (ClusterConfig("tcp://"), "not the address of a scheduler"),
        (ClusterConfig("tcp://127.0.0.1"), "not the address of a scheduler"),
        (ClusterConfig("tls://127.0.0.1:port"), "not the address of a scheduler"),
        (
            ClusterConfig("tls://127.0.0.1:1", 1, __file__, __file__, __file__),
            "are not an authority, a certificate and its key",
        ),
        (ClusterConfig("file:/nowhere/scheduler.json"), "cannot be read"),
        (ClusterConfig("tls://127.0.0.1:1"), "needs --tls-ca, --tls-cert and --tls-key"),
        (
            ClusterConfig("tls://127.0.0.1:1", tls_ca=__file__),
            "needs --tls-cert and --tls-key as well",
        ),
        (
            ClusterConfig("tls://127.0.0.1:1", tls_ca="/nowhere.pem"),
            "--tls-ca /nowhere.pem does not exist",
        ),
        (ClusterConfig("tcp://127.0.0.1:1", tls_ca=__file__), "--tls-ca goes with tls://"),
        (ClusterConfig("local", insecure=True), "--insecure goes with --cluster ADDRESS only"),
        (ClusterConfig("local", tls_ca=__file__), "--tls-ca goes with --cluster ADDRESS only"),
        (ClusterConfig("local", 0), "--workers must be 1 or more"),
        (ClusterConfig("tcp://127.0.0.1:1", dashboard=True), "--dashboard is for local workers"),
    ],
    ids=lambda each: each.kind if isinstance(each, ClusterConfig) else None,
)
def test_what_cannot_be_meant_is_refused_before_anything_is_started(
    where: ClusterConfig, message: str
) -> None:
    with pytest.raises(InputError) as caught, opened(where):
        pass
    assert message in str(caught.value)


def test_a_file_without_an_address_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scheduler.json").write_text(json.dumps({"id": 1}))
    with (
        pytest.raises(InputError, match="holds no address"),
        opened(f"file:{tmp_path / 'scheduler.json'}"),
    ):
        pass


def test_nobody_at_an_address_is_a_failure_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_module, "CONNECT_SECONDS", 1.0)
    with (
        pytest.raises(ResourceError, match=r"no scheduler answers at tcp://127\.0\.0\.1:9"),
        opened("tcp://127.0.0.1:9"),
    ):
        pass


def test_a_scheduler_without_workers_is_said_with_the_command_that_starts_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "ANSWER_SECONDS", 1.0)
    with (
        standing(tmp_path / "cluster") as made,
        pytest.raises(ResourceError) as caught,
        opened(made.address),
    ):
        pass
    assert f"`dask worker {made.address} --nthreads 1 --memory-limit 0`" in str(caught.value)


def test_a_listener_behind_a_closed_address_that_is_open_is_refused_unless_told(
    tmp_path: Path,
) -> None:
    with standing(tmp_path / "cluster", 1, host="") as made:
        address = f"tcp://127.0.0.1:{made.address.rpartition(':')[2]}"
        with (
            pytest.raises(InputError, match=r"listens on tcp://.*open to the network"),
            opened(address),
        ):
            pass
        with opened(ClusterConfig(address, 1, insecure=True)) as cluster:
            assert len(results(cluster.map(pid, [{}]))) == 1


def test_a_gpu_that_no_worker_offers_is_said_with_the_command(pair: Standing) -> None:
    with (
        opened(ClusterConfig(pair.address, 2)) as cluster,
        pytest.raises(ResourceError, match="--resources GPU=1"),
    ):
        cluster.settle_on("cuda")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    place = tmp_path_factory.mktemp("tls")
    with standing(place / "cluster", 1, tls=certificates(place, "right")) as made:
        yield made


def with_tls(made: Standing, files: Any) -> ClusterConfig:
    return ClusterConfig(made.address, 1, *files)


def test_the_right_certificate_is_let_in(tls: Standing) -> None:
    assert tls.address.startswith("tls://")
    with opened(with_tls(tls, tls.tls)) as cluster:
        assert len(results(cluster.map(pid, [{}]))) == 1


@pytest.mark.parametrize("who", ["no certificate", "another authority", "a plain client"])
def test_everybody_else_is_turned_away(
    tls: Standing, who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "CONNECT_SECONDS", 3.0)
    assert tls.tls is not None
    where = {
        "no certificate": lambda: with_tls(
            tls, (tls.tls[0], *certificates(tmp_path, "self-made")[1:])
        ),
        "another authority": lambda: with_tls(tls, certificates(tmp_path, "other")),
        "a plain client": lambda: ClusterConfig(tls.address.replace("tls://", "tcp://"), 1),
    }[who]()
    with pytest.raises(ResourceError, match="no scheduler answers"), opened(where):
        pass
