"""How fast a replay is beside the loops people write, and beside the processor's own matrix
products.

```sh
LCA_DATA=DIR python tests/benchmarks/speed.py [WORKLOAD ...] [--rounds 5] [--segments N]
    [--only NAME ...] [--work DIR]
LCA_DATA=DIR python tests/benchmarks/speed.py mnist-fc resnet20 --full
    --device cuda --json speed.json --table speed.md
```

Workloads and DIR: see `workloads.py`. Every timing is a process of its own; contestants alternate,
in another order each round; what is shown are medians over rounds, of ratios too. Checkpoints are
made once in the directory of --work and found there again.

- first loop: a DataLoader, three full gradients a segment, weights through `load_state_dict`;
  torch's own number of threads.
- expert: data on the device, large batches, the gradient at a segment's end used again, sums;
  torch's own number of threads.
- ours: `lca_posthoc.run` with its defaults and `tolerance=inf`, so that all make the evaluations of
  Simpson's rule.

Before anything is timed, both loops' sums over layers are compared with ours. A second per segment
is, for the loops, that of the loop, start and loading the data apart; for ours, that of the workers
on their spans (reading, evaluating, allocating, measuring the precision, writing, committing),
building the model apart, over the number of workers that had any. `unchecked` is the same over the
spans on none of whose segments ours measures its precision in float64, which a short run does on a
far larger share of its segments than a long one; TFLOP/s are those of the unchecked spans. FLOPs
are torch's count of one forward and backward pass of the plain model. The peak is measured before
each round: float32 products of 1024×1024 in a single-threaded process per core, all at a time, by
`torch.mm` and, where there is one, by oneDNN's linear layer; on a GPU `torch.mm` of 8192×8192.
`wall` is the time of the loop, or from the plan to the last span with idle workers; `command` that
of the whole process. Memory is of the processes that evaluate.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from workloads import WORKLOADS, Workload, train

import lca_posthoc
from lca_posthoc import Task
from lca_posthoc.replay.events import Planned, SpanDone
from lca_posthoc.replay.shards import is_cut
from lca_posthoc.replay.worker import SAMPLED

CORES = len(os.sched_getaffinity(0))
SIMPSON = ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6))
AGREE = 1e-3
CHECKED = 2  # segments on which the loops' layer sums are compared with ours
Result = dict[str, Any]
Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Job:
    """What a process is to do; `out` is where it may write, `options` are of `lca_posthoc.run`."""

    role: str
    workload: str
    device: str
    full: bool
    segments: int
    checkpoints: str
    out: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def of(self) -> Workload:
        return WORKLOADS[self.workload]

    @property
    def examples(self) -> int | None:
        return None if self.full else self.of.examples

    @property
    def files(self) -> list[Path]:
        return sorted(Path(self.checkpoints).glob("step_*.safetensors"))[: self.segments + 1]

    @property
    def model(self) -> nn.Module:
        """On the device; in training mode where normalisations take the statistics of the batch."""
        return task_of(self.workload).model().to(self.device).train(self.of.norm_stats == "batch")


@functools.cache
def task_of(workload: str) -> Task:
    """Its data is loaded once."""
    return WORKLOADS[workload].task()


def splits(job: Job) -> Iterator[Examples]:
    """The examples of each loss."""
    task = task_of(job.workload)
    for loss in task.losses.values():
        inputs, targets = task.data[loss.on]
        yield inputs[: job.examples], targets[: job.examples]


def parts(job: Job) -> list[Examples]:
    """The examples of each loss, or of each of its groups."""
    found = []
    for loss, (inputs, targets) in zip(
        task_of(job.workload).losses.values(), splits(job), strict=True
    ):
        labels = (
            torch.zeros(len(targets)) if loss.group_by is None else loss.group_by(inputs, targets)
        )
        found += [(inputs[labels == label], targets[labels == label]) for label in labels.unique()]
    return found


def total_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over the targets, one or several for each input."""
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), reduction="sum")


def interpolated(start: Tensor, end: Tensor, x: float) -> Tensor:
    return start + x * (end - start) if start.is_floating_point() else start


# --- the first loop -------------------------------------------------------------------------------


