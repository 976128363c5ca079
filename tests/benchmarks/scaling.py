"""What a driver costs beside many workers: the driver's own loop, a real scheduler, and workers
that only pretend to compute.

```sh
python tests/benchmarks/scaling.py [--spans 2000] [--workers 64] [--seconds 0.25] [--segments 16]
    [--json FILE]
```

Four processes: this one, which watches; `dask scheduler`; one process that holds all workers in one
event loop (`Worker`, one thread each, tcp on loopback); and the driver, which goes through
`open_cluster` and the loop `lca run` goes through, with its specs, events and log, on a run
directory it made. A span is `time.sleep`, which stands for the work: nothing is read, computed or
written by the workers. What the driver costs is its own processor time, user and system, over the
workers' time (spans times seconds).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
LAYERS = 20  # a tensor table of ordinary length: forty tensors
OFTEN = 1000  # spans between two looks at the memory


def pretend(spec: dict[str, Any]) -> dict[str, Any]:
    """Take as long as the task says and answer as a span does."""
    pretended = {name: float(text) for name, text in spec["setup"]["digests"].items()}
    time.sleep(pretended["seconds"])
    facts = {
        "evaluations": 2 * int(pretended["segments"]) + 1,
        "forward_passes": 0,
        "batch_size": 2048,
        "worst_residual": 1e-4,
        "ends": [1.0, 1.0],
    }
    return {
        "losses": {
            name: {**facts, "unconverged": 0, "silent": [], "hidden": []}
            for name in spec["pending"]
        },
        "segments": int(pretended["segments"]),
        "seconds": pretended["seconds"],
        "peak_bytes": 2**30,
    }


def present(spec: dict[str, Any]) -> dict[str, Any]:
    return {"pid": os.getpid()}


# --- the workers ----------------------------------------------------------------------------------


async def max_per_host(address: str, count: int, place: Path) -> None:
    """Workers that share this process until somebody ends it."""
    import dask
    from distributed import Worker

    off = {
        f"distributed.worker.memory.{each}": False
        for each in ("target", "spill", "pause", "terminate")
    }
    with dask.config.set({**off, "distributed.worker.profile.enabled": False}):
        options = {"nthreads": 1, "memory_limit": 0, "host": "127.0.0.1", "dashboard": False}
        workers = [
            Worker(address, name=f"w{at}", local_directory=str(place), **options)
            for at in range(count)
        ]
        await asyncio.gather(*workers)
        (place / "ready").touch()
        await asyncio.gather(*(worker.finished() for worker in workers))


# --- the driver -----------------------------------------------------------------------------------


def laid_out(spans: int, segments: int) -> Any:
    """A manifest as long as asked: what a run of that size records."""
    from lca_posthoc.checkpoints.trajectory import Checkpoint, TensorSpec
    from lca_posthoc.numerics.schema import unit_of_totals
    from lca_posthoc.numerics.settings import resolve
    from lca_posthoc.results import LossRecord, Manifest, StoredTensor

    tensors = []
    for layer in range(LAYERS):
        for part, shape in (("weight", (4, 4)), ("bias", (4,))):
            name = f"blocks.{layer}.linear.{part}"
            tensors.append(StoredTensor(TensorSpec(name, "parameter", shape, (), 0), name, name))
    checkpoints = [
        Checkpoint(step, (Path(f"step_{step:08d}.safetensors"),), 1_234_567, 0xDEADBEEF)
        for step in range(spans * segments + 1)
    ]
    identity = {"loss": 2.3, "gradient_norm": 1.0}
    record = LossRecord(
        key="train",
        on="train",
        kind="function",
        examples=55_000,
        total=55_000,
        groups=None,
        counts=None,
        block=None,
        along=None,
        replicates=0,
        batch_size=2048,
        calibration=None,
        measured=True,
        identity=[identity, identity],
        unit=unit_of_totals([identity["loss"]]),
    )
    settings = resolve({"keep": "tensors", "path_band": "off", "shards": 1}, None) | {
        "device": "cpu"
    }
    window = 1
    while spans // window > 64:
        window *= 2
    names = (
        "torch",
        "safetensors",
        "numpy",
        "zarr",
        "lca_posthoc",
        "python",
        "platform",
        "created",
        "task",
    )
    provenance = {
        **dict.fromkeys(names, "0"),
        "task_function": "task",
        "task_sha256": "0" * 64,
        "task_losses": ["train"],
    }
    return Manifest(
        root="/somewhere/checkpoints",
        tensors=tensors,
        checkpoints=checkpoints,
        starts=list(range(segments)),
        breaks=[],
        span=segments,
        window=window,
        settings=settings,
        losses={"train": record},
        provenance=provenance,
    )


def used() -> float:
    """Seconds of processor time of this process, all threads, user and system."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


