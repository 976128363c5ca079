"""The memory each finding takes on runs of 20 GB.

```sh
python tests/benchmarks/memory.py [--place DIR] [--limit 2000] [CASE …]
```

Two runs are made below DIR, and kept for the next time where it is given: one of 9.85 million
parameters, 512 segments and two losses (train and validation, 20 GB of allocation each), and one of
a million parameters whose loss has ten groups (20 GB). They take 1.5 GB of disk, since most of
their files are links to others. Each finding runs in a process of its own; `peak` is the most
memory that process held, imports included, `growth` what the finding added. The exit code is 1
where one exceeds the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.helpers.finding_memory import CASES, measured  # noqa: E402  (the path is set above)
from tests.helpers.synthetic_runs import LARGE, build  # noqa: E402

GROUPED = {
    "embedding.weight": (4000, 128),
    "fc1.weight": (512, 784),
    "fc1.bias": (512,),
    "fc2.weight": (200, 512),
}


def made(place: Path) -> dict[str, Path]:
    """The two runs, by loss."""
    found: dict[str, Path] = {}
    for name, shapes, losses in (
        ("plain", LARGE, {"train": None, "validation": None}),
        ("grouped", GROUPED, {"per_class": 10}),
    ):
        path = place / f"{name}.lca"
        if not path.exists():
            began = time.perf_counter()
            size = build(place / f"{name}.building.lca", shapes, 512, losses)
            (place / f"{name}.building.lca").rename(path)
            print(
                f"{path}: {size / 1e9:.1f} GB of allocation, made in "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
        found |= dict.fromkeys(losses, path)
    return found


def main() -> int:
    """Make the runs, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; by default all"
    )
    parser.add_argument("--place", type=Path, help="where the runs are made and kept")
    parser.add_argument("--limit", type=float, default=2000, help="of the peak, in MB")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        place = given.place or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        runs, over = made(place), 0
        print(f"{'finding':28} {'peak MB':>9} {'growth MB':>9} {'seconds':>8}")
        for case, found in measured(runs, given.cases or list(CASES), 8 * given.limit):
            if isinstance(found, str):
                over += 1
                print(f"{case:28} failed: {found}", flush=True)
                continue
            over += found["peak"] > given.limit
            mark = "  over the limit" if found["peak"] > given.limit else ""
            growth = found["peak"] - found["before"]
            print(
                f"{case:28} {found['peak']:9.0f} {growth:9.0f} {found['seconds']:8.1f}{mark}",
                flush=True,
            )
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