def mean_gradient(
    model: nn.Module, loader: DataLoader[Any], device: str
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient over everything a loader gives."""
    model.zero_grad()
    loss, count = 0.0, 0
    for inputs, targets in loader:
        batch_loss = total_loss(model, inputs.to(device), targets.to(device))
        batch_loss.backward()
        loss += batch_loss.item()
        count += targets.numel()
    return loss / count, {name: each.grad.cpu() / count for name, each in model.named_parameters()}


def first_loop(job: Job, model: nn.Module, data: list[Examples]) -> Callable[[], int]:
    """The loop, which says how many gradients of every loss it took."""
    size = job.of.batch[job.device] if job.of.norm_stats == "batch" else job.of.first_batch

    def loop() -> int:
        for segment, (before, after) in enumerate(itertools.pairwise(job.files)):
            start, end = load_file(before), load_file(after)
            allocations, residuals = [], []
            for inputs, targets in data:
                loader = DataLoader(TensorDataset(inputs, targets), batch_size=size)
                losses = []
                mean = {name: torch.zeros_like(start[name]) for name, _ in model.named_parameters()}
                for x, weight in SIMPSON:
                    model.load_state_dict(
                        {name: interpolated(start[name], end[name], x) for name in start}
                    )
                    loss, gradient = mean_gradient(model, loader, job.device)
                    losses.append(loss)
                    for name in mean:
                        mean[name] += weight * gradient[name]
                allocation = torch.cat(
                    [((end[name] - start[name]) * mean[name]).flatten() for name in mean]
                )
                allocations.append(allocation.numpy())
                residuals.append(losses[-1] - losses[0] - allocation.sum().item())
            np.save(f"{job.out}/allocation_{segment}.npy", np.stack(allocations))
            np.save(f"{job.out}/residual_{segment}.npy", residuals)
        return 3 * job.segments

    return loop


# --- the expert's ---------------------------------------------------------------------------------


def expert_loop(job: Job, model: nn.Module, data: list[Examples]) -> Callable[[], int]:
    """Likewise, by somebody who knows what costs time."""
    torch.backends.cudnn.benchmark = True
    size = job.of.batch[job.device]
    held, parameters = model.state_dict(), dict(model.named_parameters())
    resident = [
        (
            list(
                zip(
                    inputs.to(job.device).split(size),
                    targets.to(job.device).split(size),
                    strict=True,
                )
            ),
            targets.numel(),
        )
        for inputs, targets in data
    ]

    def evaluate(point: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(parts,) losses and (parts, parameters) gradients."""
        for name, each in held.items():
            each.copy_(point[name])
        losses, gradients = [], []
        for batches, count in resident:
            model.zero_grad()
            loss = torch.zeros((), dtype=torch.float64, device=job.device)
            for inputs, targets in batches:
                batch_loss = total_loss(model, inputs, targets)
                batch_loss.backward()
                loss += batch_loss.detach()
            losses.append(loss / count)
            gradients.append(
                torch.cat([each.grad.flatten() for each in parameters.values()]) / count
            )
        return torch.stack(losses), torch.stack(gradients)

    def loop() -> int:
        start = load_file(job.files[0], device=job.device)
        loss, first = evaluate(start)
        for segment, file in enumerate(job.files[1:]):
            end = load_file(file, device=job.device)
            _, middle = evaluate(
                {name: interpolated(start[name], end[name], 0.5) for name in start}
            )
            end_loss, last = evaluate(end)
            motion = torch.cat([(end[name] - start[name]).flatten() for name in parameters])
            allocation = (first + 4 * middle + last).mul_(motion / 6)
            residual = end_loss - loss - allocation.sum(1, dtype=torch.float64)
            np.save(f"{job.out}/allocation_{segment}.npy", allocation.cpu().numpy())
            np.save(f"{job.out}/residual_{segment}.npy", residual.cpu().numpy())
            start, loss, first = end, end_loss, last
        return 2 * job.segments + 1

    return loop


# --- timing ---------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], device: str) -> float:
    """By the clock, or by events of the GPU."""
    if device == "cpu":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def written(out: str) -> int:
    """Bytes below a directory."""
    return sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file())


def peak_of_device(job: Job) -> int | None:
    """What torch took of the GPU in this process."""
    return torch.cuda.max_memory_allocated() if job.device == "cuda" else None


