"""How large reports are, how long they take to write, and how long a browser takes to show them.

```sh
python tests/benchmarks/report.py [--place DIR] [--shots DIR]
```

Reports are made of the demo, of a run with hostile names, of one with a hundred layers and ten
groups, of a long one (8,192 segments), of a wide one (a million parameters), and of two runs
together, below DIR, and kept for the next time where it is given. Each is opened in Debian's
chromium on the screen of a desktop and of a telephone, whose screenshots go to the second DIR.
`shown` is when headline, tables and microscope are there, `ready` when every figure is drawn. The
exit code is 1 where a file exceeds 8 MB, takes more than 3 s to be shown, or has a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lca_posthoc import open_run  # noqa: E402  (the path is set above)
from lca_posthoc.demo import demo  # noqa: E402
from lca_posthoc.report import MOST_BYTES, write_report  # noqa: E402
from tests.helpers.browser import SIZES, browser  # noqa: E402
from tests.helpers.large_runs import deep, hostile  # noqa: E402
from tests.helpers.synthetic_runs import build  # noqa: E402

SECONDS = 3.0
LONG = {"fc1.weight": (50, 64), "fc1.bias": (50,), "fc2.weight": (10, 50), "fc2.bias": (10,)}
WIDE = {
    "conv.weight": (64, 32, 3, 3),
    "fc1.weight": (1024, 900),
    "fc1.bias": (1024,),
    "fc2.weight": (64, 1024),
}

CASES: dict[str, Callable[[Path], object]] = {
    "demo": demo,
    "hostile": hostile,
    "deep": deep,
    "long": lambda place: build(
        place / "long.lca", LONG, 8192, {"train": None, "validation": None}
    ),
    "wide": lambda place: build(place / "wide.lca", WIDE, 256, {"train": None, "per_class": 10}),
}


def made(place: Path) -> dict[str, list[Path]]:
    """The runs of each report."""
    found = {}
    for name, make in CASES.items():
        if not (place / name / "made").exists():
            (place / name).mkdir(parents=True, exist_ok=True)
            make(place / name)
            (place / name / "made").touch()
        found[name] = sorted((place / name).glob("*.lca"))
    return found | {"both": [*found["demo"], *found["long"]]}


def main() -> int:
    """Make the runs, write the reports, open them, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--place", type=Path, help="where the runs are made and kept")
    parser.add_argument("--shots", type=Path, help="where screenshots go")
    given = parser.parse_args()
    over = 0
    with contextlib.ExitStack() as stack:
        place = given.place or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = made(place)
        chromium = stack.enter_context(browser())
        print(
            f"{'report':10} {'screen':8} {'MB':>6} {'written s':>9} {'load ms':>8} {'shown ms':>8} "
            f"{'ready ms':>8} {'faults':>6}"
        )
        for name, paths in runs.items():
            began = time.perf_counter()
            path = write_report([open_run(run) for run in paths], place / f"{name}.html")
            took, size = time.perf_counter() - began, path.stat().st_size
            for screen in SIZES:
                with chromium.opened(path, screen) as page:
                    timing = page.js(
                        "performance.timing.loadEventEnd - performance.timing.navigationStart"
                    )
                    shown, ready = (
                        int(page.js(f"document.documentElement.dataset.{what}"))
                        for what in ("shown", "ready")
                    )
                    if given.shots:
                        given.shots.mkdir(parents=True, exist_ok=True)
                        page.page.screenshot(path=str(given.shots / f"{name}-{screen}.png"))
                    faults = len(page.faults)
                print(
                    f"{name:10} {screen:8} {size / 1e6:6.2f} {took:9.1f} {timing:8.0f} {shown:8} "
                    f"{ready:8} {faults:6}",
                    flush=True,
                )
                over += size > MOST_BYTES or shown > 1000 * SECONDS or bool(faults)
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
