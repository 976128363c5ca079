"""`python -m tests.helpers.faults [ROW …] [--ci] [--keep LEVEL]`: inject the faults and print a table
of what came of them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from lca_posthoc.numerics.schema import KEEP

from . import LETTERS, ONE_LEVEL, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = faults()
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help=f"of {', '.join(known)}; R19 for R19a and so on, all by default",
    )
    parser.add_argument("--ci", action="store_true", help="the reduced numbers")
    parser.add_argument(
        "--keep", choices=KEEP, help="the level of every trial of R1, R4, R6, R13; drawn by default"
    )
    given = parser.parse_args()
    if given.keep:
        os.environ[ONE_LEVEL] = given.keep
    asked = {*given.rows} or {*known}
    rows = [row for row in known if asked & {row, row.rstrip(LETTERS)}]
    if not rows:
        parser.error(f"no row is called {' or '.join(given.rows)}")
    print("| # | fault | times | outcome | seconds |\n|---|---|---|---|---|")
    for row in rows:
        each = known[row]
        count = each.ci if given.ci else each.full
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"lca-{row}-") as place:
            said = each.inject(count, Path(place))
        print(
            f"| {row} | {each.title} | {count} | {said} | {time.monotonic() - started:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
