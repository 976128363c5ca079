"""The faults of a file system once more, on runs in an object store: drivers killed and drivers that
meet, bytes that change, requests that fail.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lca_posthoc.replay.events import SpanDone
from lca_posthoc.replay.repair import repair
from lca_posthoc.results import Damage, disk, object_store, verify
from lca_posthoc.results.commits import Commits
from lca_posthoc.results.runfile import read_manifest
from tests.helpers.cli import lca
from tests.helpers.object_server import Fate, ObjectServer, Request, object_server

from . import by_level, drawn_levels, fault
from .clean_runs import lay_out, near_the_oracle, same_bytes
from .drivers import INLINE, LOCAL
from .processes import (
    begun,
    complete,
    counting,
    drive,
    extra,
    laid_out,
    markers,
    named,
    nobody_left,
    undamaged,
    whole,
)
from .store import run_in_spans


@contextlib.contextmanager
def _server() -> Iterator[ObjectServer]:
    """A server that this process and those it starts find."""
    with object_server() as server, mock.patch.dict(os.environ, server.environment):
        yield server


@fault("R24", "kill -9 of the driver of a run in an object store (as R1)", ci=1, full=40)
def driver_killed(count: int, _: Path) -> str:
    chance, levels, kills, again, trials = random.Random(24), drawn_levels(24), 0, 0, list[str]()
    clusters, took = (INLINE, LOCAL)[:count], list[float]()
    with _server() as server:
        while kills < count:
            trials.append(keep := next(levels))
            with laid_out(keep=keep) as (place, clean):
                took = took or [_measured(server, place, cluster) for cluster in clusters]
                out, log, of_this_run = server.place() / "run.lca", place / "log", 0
                environment, drivers = counting(log) | server.environment, []
                while kills < count and of_this_run < 5:
                    at = kills % len(clusters)
                    drivers.append(
                        drive(place, out, *clusters[at], environment=environment, keep=keep)
                    )
                    if drivers[-1].wait(chance.uniform(0, took[at])):
                        assert drivers[-1].returncode == 0, drivers[-1].said
                        break
                    drivers[-1].kill()
                    kills, of_this_run = kills + 1, of_this_run + 1
                    undamaged(out)
                nobody_left(*drivers)
                complete(place, out, clean, keep, **environment)
                assert max(begun(log).values()) <= 1 + of_this_run, begun(log)
                again += extra(log)
    return (
        f"{kills} kills in {len(trials)} runs ({by_level(trials)}), {again} extra executions, "
        "bytes equal"
    )


def _measured(server: ObjectServer, place: Path, cluster: tuple[object, ...]) -> float:
    """Seconds of an undisturbed driver."""
    started = time.monotonic()
    driver = drive(place, server.place() / "run.lca", *cluster, environment=server.environment)
    assert driver.finished() == 0, driver.said
    return time.monotonic() - started


@fault("R25", "two drivers on one run in an object store (as R9)", ci=1, full=20)
def two_drivers(count: int, _: Path) -> str:
    chance, refused, late = random.Random(25), 0, 0
    with _server() as server, laid_out() as (place, clean):
        for number in range(count):
            out, log = server.place() / "run.lca", place / f"log-{number}"
            environment = counting(log) | server.environment
            if number % 2:  # one that is there already
                first = drive(place, out, *INLINE, environment=server.environment)
                first.until(lambda out=out: markers(out) >= 3)
                first.kill()
            pair = [drive(place, out, *INLINE, environment=environment)]
            if number % 4 > 1:
                pair[0].wait(chance.uniform(0, 1))
            pair.append(drive(place, out, *INLINE, environment=environment))
            codes = [each.finished() for each in pair]
            assert 0 in codes, [each.said for each in pair]
            for code, each in zip(codes, pair, strict=True):
                if code:
                    assert code == 5, (code, each.said)
                    named(each.said, out, "two drivers never share a run")
                    refused += 1
            late += codes == [0, 0]
            assert extra(log) == 0, begun(log)
            whole(out, clean)
    return (
        f"{count} pairs: {refused} refused with exit 5, {late} came when it was done, bytes equal"
    )


DAMAGES = {
    "deleted": None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "a byte short": lambda data: data[:-1],
    "a bit flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "zeroed": lambda data: bytes(len(data)),
}


@fault("R26", "a pack of chunks in an object store is damaged in six ways (as R6)", ci=3, full=18)
def damage_a_pack(count: int, place: Path) -> str:
    lay_out(place, 9)
    cases = [*itertools.product(DAMAGES, (0, 2, 4))]
    random.Random(26).shuffle(cases)
    trials = list[str]()
    with _server() as server:
        for (how, span), keep in zip(cases[:count], drawn_levels(26), strict=False):
            trials.append(keep)
            clean, out = place / f"{keep}.lca", server.place() / "run.lca"
            if not clean.exists():
                assert run_in_spans(place, clean, keep).exit_code == 0
            assert run_in_spans(place, out, keep).exit_code == 0
            commits = Commits(out, read_manifest(out), "train")
            pack, change = commits.pack(commits.marker(span)), DAMAGES[how]
            data = disk.read(pack)
            disk.remove(pack)
            if change is not None:
                disk.write_whole(pack, change(data), durable=False)
            found = [each for each in verify(out) if isinstance(each, Damage)]
            assert {(each.loss, each.span) for each in found} == {("train", span)}, (how, found)
            assert lca("verify", out).exit_code == 4
            events: list[Any] = []
            repair(out, place / "small_task.py", cluster="inline", progress=events.append)
            done = [(event.span, event.losses) for event in events if isinstance(event, SpanDone)]
            assert done == [(span, ["train"])], (how, span, done)
            assert lca("verify", out).exit_code == 0
            same_bytes(out, clean)
    return f"{count} damaged packs ({by_level(trials)}): all named, all repaired alone, bytes equal"


FATES: tuple[Fate, ...] = ("refused", "lost", "twice", "silent")


@fault(
    "R20",
    "a request to an object store fails, is carried out without an answer, or arrives twice; a "
    "store that is away for long (as R4)",
    ci=8,
    full=200,
)
def fail_a_request(count: int, place: Path) -> str:
    """Every other case the driver does not ask again by itself, so that the failure reaches us; in
    every fifth the store refuses everything from that request on.
    """
    lay_out(place, 5)
    codes, requests, fates = Counter[int](), dict[str, int](), Counter[str]()
    with _server() as server:
        for case, keep in zip(range(count), drawn_levels(20), strict=False):
            clean = place / f"{keep}.lca"
            if keep not in requests:
                assert run_in_spans(place, clean, keep).exit_code == 0
                near_the_oracle(place, clean)
                requests[keep] = _requests(server, place, keep)
            number, out = 1 + case * requests[keep] // count, server.place() / "run.lca"
            away, asks_again = case % 5 == 4, case % 2 == 0 and case % 5 != 4
            fate: Fate = "refused" if away else FATES[case % len(FATES)]
            with _failing(server, number, fate, away=away, asks_again=asks_again):
                result = run_in_spans(place, out, keep)
            fates["away" if away else fate] += 1
            codes[result.exit_code] += 1
            if result.exit_code:
                assert not asks_again, (number, fate, result.stderr)
                assert result.exit_code in (1, 3, 5), (number, fate, result.stderr)
                assert result.stderr.splitlines()[-1].startswith("lca: "), result.stderr
                assert "Traceback" not in result.stderr
            undamaged(out)
            assert run_in_spans(place, out, keep).exit_code == 0, (number, fate)
            same_bytes(out, clean)
            undamaged(out)
    told = ", ".join(f"{codes[code]} with exit {code}" for code in sorted(codes))
    kinds = ", ".join(f"{fates[kind]} {kind}" for kind in fates)
    return (
        f"{count} of up to {max(requests.values())} requests ({kinds}): {told}; all ended with the "
        "same bytes"
    )


def _requests(server: ObjectServer, place: Path, keep: str) -> int:
    """How many requests an undisturbed run makes."""
    server.requests.clear()
    assert run_in_spans(place, server.place() / "run.lca", keep).exit_code == 0
    return len(server.requests)


@contextlib.contextmanager
def _failing(
    server: ObjectServer, number: int, fate: Fate, *, away: bool, asks_again: bool
) -> Iterator[None]:
    """Let one request fail, and where the store is `away` all that follow."""
    made = itertools.count(1)

    def decide(_: Request) -> Fate:
        came = next(made)
        return fate if came == number or (away and came > number) else "through"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "fate", decide)
        if not asks_again:
            patch.setattr(object_store, "_RETRIES", 0)
        object_store._store.cache_clear()
        yield
    object_store._store.cache_clear()
