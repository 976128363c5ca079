"""Measure on a CUDA device all that no CPU can tell, in at most eight minutes.

```sh
python tests/benchmarks/on_cuda.py --table cuda.md [--seconds 480] [--only PART ...] [--work DIR]
python tests/benchmarks/on_cuda.py --device cpu --small --table small.md
```

It needs torch 2.11 or newer, what this package needs, pytest for the last part, and no network.
Each part is a process of its own, which is ended when its share of the time is over. The lines of a
part are in the table as soon as they are known, so that a run that is cut off loses nothing. The
last part, the tests of the numbers, has all the time that the others left.

Data: where LCA_DATA names a directory with MNIST, CIFAR-10 and Shakespeare, these; else random
images and characters of the same shapes, which take the same time. The table says which.

The script is not called cuda.py: torch itself imports a module of that name, and scripts find those
beside them first.

`--device cpu --small` does the same on small shapes, to try the script; its figures say nothing
about a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "examples")]

import torch  # noqa: E402  (the path is set above)
from safetensors.torch import load_file, save_file  # noqa: E402
from speed import flops_per_second, seconds_of  # noqa: E402
from workloads import WORKLOADS as TRAININGS  # noqa: E402
from workloads import train  # noqa: E402

import lca_posthoc  # noqa: E402
from lca_posthoc.numerics.objective import batches, transfers  # noqa: E402
from lca_posthoc.replay.events import Note, Planned, SpanDone  # noqa: E402
from tests.helpers import large_transformer  # noqa: E402

LEVELS = ("tensors", "units", "statistics", "parameters")
WORKLOADS = ("mnist-fc", "mnist-lenet", "resnet20", "transformer")
HERE = Path(__file__).parent
DEFAULT = 480.0  # seconds for the whole
CHARACTERS = "".join(map(chr, range(33, 98)))


@dataclass(frozen=True)
class Given:
    """What every part is told.

    Attributes:
        device: "cuda" or "cpu".
        small: whether shapes are small.
        work: a directory that all parts share.
        seconds: that the part may take.
    """

    device: str
    small: bool
    work: Path
    seconds: float

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"


def say(*cells: object) -> None:
    """Print a row of a table, at once."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*cells: str) -> None:
    """Print the first two lines of a table."""
    say(*cells)
    print(f"{'|---' * len(cells)}|", flush=True)


# --- the machine ----------------------------------------------------------------------------------