def time_loop(job: Job) -> Result:
    """Time a loop."""
    torch.backends.cudnn.allow_tf32 = False  # float32, as ours
    model, data = job.model, parts(job)
    loop = {"first": first_loop, "expert": expert_loop}[job.role](job, model, data)
    warm_up(job, model, data)
    evaluations: list[int] = []
    seconds = seconds_of(lambda: evaluations.append(loop()), job.device)
    return {
        "seconds": seconds,
        "unchecked": seconds / job.segments,
        "wall": seconds,
        "evaluations": evaluations[0],
        "bytes": written(job.out),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_bytes": peak_of_device(job),
        "sums": sums_of_loop(job, model),
    }


def warm_up(job: Job, model: nn.Module, data: list[Examples]) -> None:
    """Some examples forth and back, as the probe of ours does before its first span."""
    inputs, targets = data[0]
    total_loss(model, inputs[:6].to(job.device), targets[:6].to(job.device)).backward()


def sums_of_loop(job: Job, model: nn.Module) -> list[list[float]]:
    """What each tensor is allocated over all segments, for each part."""
    counts = [each.numel() for each in model.parameters()]
    allocated = sum(
        np.load(f"{job.out}/allocation_{at}.npy").astype(np.float64) for at in range(job.segments)
    )
    return [
        [float(each.sum()) for each in np.split(row, np.cumsum(counts)[:-1])] for row in allocated
    ]