def drive(
    address: str, given: argparse.Namespace, scheduler: psutil.Process, place: Path
) -> dict[str, Any]:
    """The loop of `lca run`, timed."""
    from lca_posthoc import results
    from lca_posthoc.cluster import ClusterConfig, open_cluster
    from lca_posthoc.replay import pending_spans
    from lca_posthoc.replay.events import Log, Planned, SpanDone
    from lca_posthoc.replay.requests import (
        RunRequest,
        RunSettings,
        StoredPoints,
        TaskSetup,
        to_plain,
    )
    from lca_posthoc.replay.status import Status
    from lca_posthoc.replay.stopping import Stop
    from lca_posthoc.tasks.task import Entry

    me, out, stop = psutil.Process(), place / "out.lca", Stop()
    manifest = laid_out(given.spans, given.segments)
    made = used()
    results.create(out, manifest, durable=False)
    made = used() - made
    memory: list[dict[str, float]] = []
    marks: dict[str, float] = {}
    done = 0

    def listen(event: Any) -> None:
        nonlocal done
        if isinstance(event, Planned):
            marks["planned"], marks["wall"] = used(), time.monotonic()
        if isinstance(event, SpanDone):
            done += 1
            if done % OFTEN == 0 or done == given.spans:
                memory.append(
                    {
                        "spans": done,
                        "driver": me.memory_info().rss,
                        "scheduler": scheduler.memory_info().rss,
                    }
                )
        if isinstance(event, Planned | SpanDone) and done == given.spans:
            marks["done"], marks["wall_done"] = used(), time.monotonic()

    telling = {"seconds": 0.0, "times": 0}

    class Timed(Log):
        def __call__(self, event: Any) -> None:
            before = time.thread_time()
            super().__call__(event)
            telling["seconds"] += time.thread_time() - before
            telling["times"] += 1

    pending_spans.replay_span = pretend  # type: ignore[attr-defined]
    entry: Entry = {
        "kind": "file",
        "path": "/somewhere/task.py",
        "function": "task",
        "sha256": "0" * 64,
    }
    names = {tensor.spec.name: tensor.source for tensor in manifest.tensors}
    started, begun = time.monotonic(), used()
    with open_cluster(ClusterConfig(address, given.workers), "cpu", stop.event) as cluster:
        setup = TaskSetup(
            task=entry,
            parcel=cluster.deliver(b"0" * 20_000),
            settings=RunSettings.of(manifest.settings),
            losses=["train"],
            stored=sorted(names.values()),
            digests={"seconds": str(given.seconds), "segments": str(given.segments)},
        )
        common = RunRequest[Any](
            setup=setup,
            points=StoredPoints(root=manifest.root, names=names, checkpoints={}),
            run=str(out),
            batch_sizes={"train": 2048},
        )
        cluster.check_workers(present, {})
        log = Timed(listen)
        ready, ready_wall = used(), time.monotonic()
        with results.hold(out) as held, log.written_to(partial(results.append_events, out)):
            writer, status = results.RunWriter(out, manifest, False), Status(log)
            spans = pending_spans.PendingSpans(
                writer,
                common,
                status,
                durable=False,
                root=Path(manifest.root),
                consumer=None,
                follower=None,
            )
            spans.replay(cluster, held, None)
        looped = used()
    ended, wall = used(), time.monotonic() - started
    request = pending_spans.span_request(
        common, manifest, 0, ["train"], Path(manifest.root), durable=False
    )
    spec = to_plain(request)
    return {
        "spans": done,
        "events": {"seconds": telling["seconds"], "times": telling["times"]},
        "cpu": {
            "create the run": made,
            "connect, deliver, check_workers": ready - begun,
            "list what is pending": marks["planned"] - ready,
            "the loop": marks["done"] - marks["planned"],
            "look for totals to join": looped - marks["done"],
            "leave": ended - looped,
            "whole": ended - begun,
        },
        "wall": {
            "whole": wall,
            "before the loop": marks["wall"] - started,
            "the loop": marks["wall_done"] - marks["wall"],
            "mustered": ready_wall - started,
        },
        "memory": memory,
        "bytes": {
            "a span's spec, pickled": len(pickle.dumps(spec)),
            "run.json": (out / "run.json").stat().st_size,
            "log": (out / "log" / "run.jsonl").stat().st_size,
        },
    }