def machine(given: Given) -> None:
    """Name the device, its driver and the libraries."""
    head("machine", "")
    if given.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        say("device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
            say("driver", done.stdout.strip())
        say("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    say("torch", torch.__version__)
    say("processor cores", len(os.sched_getaffinity(0)))
    say("data", "made up" if os.environ["LCA_DATA"].startswith(str(given.work)) else "real")
    say("date", time.strftime("%Y-%m-%d"))


def peak(given: Given) -> None:
    """Measure products of float32 matrices, in float32 and in TF32."""
    size = 256 if given.small else 8192
    head(f"products of {size}×{size} float32 matrices", "TFLOP/s")
    for name in ("float32", "tf32") if given.is_cuda else ("float32",):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        say(name, f"{flops_per_second(torch.mm, size, given.device) / 1e12:.2f}")


# --- replays of one transformer -------------------------------------------------------------------


def recorded(given: Given, shape: str, steps: int = 3) -> Path:
    """Return checkpoints of a transformer, made once."""
    os.environ["LCA_SHAPE"] = shape
    place = given.work / f"transformer-{shape.replace(',', '-')}"
    if len(list(place.glob("*.safetensors"))) <= steps:
        large_transformer.train(place, steps)
    return place


def waits(given: Given) -> None:
    """Count how often the host waits for the device on a segment, where torch can tell."""
    head("host waits", "a segment")
    place = recorded(given, "64,2,256,2" if given.small else "512,9,4096,16")
    for level in ("tensors", "parameters"):
        if not given.is_cuda:
            say(level, "told on CUDA alone")
            continue
        counts = {}
        for segments in (1, 3):  # what a run does once falls out of the difference
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                large_transformer.replay(place, segments, level, device=given.device)
            torch.cuda.set_sync_debug_mode("default")
            said = [str(warning.message) for warning in caught]
            counts[segments] = sum("synchronizing" in text for text in said)
        say(level, (counts[3] - counts[1]) / 2)


def memory(given: Given) -> None:
    """Measure the most memory of the device at every level, of one loss."""
    shape = "64,2,256,2" if given.small else "1024,12,16384,4"
    place = recorded(given, shape)
    parameters = large_transformer.parameters()
    head(f"{parameters:,} parameters", "peak MB", "bytes a parameter", "seconds a segment")
    for level in LEVELS:
        figures = alone("one replay", given, str(place), level)
        above = figures["peak"] - figures["activations"]
        say(
            level,
            f"{figures['peak'] / 1e6:,.0f}",
            f"{above / parameters:.1f}",
            f"{figures['seconds']:.3f}",
        )


def one_replay(given: Given, place: str, level: str) -> dict[str, float]:
    """Replay two segments, and say what it took; on CUDA, memory is that of the device."""
    figures = large_transformer.replay(Path(place), 2, level, device=given.device)
    if given.is_cuda:
        figures["peak"] = float(torch.cuda.max_memory_allocated())
    return figures


def large(given: Given) -> None:
    """Time GPT-2's size, and the largest that time and disk allow, beside the expert's loop."""
    head("transformer", "parameters", "expert's loop, s a segment", "ours, tensors", "of the loop")
    shapes = ["64,2,256,2"] if given.small else ["768,12,50257,16", "1600,48,50257,4"]
    for shape in shapes:
        place = recorded(given, shape)
        loop = alone("one loop", given, str(place))["seconds"]
        ours = alone("one replay", given, str(place), "tensors")["seconds"]
        parameters = f"{large_transformer.parameters():,}"
        say(shape, parameters, f"{loop:.3f}", f"{ours:.3f}", f"{ours / loop:.2f}")


def one_loop(given: Given, place: str) -> dict[str, float]:
    """Time the loop an expert would write: everything on the device, the gradient at a segment's
    end used again.
    """
    shape = large_transformer.Shape.of_environment()
    model = large_transformer.Transformer(shape).to(given.device)
    batch = tuple(tensor.to(given.device) for tensor in large_transformer.data(shape))
    files = sorted(Path(place).glob("*.safetensors"))[:3]
    parameters = dict(model.named_parameters())
    torch.backends.cuda.matmul.allow_tf32 = False

    def gradient(point: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(point[name])
                parameter.grad = None
        large_transformer.next_token(model, batch).mean().backward()
        return {name: parameter.grad for name, parameter in parameters.items()}

    def loop() -> None:
        start = load_file(files[0], given.device)
        first = gradient(start)
        for file in files[1:]:
            end = load_file(file, given.device)
            middle = gradient({name: (start[name] + end[name]) / 2 for name in start})
            last = gradient(end)
            sums = [
                ((first[name] + 4 * middle[name] + last[name]) * (end[name] - start[name])).sum()
                for name in parameters
            ]
            torch.stack(sums).cpu()
            start, first = end, last

    gradient(load_file(files[0], given.device))  # kernels are chosen
    return {"seconds": seconds_of(loop, given.device) / 2}


# --- the same bytes, and memory that runs out -----------------------------------------------------


def determinism(given: Given) -> None:
    """Replay twice in processes of their own, and compare the bytes of all chunks."""
    head("replayed twice", "chunks", "that differ")
    for name in ("mnist-lenet",) if given.small else WORKLOADS:
        files = [alone("stored", given, name) for _ in range(2)]
        different = [chunk for chunk, crc in files[0].items() if files[1].get(chunk) != crc]
        shown = ", ".join(sorted({chunk.split("/c/")[0] for chunk in different})[:4])
        say(name, len(files[0]), f"{len(different)}{f': {shown}' if shown else ''}")


def checkpoints_of(given: Given, name: str, segments: int) -> Path:
    """Return checkpoints of a workload, made once."""
    place = given.work / f"{TRAININGS[name].trajectory}-{segments}"
    if len(list(place.glob("*.safetensors"))) <= segments:
        train(TRAININGS[name], place, segments, given.device)
    return place


def replay_workload(
    given: Given, name: str, out: Path, segments: int, **options: Any
) -> lca_posthoc.Run:
    workload = TRAININGS[name]
    return lca_posthoc.run(
        checkpoints_of(given, name, segments),
        f"{HERE / 'workloads.py'}:{workload.task.__name__}",
        out=out,
        device=given.device,
        cluster="inline",
        tolerance="inf",
        norm_stats=workload.norm_stats,
        **options,
    )


def stored(given: Given, name: str) -> dict[str, int]:
    """Replay three segments; return the checksum of every chunk, by its path."""
    return {
        path: seal[1]
        for marker in markers_of(given, name)
        for path, seal in marker["files"].items()
    }


def markers_of(given: Given, name: str, **options: Any) -> list[dict[str, Any]]:
    """Replay three segments; return what is recorded of each span."""
    workload = TRAININGS[name]
    batch = workload.batch[given.device] if workload.norm_stats == "batch" else None
    # all of the transformer's text would take longer than everything else
    subset = ["0:200"] if given.small else ["0:256"] if name == "transformer" else []
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        out = Path(folder) / "run.lca"
        replay_workload(given, name, out, 3, batch_size=batch, subset=subset, **options)
        return [json.loads(file.read_text()) for file in (out / "commits").rglob("*.json")]


# --- copies beside what is computed ---------------------------------------------------------------


def copies(given: Given) -> None:
    """Replay from data and checkpoints that are on their way while others are computed, and from
    such that are waited for; compare bytes and times.
    """
    head("copies", "beside, s a segment", "awaited, s a segment", "chunks", "that differ")
    for name in ("mnist-lenet",) if given.small else ("mnist-fc", "resnet20"):
        beside, awaited = (alone("copied", given, name, how) for how in ("beside", "awaited"))
        differ = [path for path, crc in beside["files"].items() if awaited["files"][path] != crc]
        times = [f"{figures['seconds']:.3f}" for figures in (beside, awaited)]
        say(name, *times, len(beside["files"]), len(differ))


def copied(given: Given, name: str, how: str) -> dict[str, Any]:
    """Replay data that does not stay on the device, with every parameter's allocation; return
    seconds of a segment and the checksum of every chunk.
    """
    batches.room_on = lambda device: 0.0  # type: ignore[assignment]
    if how == "awaited":
        transfers.ToDevice.begin = _waited_for  # type: ignore[method-assign, assignment]
        transfers.FromDevice.begin = _left_at_once  # type: ignore[method-assign]
    markers = markers_of(given, name, keep="parameters")
    files = {path: seal[1] for marker in markers for path, seal in marker["files"].items()}
    return {"seconds": sum(marker.get("seconds", 0.0) for marker in markers) / 3, "files": files}


def _waited_for(
    self: transfers.ToDevice, load: Callable[[transfers.Copy], Any]
) -> transfers.Arriving[Any]:
    made = load(lambda tensor: tensor.to(self._device))
    torch.cuda.synchronize(self._device)
    return transfers.Arriving(made, [], torch.cuda.Event())


def _left_at_once(self: transfers.FromDevice, values: torch.Tensor, place: torch.Tensor) -> None:
    place.copy_(values)


def memory_runs_out(given: Given) -> None:
    """Replay LeNet in a batch that the device has no room for once the spans begin."""
    head("memory that runs out", "")
    if not given.is_cuda:
        say("told on CUDA alone", "")
        return
    notes: list[str] = []
    done: list[SpanDone] = []
    ballast: list[torch.Tensor] = []

    def listen(event: object) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        if isinstance(event, Planned):
            free, _ = torch.cuda.mem_get_info()
            room = 2 * 2**30
            ballast.append(torch.empty(max(0, free - room), dtype=torch.uint8, device="cuda"))
        if isinstance(event, SpanDone):
            done.append(event)

    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        out = Path(folder) / "run.lca"
        run = replay_workload(given, "mnist-lenet", out, 3, batch_size=55_000, progress=listen)
        markers = [json.loads(file.read_text()) for file in (out / "commits").rglob("0*.json")]
        residual = float(abs(run["train"].steps["residual"]).max())
    say("batch asked for", "55,000")
    say("batches it was computed in", sorted({marker["batch_size"] for marker in markers}))
    say("spans done", len(done))
    say("largest |residual|", f"{residual:.1e}")
    say("said", next((text for text in notes if "out of memory" in text), "nothing"))


# --- other scripts --------------------------------------------------------------------------------


def follow(command: list[str], work: Path) -> None:
    """Run another script, and pass on its tables; what it leaves where it is ended lies in `work`."""
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        text=True,
        cwd=work,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("|"):
                print(line, end="", flush=True)
    if process.returncode:
        say(Path(command[0]).name, f"ended with {process.returncode}")


def speed(given: Given) -> None:
    """Time four networks beside the first loop and the expert's."""
    for name in ("mnist-lenet",) if given.small else WORKLOADS:
        print(f"\n{name}\n", flush=True)
        follow(
            [
                str(HERE / "speed.py"),
                name,
                *("--rounds", "1", "--device", given.device),
                *("--segments", "2" if given.small or name == "transformer" else "8"),
                *([] if given.small else ["--full"]),
                *("--only", *([] if given.small else ["first"]), "expert", "inline", "tensors"),
                *("--work", str(given.work)),
            ],
            given.work,
        )


def recorder(given: Given) -> None:
    """Measure what recording costs training, from page-locked memory."""
    small = ("--network", "digits, 64-50-20-10", "--steps", "100") if given.small else ()
    rounds = "1" if given.small else "2"
    script = [str(HERE / "recorder.py"), "--rounds", rounds, "--device", given.device]
    follow([*script, *small], given.work)


def numerics(given: Given) -> None:
    """Run the tests of the numbers on the device, as far as the time goes."""
    head("tests of the numbers", "passed", "failed", "skipped", "to the end")
    chosen = {
        "test_numerics.py test_sums.py test_precision.py": (),
        "test_per_example.py test_causes.py test_along.py": (),
        "test_groups.py test_several_losses.py": (),
    }
    if given.small:
        chosen = {"test_draws.py": ()}
    each = given.seconds / len(chosen) - 2
    for files, options in chosen.items():
        paths = [str(ROOT / "tests" / "numerics" / file) for file in files.split()]
        workers = str(max(1, min(8, len(os.sched_getaffinity(0)) // 2)))
        command = [sys.executable, "-m", "pytest", "-vv", "-n", workers, "-p", "no:cacheprovider"]
        command += ["--device", given.device, *options, *paths]
        with (given.work / "pytest.txt").open("w+") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            try:
                process.wait(each)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.seek(0)
            text = log.read()
        outcomes = Counter(
            re.findall(r"^\[gw\d+\] \[.*?\] (PASSED|FAILED|SKIPPED)", text, re.MULTILINE)
        )
        ended = "yes" if process.returncode in (0, 1) else "no"
        say(files, outcomes["PASSED"], outcomes["FAILED"], outcomes["SKIPPED"], ended)
        for failed in sorted(set(re.findall(r"FAILED (?:tests/numerics/)?(\S+)", text)))[:20]:
            say(f"failed: {failed}", "", "", "", "")
        if not outcomes:
            say(f"no test ran: {text.strip().splitlines()[-1][:200]}", "", "", "", "")


# --- the whole ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the whole, and the most seconds it may take of `DEFAULT`."""

    run: Callable[[Given], None]
    seconds: float


PARTS = {
    "machine": Part(machine, 10),
    "peak": Part(peak, 15),
    "waits": Part(waits, 30),
    "memory": Part(memory, 45),
    "determinism": Part(determinism, 60),
    "copies": Part(copies, 35),
    "memory that runs out": Part(memory_runs_out, 20),
    "speed": Part(speed, 180),
    "large": Part(large, 75),
    "recorder": Part(recorder, 40),
    "numerics": Part(numerics, 480),
}
HELPERS: dict[str, Callable[..., dict[str, Any]]] = {
    "one replay": one_replay,
    "one loop": one_loop,
    "stored": stored,
    "copied": copied,
}


def alone(helper: str, given: Given, *arguments: str) -> dict[str, Any]:
    """Return what a function gives in a process of its own."""
    command = [*_command(given), "--helper", helper, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{helper} {' '.join(arguments)} ended with {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _command(given: Given) -> list[str]:
    small = ["--small"] if given.small else []
    place = ["--work", str(given.work), "--seconds", str(given.seconds)]
    return [sys.executable, __file__, "--device", given.device, *small, *place]


def lines_of(part: str, given: Given) -> Iterator[str]:
    """Yield the lines of a part as they come; it is ended when its time is over."""
    over = time.monotonic() + given.seconds
    command = [*_command(given), "--part", part]
    with (given.work / "part.txt").open("w") as log, (given.work / "part.txt").open() as lines:
        process = subprocess.Popen(command, stdout=log, start_new_session=True)
        ended = False
        while not ended and time.monotonic() < over:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
                ended = True
            yield from _whole_lines(lines)
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            yield from _whole_lines(lines)
            yield f"\n(ended after {given.seconds:.0f} s)"
        elif process.returncode:
            yield f"\n(ended with {process.returncode})"


def _whole_lines(lines: TextIO) -> Iterator[str]:
    """Yield the lines that have come since the last time."""
    while True:
        place = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(place)
            return
        yield line.removesuffix("\n")


def make_up_data(place: Path) -> None:
    """Write random images and characters in the shapes and under the names of the real ones."""
    place.mkdir()
    generator = torch.Generator().manual_seed(0)

    def images(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def labels(count: int) -> torch.Tensor:
        return torch.randint(0, 10, (count,), generator=generator, dtype=torch.uint8)

    sizes = {"mnist": (60_000, 28, 28), "cifar10": (50_000, 32, 32, 3)}
    for name, shape in sizes.items():
        tensors = {"train.images": images(*shape), "train.labels": labels(shape[0])}
        save_file(tensors, place / f"{name}.safetensors")
    codes = torch.randint(0, len(CHARACTERS), (1_115_394,), generator=generator).tolist()
    (place / "tinyshakespeare.txt").write_text("".join(CHARACTERS[code] for code in codes))


def measure(given: Given, names: list[str], table: Path) -> None:
    """Run the parts in turn, and write their lines as they come."""
    over = time.monotonic() + given.seconds
    with table.open("w") as file:

        def write(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        for name in names:
            left = over - time.monotonic()
            if left < 5:
                write(f"\n### {name}\n\nnot measured: the time was over")
                continue
            seconds = min(left, PARTS[name].seconds * given.seconds / DEFAULT)
            began = time.monotonic()
            write(f"\n### {name}\n")
            for line in lines_of(name, Given(given.device, given.small, given.work, seconds)):
                write(line)
            write(f"\n{time.monotonic() - began:.0f} s of {seconds:.0f}")


def main() -> None:
    """Measure, or do a part of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--seconds", type=float, default=DEFAULT, help="480 by default")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], metavar="PART")
    parser.add_argument("--table", type=Path, metavar="FILE.md", default=Path("cuda.md"))
    parser.add_argument("--work", type=Path, help="a temporary directory by default")
    parser.add_argument("--part", choices=[*PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--helper", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        given = Given(options.device, options.small, work.resolve(), options.seconds)
        if options.helper:
            helper, *arguments = options.helper
            print(json.dumps(HELPERS[helper](given, *arguments)))
            return
        if options.part:
            PARTS[options.part].run(given)
            return
        if given.is_cuda and not torch.cuda.is_available():
            parser.error("torch finds no CUDA device on this machine")
        work.mkdir(exist_ok=True)
        if "LCA_DATA" not in os.environ:
            place = given.work / "made-up"
            if not place.is_dir():
                make_up_data(place)
            os.environ["LCA_DATA"] = str(place)
        measure(given, options.only, options.table)


if __name__ == "__main__":
    main()
