"""Workers that hang, run out of memory, come and go, and work for long."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
from distributed import Client
from safetensors.torch import load_file

from lca_posthoc import open_run
from lca_posthoc.replay import prepare
from tests.helpers.cli import refused, run_lca, says
from tests.helpers.dask_cluster import standing

from . import clean_runs, fault
from .processes import (
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
    undamaged,
    whole,
)

# --- a worker that hangs --------------------------------------------------------------------------

HANGING = """\
    def forward(self, inputs):
        if os.path.exists(FLAG) and float(self.out.bias[0]) == float(open(FLAG).read()):
            ctypes.PyDLL(None).sleep(100)  # and keeps the interpreter's lock
"""


@fault("R3", "a worker that hangs and holds the interpreter's lock", ci=1, full=5)
def hanging(count: int, _: Path) -> str:
    """The hang is at one checkpoint in the middle of a span, so that one span and no other meets
    it.
    """
    chance = random.Random(3)
    with laid_out() as (place, clean):
        flag = place / "flag"
        clean_runs.write_small_task(place, "    def forward(self, inputs):\n", HANGING)
        text = (place / "small_task.py").read_text()
        (place / "small_task.py").write_text(
            f"import ctypes\nimport os\n\nFLAG = {str(flag)!r}\n{text}"
        )
        for number in range(count):
            out, span = place / f"run-{number}.lca", chance.randrange(3, 18)
            step = clean_runs.SPAN * span + 1
            weights = load_file(place / "checkpoints" / f"step_{step:08d}.safetensors")
            flag.write_text(repr(float(weights["out.bias"][0])))
            environment = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "5s"}
            with standing(place / f"cluster-{number}", 1, **environment) as made:
                driver = drive(place, out, *made.options)
                assert driver.finished(120) == 3, (driver.returncode, driver.said)
                named(
                    driver.said,
                    f"Steps {step - 1} to {step + 1}",
                    "1 span failed; the others are complete",
                )
            assert markers(out) == 19
            undamaged(out)
            flag.unlink()
            complete(place, out, clean)
    return (
        f"{count} hangs, each exit 3 with the steps, the other 19 spans complete, bytes equal "
        "without it"
    )


# --- a device that is spoiled ---------------------------------------------------------------------

SPOILED = "CUDA error: device-side assert triggered"
SPOILING = """\
    def forward(self, inputs):
        if os.path.exists(FLAG) and self.out.bias[0].item() == float(open(FLAG).read()):
            STATE.add("spoiled")
            if ONCE:
                os.remove(FLAG)
        if STATE:
            raise torch.AcceleratorError({error!r})
"""


@fault("R23", "an error that spoils the device of a worker's process", ci=2, full=10)
def device_spoiled(count: int, _: Path) -> str:
    """As after an assertion on a GPU, every later call of the process fails too. In every second
    run the same span meets it again wherever it is computed.
    """
    chance, replaced = random.Random(23), 0
    with laid_out() as (place, clean):
        flag = place / "flag"
        forward = SPOILING.format(error=SPOILED)
        clean_runs.write_small_task(place, "    def forward(self, inputs):\n", forward)
        text = (place / "small_task.py").read_text()
        for number in range(count):
            out, log, once = place / f"run-{number}.lca", place / f"log-{number}", number % 2 == 0
            names = f"FLAG, STATE, ONCE = {str(flag)!r}, set(), {once}"
            (place / "small_task.py").write_text(f"import os\nimport torch\n\n{names}\n{text}")
            span = chance.randrange(3, 18)
            step = clean_runs.SPAN * span + 1
            weights = load_file(place / "checkpoints" / f"step_{step:08d}.safetensors")
            flag.write_text(repr(float(weights["out.bias"][0])))
            driver = drive(
                place, out, "--cluster", "local", "--workers", 2, environment=counting(log)
            )
            assert driver.finished(200) == (0 if once else 3), driver.said
            named(driver.said, SPOILED)
            if once:
                whole(out, clean)
            else:
                named(driver.said, f"Steps {step - 1} to {step + 1}", "1 span failed")
                assert markers(out) == 19
                undamaged(out)
                flag.unlink()
                complete(place, out, clean)
            hands = [line.split() for line in log.read_text().splitlines()]
            spoiled = [position for position, (each, _) in enumerate(hands) if each == str(span)]
            assert len(spoiled) == 2, hands
            for position in spoiled if not once else spoiled[:1]:
                later = [pid for _, pid in hands[position + 1 :]]
                # a span that waited there may have begun before the process ended
                assert later.count(hands[position][1]) <= 1, hands
                replaced += 1
            nobody_left(driver)
    return (
        f"{count} runs, {replaced} processes replaced, complete or exit 3 with the steps and the "
        "error, bytes equal"
    )


# --- memory ---------------------------------------------------------------------------------------

TIGHT = """\
    def forward(self, inputs):
        if len(inputs) > {most} and os.path.exists({when!r}):
            {error}