# --- the whole ------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    own = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **environment,
    }
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stderr=subprocess.DEVNULL, env=own
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def waited(file: Path, process: subprocess.Popen[bytes]) -> None:
    while not file.exists() or (file.suffix == ".json" and not file.read_text().strip()):
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise SystemExit(
                f"a process ended with {process.wait(timeout=0.1)} before it was ready"
            )


def spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def measure(given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        place = Path(name)
        file = place / "scheduler.json"
        arguments = ("--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file)
        scheduler = stack.enter_context(started("-m", "dask", "scheduler", *arguments))
        waited(file, scheduler)
        address = json.loads(file.read_text())["address"]
        workers = stack.enter_context(
            started(__file__, "--role", "max_per_host", address, place, "--workers", given.workers)
        )
        waited(place / "ready", workers)
        watched = {
            "scheduler": psutil.Process(scheduler.pid),
            "workers": psutil.Process(workers.pid),
        }
        before = {who: spent(process) for who, process in watched.items()}
        options = [
            ("--spans", given.spans),
            ("--workers", given.workers),
            ("--seconds", given.seconds),
            ("--segments", given.segments),
        ]
        driver = subprocess.run(
            [
                sys.executable,
                __file__,
                "--role",
                "driver",
                address,
                str(place),
                "--pid",
                str(scheduler.pid),
            ]
            + [str(word) for pair in options for word in pair],
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            },
            check=True,
        )
        found = json.loads(driver.stdout)
        found["others"] = {who: spent(process) - before[who] for who, process in watched.items()}
        found["asked"] = {
            "spans": given.spans,
            "workers": given.workers,
            "seconds": given.seconds,
            "segments": given.segments,
        }
    work = given.spans * given.seconds
    found["share"] = found["cpu"]["whole"] / work
    found["busy"] = work / (given.workers * found["wall"]["the loop"])
    return found


def show(found: dict[str, Any]) -> None:
    asked, spans = found["asked"], found["spans"]
    print(
        f"{spans:,} spans of {asked['seconds']} s and {asked['segments']} segments on "
        f"{asked['workers']} pretended workers"
    )
    print("\n| driver | CPU seconds | ms a span |\n|---|---|---|")
    for what, seconds in found["cpu"].items():
        print(f"| {what} | {seconds:.2f} | {1000 * seconds / spans:.3f} |")
    events = found["events"]
    print(
        f"| of it events and the log | {events['seconds']:.2f} | "
        f"{1000 * events['seconds'] / events['times']:.3f} |"
    )
    for who, seconds in found["others"].items():
        print(f"| (the process of the {who}) | {seconds:.2f} | {1000 * seconds / spans:.3f} |")
    print(
        f"\ndriver / workers' time: {100 * found['share']:.2f} %; workers busy: "
        f"{100 * found['busy']:.1f} %",
        end="; ",
    )
    print(
        f"loop {found['wall']['the loop']:.1f} s, before it {found['wall']['before the loop']:.1f} "
        "s"
    )
    print("\n| spans | driver MB | scheduler MB |\n|---|---|---|")
    for row in found["memory"]:
        print(f"| {row['spans']:,} | {row['driver'] / 1e6:.1f} | {row['scheduler'] / 1e6:.1f} |")
    print("\n" + ", ".join(f"{what}: {size:,} bytes" for what, size in found["bytes"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spans", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.25)
    parser.add_argument(
        "--segments", type=int, default=16, help="of a span; a spec names one checkpoint more"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--role", nargs=3, metavar=("ROLE", "ADDRESS", "PLACE"), help=argparse.SUPPRESS
    )
    parser.add_argument("--pid", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role is None:
        found = measure(given)
        show(found)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))
    elif given.role[0] == "max_per_host":
        asyncio.run(max_per_host(given.role[1], given.workers, Path(given.role[2])))
    else:
        print(
            json.dumps(drive(given.role[1], given, psutil.Process(given.pid), Path(given.role[2])))
        )


if __name__ == "__main__":
    main()
