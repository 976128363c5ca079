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
    """Check every stored byte of RUN against its commit markers; while it runs and after, and
    wherever it was copied to.

    \b
    lca verify checkpoints.lca

    The exit code is 4 where something is damaged. Files of a run that was killed are no damage.
    """
    from ..errors import DamageError, amount
    from ..store import Damage, verify

    checked, damages, leftovers = verify(run), list[Damage](), list[str]()
    with waiting(stderr()) as shown:
        for entry in checked:
            if isinstance(entry, Damage):
                damages.append(entry)
            else:
                leftovers.append(entry.path)
            shown.update(
                Text(
                    f"{count(checked.files, 'file')}, {amount(checked.bytes)}, "
                    f"{len(damages)} damaged"
                )
            )
    if as_json:
        print_json(
            {
                "schema": 1,
                "files": checked.files,
                "bytes": checked.bytes,
                "damages": [asdict(damage) for damage in damages],
                "leftovers": leftovers,
            }
        )
    elif damages:
        _print(damages)
    if leftovers:
        say(
            f"{count(len(leftovers), 'file')} below {run} belong{'s' * (len(leftovers) == 1)} to "
            f"nothing that is committed, "
            f"the first {leftovers[0]}"
        )
    if damages:
        way = (
            "Restore it from a copy"
            if damages[0].is_of_the_record
            else f"Run `lca repair {run} --task FILE`"
        )
        raise DamageError(f"{count(len(damages), 'damaged file')} in {run}. {way}.")
    if not as_json:
        stdout().print(
            f"{count(checked.files, 'file')}, {amount(checked.bytes)}: whole", markup=False
        )


def _print(damages: list[Any]) -> None:
    rows = table(
        "file", "loss", "tensor or array", "span", "training steps", "what", names=3, words=1
    )
    for damage in damages[:_MOST]:
        window = "" if damage.window is None else f"window {damage.window}"
        rows.add_row(
            Text(safe(damage.path)),
            Text(safe(damage.loss or "")),
            Text(
                safe(
                    f"{damage.array} of {damage.tensor}"
                    if damage.tensor is not None
                    else damage.array or ""
                )
            ),
            window if damage.span is None else str(damage.span),
            "" if damage.first_step is None else f"{damage.first_step}–{damage.last_step}",
            Text(safe(damage.what)),
        )
    stdout().print(rows)
    if len(damages) > _MOST:
        stdout().print(f"and {len(damages) - _MOST:,} more: see `lca verify --json`")
