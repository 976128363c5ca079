r"""Rules on [0, 1]: $\int_0^1 f(x)\,dx \approx \sum_q w_q f(x_q)$.

The nested family halves its intervals and keeps every old node: level 0 is the trapezoid (1 interval), level 1
Simpson (2), then composite Simpson with 4, 8, 16 and 32 intervals. The fixed rules are used as they stand.
Source: any text on numerical quadrature, e.g. Davis and Rabinowitz, *Methods of Numerical Integration*, 1984, ch. 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rule:
    """Nodes and weights on [0, 1], exact for polynomials up to `degree`."""

    name: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    degree: int

    @property
    def has_start(self) -> bool:
        """Whether the first node is the start of the segment."""
        return self.nodes[0] == 0.0

    @property
    def has_end(self) -> bool:
        """Whether the last node is the end of the segment."""
        return self.nodes[-1] == 1.0


def nested(level: int) -> Rule:
    """The rule with `2 ** level` intervals.

    >>> nested(1)
    Rule(name='simpson', nodes=(0.0, 0.5, 1.0), weights=(0.16666666666666666, 0.6666666666666666, 0.16666666666666666), degree=3)
    """
    if level == 0:
        return Rule("trapezoid", (0.0, 1.0), (0.5, 0.5), 1)
    n = 2**level
    nodes = tuple(i / n for i in range(n + 1))
    weights = tuple((1 if i in (0, n) else 4 if i % 2 else 2) / (3 * n) for i in range(n + 1))
    return Rule("simpson" if level == 1 else f"simpson-{n}", nodes, weights, 3)


def fresh_nodes(level: int) -> tuple[float, ...]:
    """The nodes of `nested(level)` that `nested(level - 1)` does not have.

    >>> fresh_nodes(2)
    (0.25, 0.75)
    """
    return nested(level).nodes[1::2]


def _gauss(points: int) -> Rule:
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return Rule(f"gauss-{points}", tuple((0.5 * (nodes + 1)).tolist()), tuple((0.5 * weights).tolist()), 2 * points - 1)


MAX_LEVEL = 5
NESTED = tuple(nested(level) for level in range(MAX_LEVEL + 1))
RULES = {
    rule.name: rule
    for rule in (
        NESTED[1],
        NESTED[0],
        Rule("left", (0.0,), (1.0,), 0),
        Rule("midpoint", (0.5,), (1.0,), 1),
        _gauss(2),
        _gauss(3),
    )
}


def first_level(rule: Rule) -> int | None:
    """The level of the nested family a rule starts from; None for fixed rules, which are never refined.

    >>> first_level(RULES["simpson"]), first_level(RULES["midpoint"])
    (1, None)
    """
    return NESTED.index(rule) if rule in NESTED else None
