"""Numerics 1: the rules."""

from __future__ import annotations

import math

import pytest

from lca_posthoc.numerics.quadrature import COMPOSITE, RULES, Rule, nested

EVERY = {rule.name: rule for rule in (*RULES.values(), *COMPOSITE.rules)}
DEGREES = {"left": 0, "midpoint": 1, "trapezoid": 1, "simpson": 3, "gauss-2": 3, "gauss-3": 5} | {
    f"simpson-{2**level}": 3 for level in range(2, 6)
}

every_rule = pytest.mark.parametrize("rule", EVERY.values(), ids=EVERY)
every_level = pytest.mark.parametrize("level", range(1, COMPOSITE.finest + 1))


def mean_of_power(rule: Rule, power: int) -> float:
    return math.fsum(w * x**power for x, w in zip(rule.nodes, rule.weights, strict=True))


def test_rules_are_the_ones_documented_and_the_default_comes_first() -> None:
    assert set(RULES) == {"simpson", "trapezoid", "left", "midpoint", "gauss-2", "gauss-3"}
    assert next(iter(RULES)) == "simpson"
    assert {rule.name: rule.degree for rule in EVERY.values()} == DEGREES
    assert all(name == rule.name for name, rule in RULES.items())


@every_rule
def test_numerics_1_weights_sum_to_one_and_nodes_ascend_inside_the_segment(rule: Rule) -> None:
    assert math.fsum(rule.weights) == pytest.approx(1, abs=1e-15)
    assert all(weight > 0 for weight in rule.weights)
    assert all(0 <= node <= 1 for node in rule.nodes)
    assert list(rule.nodes) == sorted(set(rule.nodes))
    assert len(rule.nodes) == len(rule.weights)


@every_rule
def test_numerics_1_a_rule_is_exact_up_to_its_degree_and_not_beyond(rule: Rule) -> None:
    for power in range(rule.degree + 1):
        assert mean_of_power(rule, power) == pytest.approx(1 / (power + 1), abs=1e-15), power
    assert abs(mean_of_power(rule, rule.degree + 1) - 1 / (rule.degree + 2)) > 1e-8


@every_rule
def test_rules_but_left_are_symmetric(rule: Rule) -> None:
    mirrored = [1 - node for node in reversed(rule.nodes)]
    symmetric = mirrored == pytest.approx(rule.nodes, abs=1e-15) and rule.weights[
        ::-1
    ] == pytest.approx(rule.weights)
    assert symmetric == (rule.name != "left")


@every_rule
def test_end_nodes_are_told_exactly(rule: Rule) -> None:
    assert rule.has_start == (rule.name in {"left", "trapezoid"} or rule.name.startswith("simpson"))
    assert rule.has_end == (rule.name == "trapezoid" or rule.name.startswith("simpson"))


@every_level
def test_halving_keeps_every_old_node(level: int) -> None:
    before, after = nested(level - 1).nodes, nested(level).nodes
    assert set(before) < set(after)
    assert sorted((*before, *COMPOSITE.fresh_nodes(level))) == list(after)
    assert len(after) == 2**level + 1


@every_level
def test_ends_fresh_nodes_and_older_inner_nodes_weigh_the_same_among_themselves(level: int) -> None:
    rule, fresh = nested(level), set(COMPOSITE.fresh_nodes(level))
    weights = dict(zip(rule.nodes, rule.weights, strict=True))
    ends, inner = {0.0, 1.0}, set(rule.nodes) - fresh - {0.0, 1.0}
    assert [len({weights[node] for node in nodes}) for nodes in (ends, fresh, inner)] == [
        1,
        1,
        int(level > 1),
    ]


@every_level
def test_composite_simpson_is_simpson_on_pairs_of_intervals(level: int) -> None:
    pairs = 2 ** (level - 1)
    parts = [
        w * ((pair + x) / pairs) ** 4 / pairs
        for pair in range(pairs)
        for x, w in zip((0, 0.5, 1), (1 / 6, 4 / 6, 1 / 6), strict=True)
    ]
    assert mean_of_power(nested(level), 4) == pytest.approx(math.fsum(parts), abs=1e-15)


def test_refinement_starts_from_the_rule_named_and_ends_at_32_intervals() -> None:
    assert {name: COMPOSITE.level_of(rule) for name, rule in RULES.items()} == {
        "trapezoid": 0, "simpson": 1, "left": None, "midpoint": None, "gauss-2": None, "gauss-3": None,
    }  # fmt: skip
    assert len(nested(COMPOSITE.finest).nodes) == 33
    assert [nested(level) for level in range(COMPOSITE.finest + 1)] == list(COMPOSITE.rules)
