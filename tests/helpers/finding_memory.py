"""How much memory a finding takes: each in a process of its own, forked from one that has imported
everything and read nothing.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Case = tuple[str, dict[str, Any], tuple[str, ...]]  # a finding, its options, the losses it is of
Measured = dict[str, float] | str  # `before`, `peak`, both in MB, and `seconds`; or what went wrong

_PLAIN = (
    "blocks",
    "summary",
    "curve",
    "distribution",
    "helping",
    "oscillation",
    "layers",
    "units",
    "peaks",
    "candidates",
    "compare",
)
_GROUPED = (
    "blocks",
    "curve",
    "distribution",
    "helping",
    "oscillation",
    "layers",
    "units",
    "peaks",
    "microscope",
    "candidates",
)
CASES: dict[str, Case] = {
    **{name: (name, {}, ("train",)) for name in (*_PLAIN, "microscope")},
    "generalisation": ("generalisation", {}, ("train", "validation")),
    "layers, by role": ("layers", {"by_role": True}, ("train",)),
    "peaks of the motion": ("peaks", {"signal": "motion"}, ("train",)),
    **{f"{name}, groups": (name, {}, ("per_class",)) for name in _GROUPED},
}
CONTROL = "a whole array"  # which no finding may load


def measured(
    runs: Mapping[str, Path], cases: Sequence[str], limit: float, block: int | None = None
) -> Iterator[tuple[str, Measured]]:
    """The memory of each case.

    Args:
        runs: where the run of each loss is.
        cases: of `CASES`, or `CONTROL`.
        limit: MB of data a process may hold before it fails.
        block: numbers that findings hold at a time, frames of a microscope among them; what is
            usual where None.

    Yields:
        The case and its figures, one after the other.
    """
    given = json.dumps([{loss: str(run) for loss, run in runs.items()}, list(cases), limit, block])
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    call = [sys.executable, "-m", "tests.helpers.finding_memory", given]
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            case, found = json.loads(line)
            yield case, found
    assert process.returncode == 0


def _all(runs: dict[str, str], cases: list[str], limit: float, block: int | None) -> None:
    import scipy.stats  # noqa: F401  (what any finding imports is not its own memory)
    import xarray  # noqa: F401

    import lca_posthoc.findings  # noqa: F401
    import lca_posthoc.results  # noqa: F401

    if block is not None:
        _hold_less(block)
    for case in cases:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            found: Measured
            try:
                resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e6),) * 2)
                found = _measure(runs, case)
            except BaseException as error:
                found = f"{type(error).__name__}: {error}"
            with os.fdopen(writing, "w") as file:
                json.dump(found, file)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as file:
            told = file.read()
        _, status = os.waitpid(child, 0)
        print(
            json.dumps([case, json.loads(told) if told else f"ended with status {status}"]),
            flush=True,
        )


def _hold_less(block: int) -> None:
    """Make every finding hold at most so many numbers at a time, so that a small run shows what a
    large one would.
    """
    from lca_posthoc.findings import common

    for name, module in list(sys.modules.items()):
        if name.startswith("lca_posthoc.findings.") and hasattr(module, "BLOCK"):
            module.BLOCK = block  # type: ignore[attr-defined]
    common.blocks.__defaults__ = (1, block)
    for options in [options for name, options, _ in CASES.values() if name == "microscope"]:
        options |= {"frames": 50, "pixels": block // 50}


def _measure(runs: dict[str, str], case: str) -> dict[str, float]:
    from lca_posthoc import findings, open_run

    name, options, losses = (CONTROL, {}, ("train",)) if case == CONTROL else CASES[case]
    finding = _whole_array if case == CONTROL else getattr(findings, name)
    given = [open_run(runs[loss])[loss] for loss in losses]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began = _status("VmRSS"), time.perf_counter()
    found = (
        finding({"one": given, "other": given}, **options)
        if name == "compare"
        else finding(*given, **options)
    )
    seconds = time.perf_counter() - began
    assert found is not None
    return {"before": before, "peak": _status("VmHWM"), "seconds": seconds}


def _whole_array(results: Any) -> Any:
    return results.allocation[next(iter(results.allocation))].values


def _status(field: str) -> float:
    """A line of what the kernel says about this process, in MB."""
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{field}:")
    )
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    _all(*json.loads(sys.argv[1]))
