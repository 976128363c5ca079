"""`lca basis`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..base.text import count, safe
from ..errors import amount, few
from .options import json_option, trajectory_options
from .show import Table, bar, print_json, print_words, say, share, stdout, table

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoints.basis import Basis, Part

_MOST_ROWS = 10


@click.command()
@trajectory_options
@click.option(
    "-o", "--out", required=True, type=click.Path(), metavar="FILE", help="The file to write."
)
@click.option(
    "--directions",
    type=int,
    metavar="K",
    help="How many directions.  [default: 10; 1 each with --per-matrix; fewer where fewer exist]",
)
@click.option(
    "--per-matrix",
    is_flag=True,
    help="Find directions of each tensor of two or more axes by itself, 0 in all others.",
)
@click.option(
    "--random",
    type=int,
    metavar="K",
    help="Draw K random orthonormal directions over the same tensors instead, to compare with.",
)
@click.option("--seed", type=int, help="Seed of random directions.  [default: 0]")
@json_option
def command(
    checkpoints: tuple[str, ...],
    out: str,
    directions: int | None,
    per_matrix: bool,
    random: int | None,
    seed: int | None,
    as_json: bool,
    steps: str | None,
    pattern: str | None,
    rename: tuple[str, ...],
) -> None:
    """Write the directions in which training moved the weights of CHECKPOINTS most, for `lca run
    --along FILE`.

    They are the leading right singular vectors of the matrix whose rows are the displacements from
    each checkpoint to the next, over all parameters. It needs neither model nor data.

    \b
    lca basis checkpoints -o directions.safetensors
    lca basis checkpoints -o matrices.safetensors --per-matrix --directions 2
    lca basis checkpoints -o random.safetensors --random 10 --seed 1

    It leaves out running statistics of normalisation layers and tensors that do not move. The sign
    of a direction follows the motion. Existing files are not overwritten.

    \f

    Args:
        checkpoints: directories, or paths with {step} in them.
        out: the file to write.
        directions: how many; the default for None.
        per_matrix: finds directions of each matrix by itself.
        random: how many random directions to draw in their place; None for none.
        seed: of random directions; 0 for None.
        as_json: prints a document in place of words.
        steps: the training steps to read, as for `lca run`.
        pattern: a regular expression with `(?P<step>…)` for names.
        rename: rules "OLD=NEW" for names of tensors.
    """
    from ..checkpoints.basis import write_basis

    with bar() as progress:
        basis = write_basis(
            checkpoints,
            out,
            directions=directions,
            per_matrix=per_matrix,
            random=random,
            seed=seed,
            steps=steps,
            pattern=pattern,
            rename=rename,
            say=say,
            progress=progress,
        )
    if as_json:
        print_json(document(basis))
    else:
        print_basis(basis, stdout())


def document(basis: Basis) -> dict[str, object]:
    """Return what `--json` prints."""
    return {
        "schema": 1,
        "file": str(basis.path),
        "bytes": basis.size,
        "kind": basis.kind,
        "seed": basis.seed,
        "directions": basis.directions,
        "segments": basis.segments,
        "steps": list(basis.steps),
        "motion": basis.motion,
        "parts": [_part(part) for part in basis.parts],
        "left_out": [
            {"tensors": list(some.names), "reason": some.reason} for some in basis.left_out
        ],
    }


def _part(part: Part) -> dict[str, object]:
    return {
        "name": part.name,
        "directions": list(part.directions),
        "tensors": list(part.tensors),
        "parameters": part.parameters,
        "motion": part.motion,
        "singular_values": list(part.singular_values[: len(part.directions)]),
        "shares": {str(number): part.share(number) for number in _shown(part)},
    }


def _shown(part: Part) -> list[int]:
    """Return how many leading directions to print shares of the motion for."""
    from ..checkpoints.basis import SHOWN

    most = len(part.singular_values) or len(part.directions)
    return sorted({*(number for number in SHOWN if number <= most), len(part.directions)})


def print_basis(basis: Basis, console: Console) -> None:
    """Print singular values, shares of the motion, the tensors left out, and the file.

    Args:
        basis: directions of a series of checkpoints.
        console: to print on.
    """
    parameters = sum(part.parameters for part in basis.parts)
    print_words(
        f"{count(basis.segments, 'segment')}, steps {basis.steps[0]} to {basis.steps[-1]}; "
        f"directions over {count(parameters, 'parameter')} in "
        f"{count(len(basis.tensors), 'tensor')}; Σ‖Δθ‖² is {basis.motion:.6g}",
        console,
    )
    first = basis.parts[0]
    if first.name is not None:
        console.print(_matrices(basis))
    elif first.singular_values:
        console.print(_singular_values(first))
    if first.name is None:
        on_average = "" if first.singular_values else "on average "
        shares = ", ".join(
            f"{number}: {100 * first.share(number):.3g} %" for number in _shown(first)
        )
        print_words(
            f"share of Σ‖Δθ‖² that the first directions {on_average}capture: {shares}", console
        )
    for some in basis.left_out:
        print_words(f"left out ({some.reason}): {few([*map(safe, some.names)], 6)}", console)
    console.print(
        f"wrote {count(basis.directions, 'direction')}, {amount(basis.size)}, to {safe(str(basis.path))}"
    )


def _singular_values(part: Part) -> Table:
    """Return a table of the leading singular values."""
    rows = table("direction", "singular value", "share of Σ‖Δθ‖²")
    values = part.singular_values[: len(part.directions)]
    for number, value in enumerate(values[:_MOST_ROWS]):
        rows.add_row(f"{number}", f"{value:.6g}", share(value**2 / part.motion))
    return rows


def _matrices(basis: Basis) -> Table:
    """Return a table of the directions of each matrix, with the share of its motion they capture."""
    rows = table("tensor", "directions", "parameters", "moved, of all", "captured, of its own")
    for part in basis.parts:
        rows.add_row(
            safe(part.name or ""),
            "–".join(
                dict.fromkeys(str(ends) for ends in (part.directions[0], part.directions[-1]))
            ),
            f"{part.parameters:,}",
            share(part.motion / basis.motion),
            share(part.share(len(part.directions))),
        )
    return rows
