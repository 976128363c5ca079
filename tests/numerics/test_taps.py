"""Shares of every example by taps, against a plain backward pass of one example alone in float64."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc.numerics.objective import linear
from lca_posthoc.numerics.objective.directions import Along, Motion, SumsAlong
from lca_posthoc.numerics.objective.normalisation import normalising
from lca_posthoc.numerics.objective.tap_check import check
from lca_posthoc.numerics.objective.taps import ExampleShares, Taps

from ..helpers.oracle import _with_plain_norms
from ..helpers.tapped_models import (
    CASES,
    EXAMPLES,
    TIME,
    TOKENS,
    WIDTH,
    Case,
    Data,
    contrastive,
    mlp,
    of_tokens,
)


@dataclass
class Lab:
    """A case at a point, with a motion, on a batch."""

    model: nn.Module
    tensors: dict[str, Tensor]
    motions: list[Motion]
    data: Data
    case: Case

    def values(self, data: Data) -> Tensor:
        return self.case.values(self.model, data)

    def only(self, example: int) -> Data:
        return self.data[0][example : example + 1], self.data[1][example : example + 1]

    def told(self) -> ExampleShares:
        """Their shares, with axes as found where these are needed."""
        axes = None
        if self.case.axes:
            axes = self.check().axes
        shares = ExampleShares(self.tensors, len(self.motions), EXAMPLES, axes)
        taps = Taps(self.tensors, self.motions)
        with normalising("running", self.model.buffers()), taps:
            taps.begin(self.data)
            taps.backward(self.values(self.data).double().sum(), shares)
        return shares

    def check(self):  # type: ignore[no-untyped-def]
        with normalising("running", self.model.buffers()):
            alone = {example: self.only(example) for example in (1, 2, 5)}
            return check(self.tensors, self.motions, self.values, (self.data, EXAMPLES), alone)

    def is_untold(self, name: str) -> bool:
        return name.startswith(self.case.untold) if self.case.untold else False


def build_lab(name: str, dtype: torch.dtype = torch.float64) -> Lab:
    case = CASES[name]
    torch.manual_seed(3)
    model = case.build().to(dtype).eval()
    data = torch.randn(EXAMPLES, *case.shape).to(dtype), torch.randint(TOKENS, (EXAMPLES, TIME))
    tensors = {
        name: tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_floating_point() and not name.endswith(("mask", "_u", "_v"))
    }
    points = []
    for _ in range(3):
        points.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
        for tensor in tensors.values():
            tensor.data += 0.1 * torch.rand_like(tensor)
    for tensor in tensors.values():
        tensor.requires_grad_()
    return Lab(model, tensors, [Motion(*points[:2]), Motion(*points[1:])], data, case)


def alone(lab: Lab) -> Iterator[dict[str, Tensor]]:
    """Each example's derivatives along every motion, by plain autograd, normalisation written out."""
    model = _with_plain_norms(copy.deepcopy(lab.model), False)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    tensors = {name: tensors[name].requires_grad_() for name in lab.tensors}
    for example in range(EXAMPLES):
        for tensor in tensors.values():
            tensor.grad = None
        lab.case.values(model, lab.only(example)).sum().backward()
        yield {
            name: torch.stack([along(tensor.grad, motion, name) for motion in lab.motions])
            for name, tensor in tensors.items()
        }


def along(gradient: Tensor | None, motion: Motion, name: str) -> Tensor:
    if gradient is None:
        return torch.zeros((), dtype=torch.float64)
    return ((motion.end[name] - motion.start[name]).double() * gradient).sum()


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_shares_are_those_of_each_example_alone(name: str) -> None:
    lab = build_lab(name)
    told = lab.told()
    assert set(told.untold) == set(filter(lab.is_untold, lab.tensors)), told.untold
    assert set(told.shares) == set(lab.tensors) - set(told.untold)
    for example, truth in enumerate(alone(lab)):
        size = sum(share.abs().sum() for share in truth.values())
        for tensor, shares in told.shares.items():
            assert (shares[:, example] - truth[tensor]).abs().sum() <= 1e-13 * size, tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_check_agrees_where_shares_are_right(name: str, dtype: torch.dtype) -> None:
    lab = build_lab(name, dtype)
    checked = lab.check()
    assert set(checked.untold) == set(filter(lab.is_untold, lab.tensors)), checked.untold


def test_a_loss_that_mixes_examples_is_found_out() -> None:
    CASES["contrastive"] = Case(mlp, contrastive)
    try:
        lab = build_lab("contrastive")
    finally:
        del CASES["contrastive"]
    assert set(lab.check().untold) == set(lab.tensors)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.untold])
