"""Define the options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..base.text import did_you_mean
from ..numerics.settings import SETTINGS, Setting, option_of
from .completion import complete_path

F = TypeVar("F", bound=Callable[..., Any])


class Choice(click.Choice[str]):
    """A choice of words; the error for another word suggests the nearest one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the chosen word.

        Args:
            value: the word on the command line.
            param: the option.
            ctx: the call.

        Raises:
            BadParameter: for any other word.
        """
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            near = did_you_mean(str(value), self.choices)
            text = f"{error.message.removesuffix('.')}.{near}" if near else error.message
            raise click.BadParameter(text, ctx, param) from None


def _chain(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _option_of_setting(name: str, setting: Setting) -> Callable[[F], F]:
    """Return a decorator that adds the option of a setting, None or () by default."""
    choices = (*(["auto"] if setting.automatic else []), *setting.choices)
    shown = f"  [default: {setting.shown_default}]" if setting.shown_default else ""
    return click.option(
        option_of(name),
        type=Choice(choices) if choices else setting.type,
        multiple=setting.repeatable,
        metavar=setting.metavar,
        help=setting.help + shown,
    )


trajectory_options = _chain(
    click.argument("checkpoints", type=click.Path(), nargs=-1, required=True),
    *(_option_of_setting(name, SETTINGS[name]) for name in ("steps", "pattern", "rename")),
)

replay_options = _chain(
    click.argument("checkpoints", type=click.Path(), nargs=-1, required=True),
    click.option(
        "--task",
        required=True,
        metavar="FILE[:FUNCTION]",
        shell_complete=complete_path,
        help="Task file, FILE:FUNCTION, or pkg.module:FUNCTION.",
    ),
    click.option(
        "--loss",
        "losses",
        multiple=True,
        metavar="NAME",
        help="A loss of the task (repeatable), or all.  [default: the first]",
    ),
    click.option(
        "--out",
        type=click.Path(),
        metavar="RUN",
        help="Run directory, or its URL in an object store. Required for several or remote CHECKPOINTS.  [default: CHECKPOINTS.lca; "
        "for a path with {step} in it, the directory before it]",
    ),
    click.option(
        "--causes",
        is_flag=True,
        help="Split allocations by what moved the weights: signal, noise, momentum, decay, rest.",
    ),
    click.option(
        "--along",
        type=click.Path(),
        metavar="FILE",
        help="Split allocations along each direction of a file that lca basis wrote.",
    ),
    *(_option_of_setting(name, setting) for name, setting in SETTINGS.items()),
)

workers_option = click.option(
    "--workers",
    type=int,
    help="Local workers, or how many to wait for at an address.  [default: one per GPU, or per "
    "core]",
)

cluster_options = _chain(
    click.option(
        "--cluster",
        default="local",
        show_default=True,
        metavar="WHERE",
        help="local, inline, tcp://HOST:PORT, tls://HOST:PORT, or file:SCHEDULER.json.",
    ),
    workers_option,
    click.option(
        "--tls-ca", type=click.Path(), metavar="PEM", help="Certificate authority, for tls://."
    ),
    click.option(
        "--tls-cert", type=click.Path(), metavar="PEM", help="Your certificate, for tls://."
    ),
    click.option("--tls-key", type=click.Path(), metavar="PEM", help="Its key, for tls://."),
    click.option(
        "--insecure", is_flag=True, help="Use a cluster that is open to the network without TLS."
    ),
    click.option(
        "--durability",
        type=Choice(("full", "none")),
        default="full",
        show_default=True,
        help="full: flushed to disk before it counts; none: for scratch disks, survives kills but "
        "no power cut.",
    ),
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
