"""`lca verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
from rich.text import Text

from ..text import count, safe
from .options import json_option
from .show import print_json, say, stderr, stdout, table, waiting

_MOST = 1000  # rows of the table


@click.command()
@click.argument("run", type=click.Path())
@json_option
def command(run: str, as_json: bool) -> None:
    """Check every stored byte of RUN against its commit markers; while it runs and after, and wherever it was copied to.

    \b
    lca verify checkpoints.lca

    The exit code is 4 where something is damaged. Files of a run that was killed are no damage.
    """
    from ..errors import DamageError, amount
    from ..store import Damage, verify

    checked, damages, leftovers = verify(run), list[Damage](), list[str]()
    with waiting(stderr()) as shown:
        for found in checked:
            if isinstance(found, Damage):
                damages.append(found)
            else:
                leftovers.append(found.path)
            shown.update(Text(f"{count(checked.files, 'file')}, {amount(checked.bytes)}, {len(damages)} damaged"))
    if as_json:
        print_json(
            {
                "schema": 1,
                "files": checked.files,
                "bytes": checked.bytes,
                "damages": [asdict(each) for each in damages],
                "leftovers": leftovers,
            }
        )
    elif damages:
        _print(damages)
    if leftovers:
        say(
            f"{count(len(leftovers), 'file')} below {run} belong{'s' * (len(leftovers) == 1)} to nothing that is committed, "
            f"the first {leftovers[0]}"
        )
    if damages:
        way = "Restore it from a copy" if damages[0].path == "run.json" else f"Run `lca repair {run} --task FILE`"
        raise DamageError(f"{count(len(damages), 'damaged file')} in {run}. {way}.")
    if not as_json:
        stdout().print(f"{count(checked.files, 'file')}, {amount(checked.bytes)}: whole", markup=False)


def _print(damages: list[Any]) -> None:
    rows = table("file", "loss", "tensor or array", "span", "training steps", "what", names=3, words=1)
    for each in damages[:_MOST]:
        window = "" if each.window is None else f"window {each.window}"
        rows.add_row(
            Text(safe(each.path)),
            Text(safe(each.loss or "")),
            Text(safe(f"{each.array} of {each.tensor}" if each.tensor is not None else each.array or "")),
            window if each.span is None else str(each.span),
            "" if each.first_step is None else f"{each.first_step}–{each.last_step}",
            Text(safe(each.what)),
        )
    stdout().print(rows)
    if len(damages) > _MOST:
        stdout().print(f"and {len(damages) - _MOST:,} more: see `lca verify --json`")