def span_of(segments: int) -> int | None:
    """Short runs are cut in two spans at least, which share most gradients at ends; long ones as
    they always are.
    """
    return None if segments >= 32 else 2 ** (max(1, segments // 2).bit_length() - 1)


def time_ours(job: Job) -> Result:
    """Time a replay by what its workers say."""
    planned: list[tuple[float, int]] = []
    done: list[tuple[float, SpanDone]] = []

    def listen(event: object) -> None:
        if isinstance(event, Planned):
            planned.append((time.perf_counter(), event.workers))
        if isinstance(event, SpanDone):
            done.append((time.perf_counter(), event))

    run = lca_posthoc.run(
        job.checkpoints,
        f"{Path(__file__).with_name('workloads.py')}:{job.of.task.__name__}",
        losses=["all"],
        out=Path(job.out) / "run.lca",
        tolerance=float("inf"),
        batch_size=job.of.batch[job.device] if job.of.norm_stats == "batch" else None,
        device=job.device,
        norm_stats=job.of.norm_stats,
        subset=[] if job.examples is None else [f"0:{job.examples}"],
        steps=f"0:{job.segments}",
        span=span_of(job.segments),
        progress=listen,
        **job.options,
    )
    started, workers = planned[0]
    spans = seconds_of_spans(run, [event for _, event in done])
    if not any(is_cut(run.manifest, name) for name in run):  # shards of a span have several workers
        workers = min(workers, len(spans))
    unchecked = [
        at for at in spans if not SAMPLED & set(range(*run.manifest.rows(at).indices(job.segments)))
    ]
    lengths = sum(run.manifest.length(at) for at in unchecked)
    peaks: dict[str, int] = defaultdict(int)
    for _, event in done:
        peaks[event.worker] = max(peaks[event.worker], event.peak_bytes)
    return {
        "seconds": sum(spans.values()) / workers,
        "unchecked": sum(spans[at] for at in unchecked) / workers / lengths if lengths else None,
        "wall": done[-1][0] - started,
        "evaluations": sum(event.evaluations for _, event in done) / len(run),
        "bytes": written(job.out),
        "peak_bytes": sum(peaks.values()),
        "device_bytes": peak_of_device(job) if job.options.get("cluster") == "inline" else None,
        "sums": sums_of_run(run),
        "batches": {name: losses.record.batch_size for name, losses in run.items()},
    }


def seconds_of_spans(run: lca_posthoc.Run, done: list[SpanDone]) -> dict[int, float]:
    """Span → seconds of a worker: what the markers of its losses say, and what committing it took.

    Markers are written before the commit ends. What a worker says of a span beyond them is the
    commit, and on a worker's first span also the building of the model: the least of any span is
    the commit. Of a span that was cut into shards, the marker holds all, and the worker says less.
    """
    marked: dict[int, float] = defaultdict(float)
    for losses in run.values():
        for marker in losses.markers:
            marked[marker["span"]] += marker["seconds"]
    commit = max(0.0, min(event.seconds - marked[event.span] for event in done))
    return {span: seconds + commit for span, seconds in marked.items()}


def sums_of_run(run: lca_posthoc.Run) -> list[list[float]]:
    """The same of a run."""
    names = [
        tensor.spec.name for tensor in run.manifest.allocated if tensor.spec.kind == "parameter"
    ]
    found: list[list[float]] = []
    for losses in run.values():
        allocated = losses.tensors.allocated.sum("step").sel(tensor=names)
        found += np.atleast_2d(allocated.transpose(..., "tensor").values).tolist()
    return found


# --- arithmetic -----------------------------------------------------------------------------------


def count_flops(job: Job) -> Result:
    """FLOPs of one forward and backward pass over all examples of all losses."""
    model, flops = job.model, 0.0
    for inputs, targets in splits(job):
        some = slice(0, 6)
        # of fused kernels, not all count
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            total_loss(model, inputs[some].to(job.device), targets[some].to(job.device)).backward()
        flops += counter.get_total_flops() / len(inputs[some]) * len(inputs)
    return {"flops": flops}


def products() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The ways to multiply matrices."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch.mm": torch.mm}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        linear = torch.ops.mkldnn._linear_pointwise
        found["oneDNN linear"] = lambda a, b: linear(a, b, None, "none", [], "")
    return found


def flops_per_second(product: Callable[[Tensor, Tensor], Tensor], size: int, device: str) -> float:
    """The median of products in a row for about a second, after one that does not count."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    product(a, b)
    times: list[float] = []
    while sum(times) < 1:
        times.append(seconds_of(lambda: product(a, b), device))
    return 2 * size**3 / statistics.median(times)


def multiply(barrier: Any, found: Any) -> None:
    """One of the processes of the CPU's peak: all begin each product together."""
    torch.set_num_threads(1)
    for name, product in products().items():
        barrier.wait()
        found.put((name, flops_per_second(product, 1024, "cpu")))


def measure_peak(job: Job) -> Result:
    """FLOP/s of matrix products on the whole device, by how they are made."""
    if job.device == "cuda":
        return {"torch.mm": flops_per_second(torch.mm, 8192, "cuda")}
    spawn = multiprocessing.get_context("spawn")
    barrier, found = spawn.Barrier(CORES), spawn.Queue()
    processes = [spawn.Process(target=multiply, args=(barrier, found)) for _ in range(CORES)]
    for process in processes:
        process.start()
    sums: dict[str, float] = defaultdict(float)
    for name, each in (found.get(timeout=60) for _ in range(CORES * len(products()))):
        sums[name] += each
    for process in processes:
        process.join()
    return dict(sums)


def make_checkpoints(job: Job) -> Result:
    """Train for as many iterates as there are segments."""
    train(job.of, Path(job.checkpoints), job.segments, job.device)
    return {}


ROLES: dict[str, Callable[[Job], Result]] = {
    "first": time_loop,
    "expert": time_loop,
    "ours": time_ours,
    "flops": count_flops,
    "peak": measure_peak,
    "train": make_checkpoints,
}


# --- the whole ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """A line of the table."""

    label: str
    role: str
    options: dict[str, Any] = field(default_factory=dict)


def contestants(device: str) -> dict[str, Contestant]:
    workers = CORES if device == "cpu" else 1
    local = {"cluster": "local", "workers": workers}
    return {
        "first": Contestant("first loop", "first"),
        "expert": Contestant("expert loop", "expert"),
        "workers": Contestant(f"ours, {workers} worker{'s' if workers > 1 else ''}", "ours", local),
        "inline": Contestant("ours, inline", "ours", {"cluster": "inline"}),
        "trapezoid": Contestant("ours, trapezoid", "ours", {**local, "rule": "trapezoid"}),
        "tensors": Contestant("ours, keep tensors", "ours", {**local, "keep": "tensors"}),
        "units": Contestant("ours, keep units", "ours", {**local, "keep": "units"}),
    }


def busy() -> tuple[float, float]:
    """Seconds that the cores of this machine have worked, for anybody, and for the processes
    started here that have ended.
    """
    everybody = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests are counted as users as well
    mine = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(
        each for name, each in everybody.items() if name not in idle
    ), mine.ru_utime + mine.ru_stime


def in_process(job: Job) -> Result:
    """Do a job in a fresh process, which leaves nothing behind but checkpoints."""
    before, started = busy(), time.perf_counter()
    Path(job.out).mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(vars(job))],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    shutil.rmtree(job.out)
    if done.returncode:
        raise SystemExit(f"{job.role} on {job.workload} ended with {done.returncode}")
    wall = time.perf_counter() - started
    everybody, mine = (now - then for now, then in zip(busy(), before, strict=True))
    return {
        **json.loads(done.stdout.splitlines()[-1]),
        "command": wall,
        "others": max(0.0, everybody - mine) / wall,
    }