"""
ERRORS = (
    'raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")',
    # for which torch's allocator on the CPU raises what has no class of its own
    "torch.empty(2**58)",
    "raise MemoryError",
)


def _allocations(out: Path) -> dict[str, Any]:
    run = open_run(out)
    parts = ("allocation", "units", "tensors", "totals")
    return {
        f"{loss}/{part}/{name}": np.asarray(values, float)
        for loss in run
        for part in parts
        for name, values in getattr(run[loss], part).variables.items()
        if values.dtype.kind == "f"
    }


def _apart(out: Path, clean: Path) -> float:
    """The largest relative L1 distance of an array."""
    ours, theirs = _allocations(out), _allocations(clean)
    assert ours.keys() == theirs.keys()
    return max(
        float(np.abs(ours[name] - theirs[name]).sum() / max(np.abs(theirs[name]).sum(), 1e-300))
        for name in theirs
    )


def _run(place: Path, out: Path, *options: object, loss: str = "all") -> Any:
    with mock.patch.object(prepare, "choose_span", return_value=clean_runs.SPAN):
        given = ("--loss", loss, "--tolerance", "inf", *options)
        return run_lca(place / "checkpoints", place / "small_task.py", out, *given)


@fault("R12", "memory that runs out", ci=2, full=10)
def out_of_memory(count: int, _: Path) -> str:
    """Splits of 30 and 10 examples, of which no more than b may be had at once as soon as spans are
    computed.
    """
    farthest, smallest = 0.0, math.inf
    with laid_out() as (place, clean):
        for number in range(count):
            most, error = (
                (29, 7, 14, 2, 10, 1, 20, 5, 9, 3)[number % 10],
                ERRORS[number % len(ERRORS)],
            )
            out = place / f"run-{number}.lca"
            _tighten(place, out, most, error)
            result = _run(place, out)
            assert result.exit_code == 0, (most, error, result.output)
            says(result.stderr, "out of memory", "in batches of", "its marker records it")
            sizes = {
                json.loads(file.read_text())["batch_size"]
                for file in out.glob("commits/train/0*.json")
            }
            assert max(sizes) <= most, sizes
            smallest = min(smallest, *sizes)
            undamaged(out)
            farthest = max(farthest, _apart(out, clean))
            assert farthest <= 1e-6, (most, farthest)
            out = place / f"batch-{number}.lca"
            _tighten(place, out, min(most, 9), error)
            # the other one, which is kept per example, takes no statistics of batches
            result = _run(place, out, "--norm-stats", "batch", "--batch-size", 10, loss="train")
            refused(result, "out of memory", "--norm-stats batch", "--batch-size", code=5)
    return (
        f"{count} runs in batches down to {smallest:.0f}, at most {farthest:.1e} apart; {count} of "
        "batch statistics exit 5"
    )


def _tighten(place: Path, out: Path, most: int, error: str) -> None:
    new = TIGHT.format(most=most, error=error, when=str(out / "run.json"))
    task = clean_runs.write_small_task(place, "    def forward(self, inputs):\n", new)
    task.write_text(f"import os\n\n{task.read_text()}")


# --- workers that come and go ---------------------------------------------------------------------


@fault("R14", "one worker, two, one, in one run", ci=1, full=5)
def come_and_go(count: int, _: Path) -> str:
    chance, shared = random.Random(14), 0
    with laid_out(132) as (place, clean):
        for number in range(count):
            out, log = place / f"run-{number}.lca", place / f"log-{number}"
            environment = counting(log) | held(released := place / f"released-{number}", 40)
            with standing(place / f"cluster-{number}", **environment) as made:
                made.hire(**environment)
                driver = drive(place, out, *made.options, environment=environment)
                enough = chance.randint(2, 12)
                assert driver.until(lambda out=out, enough=enough: markers(out) >= enough), (
                    driver.said
                )
                made.hire(**environment)
                assert driver.until(lambda log=log: len(_hands(log)) == 2), driver.said
                released.touch()
                with Client(made.address, set_as_default=False) as client:
                    first = next(iter(_hands(log)))
                    found = client.run(os.getpid)
                    client.retire_workers(
                        [address for address, pid in found.items() if pid == first]
                    )
                assert driver.finished() == 0, driver.said
                assert sorted(begun(log)) == list(range(66))
                assert extra(log) == 0, begun(log)
                shared += min(_hands(log).values())
            whole(out, clean)
    return (
        f"{count} runs, every span executed once, {shared} on the worker that had fewer, bytes "
        "equal"
    )


def _hands(log: Path) -> Counter[int]:
    """How many spans each process began, in the order they came."""
    return Counter(int(line.split()[1]) for line in log.read_text().splitlines())


# --- for long -------------------------------------------------------------------------------------


@fault("R18", "a soak: many spans, two workers, one run", ci=120, full=1000)
def soak(count: int, _: Path) -> str:
    every = max(5, count // 20)
    with laid_out(count, span=1) as (place, clean):
        out, log = place / "run.lca", place / "log"
        driver = drive(
            place, out, "--cluster", "local", "--workers", 2, environment=counting(log), span=1
        )
        memory: dict[int, list[int]] = defaultdict(list)
        descriptors: list[int] = []
        taken = count // 4  # what the driver holds once is there by then
        while taken < count and driver.until(lambda taken=taken: markers(out) >= taken):
            workers = driver.workers()
            assert len(workers) == 2, driver.said
            warm = [each for each in workers if _hands(log)[each.pid] >= count // 12]
            for each in (psutil.Process(driver.pid), *warm):
                memory[each.pid].append(each.memory_info().rss)
            descriptors.append(psutil.Process(driver.pid).num_fds())
            taken += every
        assert driver.finished(600) == 0, driver.said
        nobody_left(driver)
        assert begun(log) == dict.fromkeys(range(count), 1)
        whole(out, clean)
    assert len(memory) == 3
    growth = [_growth(samples) for samples in memory.values()]
    assert max(growth) < 0.05, growth
    # Dask keeps a connection for each transfer that ever went on at the same time: few, and hardly
    # any more in the second half.
    later = descriptors[len(descriptors) // 2 :]
    assert max(later) - later[0] <= 2, descriptors
    assert max(descriptors) - min(descriptors) <= 8, descriptors
    return (
        f"{count} spans, {len(descriptors)} samples: memory of driver and workers "
        f"{', '.join(f'{each:+.1%}' for each in growth)}, {min(descriptors)} to {max(descriptors)} "
        "descriptors, nothing left, bytes equal"
    )


def _growth(samples: list[int]) -> float:
    """By how much the median of the last third is above that of the first."""
    third = max(1, len(samples) // 3)
    return statistics.median(samples[-third:]) / statistics.median(samples[:third]) - 1
