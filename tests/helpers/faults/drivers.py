"""Drivers and their workers that are killed, told to stop, or meet on one run directory."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.helpers.cli import write_task

from . import by_level, clean_runs, drawn_levels, fault
from .processes import (
    Driver,
    begun,
    complete,
    counting,
    drive,
    extra,
    held,
    laid_out,
    markers,
    named,
    nobody_left,
    signalled,
    undamaged,
    whole,
)

LOCAL = ("--cluster", "local", "--workers", 2)
INLINE = ("--cluster", "inline")


def _measured(
    place: Path, clean: Path, cluster: tuple[object, ...], keep: str = "parameters"
) -> float:
    """Seconds of an undisturbed driver."""
    out = place / f"measured-{cluster[1]}.lca"
    started = time.monotonic()
    driver = drive(place, out, *cluster, keep=keep)
    assert driver.finished() == 0, driver.said
    took = time.monotonic() - started
    whole(out, clean)
    return took


@fault("R1", "kill -9 of the driver at random moments", ci=4, full=100)
def driver_killed(count: int, _: Path) -> str:
    chance, levels, again, kills = random.Random(1), drawn_levels(1), 0, 0
    clusters, took, trials = (INLINE, LOCAL), list[float](), list[str]()
    spans = 20 if count < 50 else 66
    while kills < count:
        trials.append(keep := next(levels))
        with laid_out(2 * spans, keep=keep) as (place, clean):
            took = took or [_measured(place, clean, cluster, keep) for cluster in clusters]
            out, log, of_this_run, workers = place / "run.lca", place / "log", 0, 0
            drivers = list[Driver]()
            while kills < count:
                at = kills % 2
                driver = drive(place, out, *clusters[at], environment=counting(log), keep=keep)
                drivers.append(driver)
                if driver.wait(chance.uniform(0, took[at])):
                    assert driver.returncode == 0, driver.said
                    break
                driver.kill()
                kills, of_this_run, workers = kills + 1, of_this_run + 1, workers + 1 + at
                undamaged(out)
            complete(place, out, clean, keep, **counting(log))
            nobody_left(*drivers)
            executions = begun(log)
            assert sorted(executions) == list(range(spans))
            assert max(executions.values()) <= 1 + of_this_run, executions
            assert extra(log) <= workers, (executions, workers)
            again += extra(log)
    return (
        f"{kills} kills in {len(trials)} runs ({by_level(trials)}), {again} extra executions, "
        "bytes equal"
    )


@fault("R2", "kill -9 of a worker at random moments", ci=3, full=50)
def worker_killed(count: int, _: Path) -> str:
    chance, kills, runs, again, resumed = random.Random(2), 0, 0, 0, 0
    with laid_out(132) as (place, clean):
        while kills < count:
            out, log = place / f"run-{runs}.lca", place / f"log-{runs}"
            runs, of_this_run = runs + 1, 0
            driver = drive(place, out, *LOCAL, environment=counting(log))
            # two deaths before the first span are an exit 5: the task may be what kills
            driver.until(log.exists)
            while kills < count and not driver.wait(chance.uniform(0, 3)):
                alive = driver.workers()
                if alive:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        chance.choice(sorted(alive, key=lambda each: each.pid)).kill()
                        kills, of_this_run = kills + 1, of_this_run + 1
            code = driver.finished()
            assert code in (0, 3), (code, driver.said)
            if code == 3:
                named(driver.said, "failed; the others are complete. Steps ")
                undamaged(out)
                resumed += 1
                complete(place, out, clean, **counting(log))
            whole(out, clean)
            assert extra(log) <= of_this_run, (begun(log), of_this_run)
            again += extra(log)
            nobody_left(driver)
    return (
        f"{kills} kills in {runs} runs, {again} extra executions, {resumed} resumed after exit 3, "
        "bytes equal"
    )


@fault(
    "R21",
    "kill -9 of the driver, or of a worker, while spans are computed in shards",
    ci=2,
    full=40,
)
def killed_in_shards(count: int, _: Path) -> str:
    """Ten segments of two steps in one span and three shards, so that nearly every kill is inside a
    span; other paths are told of them.
    """
    chance, kills, runs, resumed = random.Random(21), Counter[str](), 0, 0
    options = ("--shards", 3, "--batch-size", 4, "--steps", "::2")
    with laid_out(20, keep="units") as (place, _clean):
        write_task(place / "small_task.py")  # whose losses can be cut
        clean = clean_runs.clean_run(
            place,
            place / "in-shards.lca",
            span=16,
            keep="units",
            shards=3,
            batch_size=4,
            steps="::2",
        )
        assert (clean / "data.zarr" / "train" / "path").exists()
        while kills.total() < count:
            out, drivers = place / f"run-{runs}.lca", list[Driver]()
            runs += 1
            while kills.total() < count:
                driver = drive(place, out, *LOCAL, *options, span=16, keep="units")
                drivers.append(driver)
                # two deaths before the first span are an exit 5: the task may be what kills
                driver.until(lambda out=out: (out / "shards").exists() or markers(out))
                over = driver.wait(chance.uniform(0, 1))
                victims = sorted(driver.workers(), key=lambda worker: worker.pid)
                if over or not victims:
                    break
                if kills.total() % 2:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        chance.choice(victims).kill()
                        kills["worker"] += 1
                    break
                driver.kill()
                kills["driver"] += 1
                undamaged(out)
            code = driver.finished()
            assert code in (0, 3, 5, -signal.SIGKILL), driver.said
            if code == 5:  # the worker was killed while it started
                named(driver.said, "local workers did not start")
            last = drive(place, out, *INLINE, *options, span=16, keep="units")
            assert last.finished() == 0, last.said
            resumed += driver.returncode != 0
            whole(out, clean)
            assert not (out / "shards").exists()
            nobody_left(*drivers)
    return (
        f"{kills['driver']} kills of drivers and {kills['worker']} of workers in {runs} runs, "
        f"{resumed} resumed, bytes equal"
    )


@fault("R9", "two drivers on one directory at once", ci=2, full=20)
def two_drivers(count: int, _: Path) -> str:
    chance, refused, late = random.Random(9), 0, 0
    with laid_out() as (place, clean):
        took = _measured(place, clean, INLINE)
        for number in range(count):
            out, log = place / f"run-{number}.lca", place / f"log-{number}"
            if number % 2:  # one that is there already
                first = drive(place, out, *INLINE)
                first.until(lambda out=out: markers(out) >= 3)
                first.kill()
            pair = [drive(place, out, *INLINE, environment=counting(log))]
            if number % 4 > 1:
                pair[0].wait(chance.uniform(0, took / 2))
            pair.append(drive(place, out, *INLINE, environment=counting(log)))
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


@fault("R13", "Ctrl-C once, twice, SIGTERM", ci=4, full=10)
def interrupted(count: int, _: Path) -> str:
    """What waits on a worker may begin before word comes, so at most one more span for each
    worker.
    """
    chance, trials, drained, aborted, more = random.Random(13), list[str](), 0, 0, 0
    kinds = [
        (signal.SIGINT, 1, INLINE),
        (signal.SIGINT, 2, LOCAL),
        (signal.SIGTERM, 1, LOCAL),
        (signal.SIGINT, 2, INLINE),
        (signal.SIGINT, 1, LOCAL),
        (signal.SIGTERM, 1, INLINE),
    ]
    # of 20 spans, the last five wait: no run ends before it is told to
    for case, keep in zip(range(count), drawn_levels(13), strict=False):
        trials.append(keep)
        with laid_out(keep=keep) as (place, clean):
            number, times, cluster = kinds[case % len(kinds)]
            out, log, wanted = (
                place / f"run-{case}.lca",
                place / f"log-{case}",
                chance.randint(1, 14),
            )
            environment = counting(log) | held(released := place / f"released-{case}", 15)
            driver = drive(place, out, *cluster, environment=environment, keep=keep)
            assert driver.until(lambda out=out, wanted=wanted: markers(out) >= wanted), driver.said
            signalled(driver, number)
            before = begun(log).total()
            if times == 2:
                signalled(driver, number)
            released.touch()
            assert driver.finished() == 128 + number, (driver.returncode, driver.said)
            workers = 1 if cluster is INLINE else 2
            assert begun(log).total() - before <= workers, (before, begun(log))
            more += begun(log).total() - before
            lines = driver.said.splitlines()
            assert len(lines) <= 5, driver.said
            assert re.search(r"[Rr]un the same command again", named(driver.said)), driver.said
            nobody_left(driver)
            undamaged(out)
            complete(place, out, clean, keep)
            drained, aborted = drained + (times == 1), aborted + (times == 2)
    return (
        f"{drained} drained, {aborted} stopped by a second one ({by_level(trials)}), {more} spans begun "
        "after a signal, bytes equal"
    )
