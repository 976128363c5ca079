"""`lca demo`."""

from __future__ import annotations

from pathlib import Path

import click

from ..base.text import quoted
from ..replay.display import Display
from .show import stdout
from .summary import print_summary


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), default="lca-demo", metavar="[DIR]")
def command(directory: Path) -> None:
    """Train a small network on real digits, record every iterate, replay it into DIR, and write a
    report.

    It takes less than a minute on two CPU cores. DIR must not exist; it is lca-demo by default.

    \b
    lca demo
    lca summary lca-demo/checkpoints.lca
    """
    from ..demo import REPORT, demo
    from ..findings import summary

    with Display() as listen:
        opened = demo(directory, listen)
    print_summary({name: summary(opened[name]) for name in opened}, opened.path)
    console = stdout()
    console.print("\nTry next:")
    run = quoted(opened.path)
    for line in (
        f"lca plot {run} microscope -o {quoted(directory / 'film.gif')}",
        f"lca export {run} -o {quoted(directory / 'tables')} --format csv",
        f"lca run {quoted(directory / 'checkpoints')} --task lca_posthoc.demo:task --rule trapezoid "
        f"--out {quoted(directory / 'quick.lca')}",
    ):
        console.print(f"  {line}", markup=False)
    console.print(f"results in {opened.path}", markup=False)
    console.print(f"wrote {directory / REPORT}: open it in a browser", markup=False)
