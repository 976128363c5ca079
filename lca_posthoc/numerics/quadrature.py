r"""Define rules on [0, 1]: $\int_0^1 f(x)\,dx \approx \sum_q w_q f(x_q)$.

The composite family halves its intervals and keeps every old node: level 0 is the trapezoid (1
interval), level 1 Simpson (2), then composite Simpson with 4, 8, 16 and 32 intervals. The fixed
rules are not refined.

Source: any text on numerical quadrature, e.g. Davis and Rabinowitz, *Methods of Numerical
Integration*, 1984, ch. 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rule:
    """Hold nodes and weights on [0, 1], exact for polynomials up to `degree`."""

    name: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    degree: int

    @property
    def has_start(self) -> bool:
        """Return whether the first node is the start of the segment."""
        return self.nodes[0] == 0.0

    @property
    def has_end(self) -> bool:
        """Return whether the last node is the end of the segment."""
        return self.nodes[-1] == 1.0


@dataclass(frozen=True)
class Family:
    """Hold nested rules: each contains the nodes of the previous one, so that refining evaluates
    only fresh nodes.

    Attributes:
        rules: rules by level, coarsest first. Both ends of the segment are nodes of the first one,
            with equal weights at every level.
    """

    rules: tuple[Rule, ...]

    @property
    def finest(self) -> int:
        """Return the highest level."""
        return len(self.rules) - 1

    def fresh_nodes(self, level: int) -> tuple[float, ...]:
        """Return the nodes of a level that the previous level lacks.

        >>> COMPOSITE.fresh_nodes(2)
        (0.25, 0.75)
        """
        return tuple(
            node for node in self.rules[level].nodes if node not in self.rules[level - 1].nodes
        )

    def weight(self, level: int, node: float) -> float:
        """Return the weight of a node at a level.

        Args:
            level: level of the family.
            node: position in [0, 1].
        """
        rule = self.rules[level]
        return rule.weights[rule.nodes.index(node)]

    def weigh_alike(self, level: int, one: float, other: float) -> bool:
        """Return whether two nodes have equal weights at a level and all higher ones, so that one
        sum can represent both.

        >>> COMPOSITE.weigh_alike(2, 0.25, 0.75), COMPOSITE.weigh_alike(2, 0.25, 0.5), COMPOSITE.weigh_alike(3, 0.25, 0.5)
        (True, False, True)

        Args:
            level: lowest level to compare.
            one: position of the first node.
            other: position of the second node.
        """
        return all(
            self.weight(higher, one) == self.weight(higher, other)
            for higher in range(level, len(self.rules))
        )

    def level_of(self, rule: Rule) -> int | None:
        """Return the level of a rule; None if it is not in the family and thus never refined.

        >>> COMPOSITE.level_of(RULES["simpson"]), COMPOSITE.level_of(RULES["midpoint"])
        (1, None)
        """
        return self.rules.index(rule) if rule in self.rules else None


def nested(level: int) -> Rule:
    """Return the composite rule with `2 ** level` intervals.

    >>> nested(1).nodes, nested(1).degree
    ((0.0, 0.5, 1.0), 3)
    """
    if level == 0:
        return Rule("trapezoid", (0.0, 1.0), (0.5, 0.5), 1)
    n = 2**level
    nodes = tuple(i / n for i in range(n + 1))
    weights = tuple((1 if i in (0, n) else 4 if i % 2 else 2) / (3 * n) for i in range(n + 1))
    return Rule("simpson" if level == 1 else f"simpson-{n}", nodes, weights, 3)


def _gauss(points: int) -> Rule:
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return Rule(
        f"gauss-{points}",
        tuple((0.5 * (nodes + 1)).tolist()),
        tuple((0.5 * weights).tolist()),
        2 * points - 1,
    )


COMPOSITE = Family(tuple(nested(level) for level in range(6)))
RULES = {
    rule.name: rule
    for rule in (
        COMPOSITE.rules[1],
        COMPOSITE.rules[0],
        Rule("left", (0.0,), (1.0,), 0),
        Rule("midpoint", (0.5,), (1.0,), 1),
        _gauss(2),
        _gauss(3),
    )
}