def changed(job: Job, **changes: Any) -> Job:
    return Job(**{**vars(job), **changes})


def job_of(name: str, given: argparse.Namespace, work: Path) -> Job:
    """A job of a workload without a role yet, its checkpoints made unless they are there."""
    workload = WORKLOADS[name]
    segments = given.segments or (workload.full_segments if given.full else workload.segments)
    place = work / f"{workload.trajectory}-{segments}"
    job = Job(
        "", name, given.device, given.full, segments, str(place), str(work / f"out-{os.getpid()}")
    )
    if len(job.files) <= segments:
        say(f"{name}: training for {segments} iterates")
        shutil.rmtree(place, ignore_errors=True)
        in_process(changed(job, role="train"))
    return job


def compare_sums(job: Job, chosen: dict[str, Contestant]) -> None:
    """Refuse to go on unless the loops allocate to each tensor what ours does."""
    rivals = [each for each in chosen.values() if each.role != "ours"]
    few = changed(job, segments=min(CHECKED, job.segments))
    if not rivals:
        return
    ours = np.array(
        in_process(changed(few, role="ours", options={"cluster": "inline", "keep": "tensors"}))[
            "sums"
        ]
    )
    for rival in rivals:
        theirs = np.array(in_process(changed(few, role=rival.role))["sums"])
        apart = float((abs(theirs - ours).max(1) / abs(ours).max(1)).max())
        say(f"{job.workload}: layer sums of the {rival.label} are within {apart:.1e} of ours")
        if not apart <= AGREE:
            raise SystemExit(
                f"{job.workload}: the {rival.label} computes something else (more than {AGREE}); "
                "no table."
            )


def measure(name: str, given: argparse.Namespace, work: Path) -> Result:
    """All timings of a workload, and its table."""
    job = job_of(name, given, work)
    chosen = {key: each for key, each in contestants(given.device).items() if key in given.only}
    compare_sums(job, chosen)
    flops = in_process(changed(job, role="flops"))["flops"]
    peaks: list[Result] = []
    timings: dict[str, list[Result]] = {key: [] for key in chosen}
    for turn in range(given.rounds):
        peaks.append(in_process(changed(job, role="peak")))
        order = list(chosen)
        for key in order[turn % len(order) :] + order[: turn % len(order)]:
            timings[key].append(
                in_process(changed(job, role=chosen[key].role, options=chosen[key].options))
            )
            say(
                f"{name}, round {turn + 1}: {chosen[key].label} "
                f"{timings[key][-1]['seconds'] / job.segments:.3f} s a segment"
            )
    return {
        "segments": job.segments,
        "examples": [len(targets) for _, targets in splits(job)],
        "flops_per_evaluation": flops,
        "peaks": peaks,
        "timings": timings,
        "rows": [
            row(key, chosen[key].label, timings, job.segments, flops, peaks) for key in chosen
        ],
    }


def median_of(timings: list[Result], key: str) -> float | None:
    values = [each[key] for each in timings]
    return None if None in values else statistics.median(values)


def ratio(
    timings: dict[str, list[Result]], key: str, rival: str, measure: str = "seconds"
) -> float | None:
    """The median over rounds."""
    pairs = [
        (one[measure], other[measure])
        for one, other in zip(timings[key], timings.get(rival, []), strict=False)
    ]
    return (
        statistics.median(one / other for one, other in pairs)
        if pairs and None not in pairs[0]
        else None
    )