def test_shares_in_float32_sum_to_sums_along_the_motion(name: str) -> None:
    lab = build_lab(name, torch.float32)
    told = lab.told()
    sums = dict.fromkeys(lab.tensors, torch.zeros(2, dtype=torch.float64))
    gradients = SumsAlong(lab.tensors, Along(dict.fromkeys(lab.tensors), lab.motions))
    with normalising("running", lab.model.buffers()):
        total = lab.values(lab.data).double().sum()
        sums |= {name: taken[:, 0] for name, taken in gradients.sums(total).items()}
    size = sum(taken.abs().sum() for taken in sums.values())
    assert set(told.shares) == set(lab.tensors)
    for tensor, shares in told.shares.items():
        assert (shares.sum(1) - sums[tensor]).abs().max() <= 1e-6 * size, tensor


def test_losses_of_one_forward_pass_have_shares_of_their_own() -> None:
    lab = build_lab("mlp")
    taps = Taps(lab.tensors, lab.motions)
    with taps:
        taps.begin(lab.data)
        outputs = lab.model(lab.data[0])
        losses = outputs.square().sum(1), outputs.sum(1), 2 * outputs.square().sum(1)
        shares = []
        for loss, values in enumerate(losses):
            shares.append(ExampleShares(lab.tensors, len(lab.motions), EXAMPLES, None))
            taps.backward(values.sum(), shares[-1], retain_graph=loss < 2)
    first, other, twice = ([*told.shares.values()] for told in shares)
    for one, two in zip(first, twice, strict=True):
        assert torch.allclose(2 * one, two, rtol=1e-12, atol=0)
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_no_gradient_of_a_parameter_is_left_behind() -> None:
    for name in ("mlp", "lstm"):
        lab = build_lab(name)
        lab.told()
        assert all(tensor.grad is None for tensor in lab.tensors.values())


def test_functions_of_torch_are_as_before_behind_the_context() -> None:
    before = dict(vars(F))
    lab = build_lab("mlp")
    with pytest.raises(ZeroDivisionError), Taps(lab.tensors, lab.motions):
        assert 1 / int(dict(vars(F)) == before)
    assert dict(vars(F)) == before
    lab.values(lab.data).sum().backward()
    assert all(tensor.grad is not None for tensor in lab.tensors.values())


def test_operands_are_freed_with_the_graph() -> None:
    lab = build_lab("vision transformer")
    taps = Taps(lab.tensors, lab.motions)
    with taps:
        taps.begin(lab.data)
        hidden: list[weakref.ref[Tensor]] = []
        lab.model.head.register_forward_pre_hook(
            lambda module, inputs: hidden.append(weakref.ref(inputs[0]))
        )
        values = lab.values(lab.data)
        assert hidden[0]() is not None
        shares = ExampleShares(lab.tensors, len(lab.motions), EXAMPLES, None)
        taps.backward(values.sum(), shares)
        assert hidden[0]() is None
    assert values.requires_grad


def test_autocast_has_shares_near_those_of_float32() -> None:
    lab = build_lab("transformer", torch.float32)
    exact = lab.told().shares
    with torch.autocast("cpu", torch.bfloat16):
        told = lab.told()
    assert told.untold == {}
    size = sum(shares.abs().sum() for shares in exact.values())
    assert sum((told.shares[name] - exact[name]).abs().sum() for name in exact) <= 0.05 * size


def test_the_faster_linear_layer_is_tapped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "preferred", lambda: True)
    monkeypatch.setattr(linear, "_LEAST", 0)
    products: list[Tensor] = []
    native = linear._product
    monkeypatch.setattr(linear, "_product", lambda *args: products.append(args[0]) or native(*args))
    lab = build_lab("mlp", torch.float32)
    plain = lab.told()
    with linear.multiplying(torch.device("cpu")):
        told = lab.told()
    assert products
    assert told.untold == {}
    for name, shares in plain.shares.items():
        assert torch.allclose(told.shares[name], shares, rtol=1e-4, atol=1e-6), name


def test_gpt_2_of_transformers_is_told() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_positions=TIME, n_embd=WIDTH, n_layer=2, n_head=2
    )
    CASES["gpt-2"] = Case(
        lambda: transformers.GPT2LMHeadModel(config),
        lambda model, data: of_tokens(lambda tokens: model(tokens).logits, data),  # type: ignore[arg-type]
        axes=True,
    )
    try:
        test_shares_are_those_of_each_example_alone("gpt-2")
        test_the_check_agrees_where_shares_are_right("gpt-2", torch.float32)
    finally:
        del CASES["gpt-2"]
