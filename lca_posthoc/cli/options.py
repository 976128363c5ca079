"""Options several commands share, written once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_RULES = ("simpson", "trapezoid", "left", "midpoint", "gauss-2", "gauss-3")


def _chain(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


replay_options = _chain(
    click.argument("checkpoints", type=click.Path()),
    click.option(
        "--task",
        required=True,
        metavar="FILE[:FUNCTION]",
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
        "--out", type=click.Path(), metavar="RUN", help="Run directory.  [default: CHECKPOINTS.lca]"
    ),
    click.option(
        "--rule",
        type=click.Choice(_RULES),
        help="Quadrature; simpson and trapezoid are refined.  [default: simpson]",
    ),
    click.option(
        "--tolerance",
        metavar="NUMBER|SHARE%",
        help="Bound on |residual| per segment and loss, in units of loss, or such as 0.1%, of the "
        "loss at the first checkpoint; inf "
        "never refines.  [default: 1e-3; inf for bfloat16]",
    ),
    click.option(
        "--allocation-tolerance",
        metavar="NUMBER|SHARE%",
        help="Bound on the allocation's own error, Σ|A − A*|, given alike.  [default: inf]",
    ),
    click.option(
        "--keep",
        type=click.Choice(("parameters", "units", "tensors")),
        help="What to store.  [default: parameters]",
    ),
    click.option(
        "--batch-size", type=int, help="Examples per batch.  [default: chosen from shapes]"
    ),
    click.option(
        "--device",
        type=click.Choice(("auto", "cuda", "cpu")),
        help="Where to compute.  [default: auto: cuda, else cpu]",
    ),
    click.option(
        "--precision",
        type=click.Choice(("float32", "tf32", "bfloat16", "float64")),
        help="Of forward and backward passes; its error is measured.  [default: float32]",
    ),
    click.option(
        "--norm-stats",
        type=click.Choice(("running", "batch", "recalibrated")),
        help="Statistics of normalisation layers: stored, of each batch, or recomputed at each "
        "checkpoint.  [default: running]",
    ),
    click.option(
        "--tensors",
        multiple=True,
        metavar="PATTERN",
        help="Keep only tensors that match, such as 'fc1.*' (repeatable); the others become one "
        "remainder.",
    ),
    click.option(
        "--subset",
        multiple=True,
        metavar="[SPLIT=]WHICH",
        help="Use only some examples: A:B, I,J,K, or FRACTION@SEED drawn at random (repeatable).",
    ),
    click.option(
        "--steps",
        metavar="A:B[:K]",
        help="Training steps, both ends included; every K-th checkpoint.",
    ),
    click.option(
        "--pattern", metavar="REGEX", help="Finds (?P<step>\\d+) in names of checkpoints."
    ),
    click.option(
        "--rename",
        multiple=True,
        metavar="OLD=NEW",
        help="Map tensor names; OLD is a regular expression; what is left without a name is left "
        "out (repeatable).",
    ),
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
        type=click.Choice(("full", "none")),
        default="full",
        show_default=True,
        help="full: flushed to disk before it counts; none: for scratch disks, survives kills but "
        "no power cut.",
    ),
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