def row(
    key: str,
    label: str,
    timings: dict[str, list[Result]],
    segments: int,
    flops: float,
    peaks: list[Result],
) -> Result:
    """A line of the table."""
    mine = timings[key]
    each = statistics.median(timing["seconds"] for timing in mine) / segments
    unchecked = median_of(mine, "unchecked")
    evaluations = statistics.median(timing["evaluations"] for timing in mine) / segments
    rate = flops * evaluations / (unchecked or each)
    peak = {
        name: statistics.median(each[name] for each in peaks)
        for name in products()
        if name in peaks[0]
    }
    device = median_of(mine, "device_bytes")
    return {
        "": label,
        "s / segment": each,
        "÷ first loop": ratio(timings, key, "first"),
        "÷ expert": ratio(timings, key, "expert"),
        "unchecked s / segment": unchecked,
        "unchecked ÷ expert": ratio(timings, key, "expert", "unchecked"),
        "evaluations / segment": evaluations,
        "TFLOP/s": rate / 1e12,
        "of torch.mm's peak": rate / peak["torch.mm"],
        "of the best peak": rate / max(peak.values()),
        "MB written / s": statistics.median(timing["bytes"] / timing["seconds"] for timing in mine)
        / 1e6,
        "peak MB": statistics.median(timing["peak_bytes"] for timing in mine) / 1e6,
        "GPU MB": None if device is None else device / 1e6,
        "wall s": statistics.median(timing["wall"] for timing in mine),
        "command s": statistics.median(timing["command"] for timing in mine),
    }


def shown(value: Any) -> str:
    return (
        "–"
        if value is None
        else value
        if isinstance(value, str)
        else f"{value:,.0f}"
        if value >= 100
        else f"{value:.3g}"
    )


def table(name: str, found: Result, machine: str) -> str:
    """A workload as Markdown."""
    rows = [{column: shown(value) for column, value in each.items()} for each in found["rows"]]
    peaks = ", ".join(
        f"{way} {statistics.median(each[way] for each in found['peaks']) / 1e12:.3g}"
        for way in products()
        if way in found["peaks"][0]
    )
    others = [each["others"] for held in found["timings"].values() for each in held]
    lines = [
        f"### {name}\n",
        f"{machine}; {found['segments']} segments, examples of each loss {found['examples']}, "
        f"{len(found['peaks'])} rounds; {found['flops_per_evaluation'] / 1e9:,.1f} GFLOP an "
        f"evaluation; peaks in TFLOP/s: {peaks}. Other processes kept "
        f"{statistics.median(others):.2f} cores busy meanwhile (median; {max(others):.2f} at "
        "most).\n",
        f"| {' | '.join(rows[0])} |",
        f"|{'---|' * len(rows[0])}",
        *(f"| {' | '.join(each.values())} |" for each in rows),
    ]
    return "\n".join(lines) + "\n"


def machine_of(device: str) -> str:
    """What the numbers hold for."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        models = [
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0].partition(": ")[2] if models else platform.machine()
    return f"{name}, {CORES} cores, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    names = list(contestants("cpu"))
    parser.add_argument(
        "workloads", nargs="*", choices=[*WORKLOADS, "all"], default="all", metavar="WORKLOAD"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--segments", type=int, help="by default those of the workload")
    parser.add_argument("--full", action="store_true", help="all examples, and more segments")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--work", type=Path, help="where checkpoints and runs go; a temporary directory by default"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything that was measured")
    parser.add_argument(
        "--table", type=Path, metavar="FILE.md", help="the tables, with machine and command"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def compare(given: argparse.Namespace, work: Path) -> None:
    """Time every workload that is asked for; what is found is written after each."""
    names = list(WORKLOADS) if "all" in given.workloads else given.workloads
    command = (
        f"python tests/benchmarks/speed.py {' '.join(names)} --rounds {given.rounds} --device "
        f"{given.device}"
    )
    command += " --full" * given.full + (f" --segments {given.segments}" if given.segments else "")
    found: dict[str, Any] = {
        "machine": machine_of(given.device),
        "command": command,
        "workloads": {},
    }
    tables = [f"`{command}`\n"]
    for name in names:
        found["workloads"][name] = measure(name, given, work)
        tables.append(table(name, found["workloads"][name], found["machine"]))
        print(tables[-1], flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))
        if given.table:
            given.table.write_text("\n".join(tables))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given = options_of(parser)
    if "LCA_DATA" not in os.environ:
        parser.error(
            "set LCA_DATA to the directory that holds mnist.safetensors, cifar10.safetensors, "
            "tinyshakespeare.txt"
        )
    if given.job:
        job = Job(**json.loads(given.job))
        print(json.dumps(ROLES[job.role](job)))
        return
    with tempfile.TemporaryDirectory() as place:
        compare(given, given.work or Path(place))


if __name__ == "__main__":
    main()
