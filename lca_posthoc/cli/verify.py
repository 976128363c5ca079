"""`lca verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.text import Text

from ..base.text import count, quoted, safe
from .options import json_option
from .show import print_json, say, stderr, stdout, table, waiting

if TYPE_CHECKING:
    from ..results import Damage
    from ..results.verify import Verification

_MOST_ROWS = 1000  # rows of the table


@click.command()
@click.argument("run", type=click.Path())
@json_option
def command(run: str, as_json: bool) -> None:
    """Check every stored byte of RUN against its commit markers.

    \b
    lca verify checkpoints.lca

    RUN may still be running, and may be a copy. The exit code is 4 where a file is damaged. Files
    that a killed run left behind are no damage.

    \f

    Args:
        run: the path or URL of a run.
        as_json: prints a document in place of words.

    Raises:
        DamageError: if a file is damaged.
    """
    from ..errors import DamageError, amount
    from ..results import verify

    checked = verify(run)
    damages, leftovers = _checked(checked)
    if as_json:
        print_json(
            {"schema": 1, "files": checked.files, "bytes": checked.bytes}
            | {"damages": [asdict(damage) for damage in damages], "leftovers": leftovers}
        )
    elif damages:
        _print(damages)
    if leftovers:
        say(
            f"{count(len(leftovers), 'file')} below {run} belong{'s' * (len(leftovers) == 1)} to "
            f"nothing that is committed, the first {leftovers[0]}"
        )
    if damages:
        raise DamageError(f"{count(len(damages), 'damaged file')} in {run}. {_way(run, damages)}.")
    if not as_json:
        stdout().print(
            f"{count(checked.files, 'file')}, {amount(checked.bytes)}: whole", markup=False
        )


def _checked(checked: Verification) -> tuple[list[Damage], list[str]]:
    """Return the damage and the files that belong to no commit, and show progress."""
    from ..errors import amount
    from ..results import Damage

    damages, leftovers = list[Damage](), list[str]()
    with waiting(stderr()) as show:
        for entry in checked:
            if isinstance(entry, Damage):
                damages.append(entry)
            else:
                leftovers.append(entry.path)
            show(f"{count(checked.files, 'file')}, {amount(checked.bytes)}, {len(damages)} damaged")
    return damages, leftovers


def _way(run: str, damages: list[Damage]) -> str:
    """Return how to repair damage, as a sentence without its period."""
    if damages[0].is_of_the_record:
        return "Restore it from a copy"
    return f"Run `lca repair {quoted(run)} --task FILE`"


def _print(damages: list[Damage]) -> None:
    rows = table(
        "file", "loss", "tensor or array", "span", "training steps", "what", names=3, words=1
    )
    for damage in damages[:_MOST_ROWS]:
        window = "" if damage.window is None else f"window {damage.window}"
        array = damage.array or ""
        rows.add_row(
            Text(safe(damage.path)),
            Text(safe(damage.loss or "")),
            Text(safe(array if damage.tensor is None else f"{damage.array} of {damage.tensor}")),
            window if damage.span is None else str(damage.span),
            "" if damage.first_step is None else f"{damage.first_step}–{damage.last_step}",
            Text(safe(damage.what)),
        )
    stdout().print(rows)
    if len(damages) > _MOST_ROWS:
        stdout().print(f"and {len(damages) - _MOST_ROWS:,} more: see `lca verify --json`")
