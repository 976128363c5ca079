"""Words the shell completes beside commands, options and choices: findings, losses and paths.

Completing must be quick: it imports neither torch nor what computes.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from ..base.declarations import declared_findings


def complete_path(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Let the shell complete a path."""
    return [CompletionItem(begun, type="file")]


def complete_finding(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """Return the findings whose names begin so."""
    return sorted(name for name in declared_findings() if name.startswith(begun))


def complete_run_or_finding(
    ctx: click.Context, param: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Return, once a run is named, the findings whose names begin so; let the shell complete a path
    where there are none.
    """
    names = complete_finding(ctx, param, begun) if _paths(ctx) else []
    return [*complete_path(ctx, param, begun), *map(CompletionItem, names)]


def complete_loss(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """Return the losses whose names begin so, of the runs on this machine that are named so far."""
    from ..errors import LCAError
    from ..results import read_manifest

    names: dict[str, None] = {}
    for path in _paths(ctx):
        try:
            losses = read_manifest(path).losses if path.is_dir() else {}
        except (LCAError, OSError):  # a command says what is wrong with it, completion does not
            continue
        names |= dict.fromkeys(name for name in losses if name.startswith(begun))
    return list(names)


def _paths(ctx: click.Context) -> list[Path]:
    """Return what may be a run among the arguments so far, without labels."""
    words = [
        *ctx.args,  # all of them, where an option that lacks its value ends the call
        *(ctx.params.get("runs") or ()),
        *filter(None, (ctx.params.get("run"), ctx.params.get("finding"))),
    ]
    return [Path(word if Path(word).exists() else word.partition("=")[2] or word) for word in words]
