"""Complete findings, losses and paths in a shell.

Completion must be fast: this module imports neither torch nor anything that computes.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from ..base.declarations import declared_findings


def complete_path(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Let the shell complete a path.

    Args:
        ctx: the call so far.
        param: being completed.
        begun: the word typed so far.
    """
    return [CompletionItem(begun, type="file")]


def complete_finding(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """Return the findings whose names start with the typed word.

    Args:
        ctx: the call so far.
        param: being completed.
        begun: the word typed so far.
    """
    return sorted(name for name in declared_findings() if name.startswith(begun))


def complete_run_or_finding(
    ctx: click.Context, param: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Complete a finding once a run is named, and a path before.

    Args:
        ctx: the call so far.
        param: being completed.
        begun: the word typed so far.
    """
    names = complete_finding(ctx, param, begun) if _paths(ctx) else []
    return [*complete_path(ctx, param, begun), *map(CompletionItem, names)]


def complete_loss(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """Return the losses, of the local runs named so far, whose names start with the typed word.

    Args:
        ctx: the call so far.
        param: being completed.
        begun: the word typed so far.
    """
    from ..errors import LCAError
    from ..results import read_manifest

    names: dict[str, None] = {}
    for path in _paths(ctx):
        try:
            losses = read_manifest(path).losses if path.is_dir() else {}
        except (LCAError, OSError):  # the command reports the error; completion stays silent
            continue
        names |= dict.fromkeys(name for name in losses if name.startswith(begun))
    return list(names)


def _paths(ctx: click.Context) -> list[Path]:
    """Return the arguments so far that may be runs, without labels."""
    words = [
        *ctx.args,  # every argument, if the call ends in an option without its value
        *(ctx.params.get("runs") or ()),
        *filter(None, (ctx.params.get("run"), ctx.params.get("finding"))),
    ]
    return [Path(word if Path(word).exists() else word.partition("=")[2] or word) for word in words]
