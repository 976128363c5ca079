"""Shares of every element of a loss, from forward passes, against one backward pass of each element
alone in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lca_posthoc import Loss, Task
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.objective import build_objective
from lca_posthoc.numerics.objective.containers import fresh
from lca_posthoc.numerics.objective.directions import Motion
from lca_posthoc.numerics.objective.element_shares import (
    ElementDerivatives,
    ElementShares,
    passes,
)
from lca_posthoc.numerics.objective.evaluate import Objective
from lca_posthoc.numerics.objective.settings import ObjectiveSettings

from ..helpers import model_cases
from ..helpers.oracle import _float64, _with_plain_norms

EXAMPLES = 5
WIDTH, TOKENS, CLASSES = 8, 11, 3
Batch = tuple[Tensor, ...]
Data = Callable[[], dict[str, Batch]]


# --- models beside those of model_cases -----------------------------------------------------------


class Labelled(nn.Module):
    """A class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            *(nn.ConvTranspose2d(4, 4, 2), nn.GroupNorm(2, 4), nn.Conv2d(4, CLASSES, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def weight_norm() -> nn.Module:
    first = parametrizations.weight_norm(nn.Linear(12, 7))
    second = parametrizations.spectral_norm(nn.Linear(7, 7))
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(7, 4))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS)
        self.layers = kind(WIDTH, WIDTH, num_layers=2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(tokens))[0])


class Attention(nn.Module):
    """Attention by a function that takes all of its weights at once, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_bias_kv=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return (x + self.attention(x, x, x, need_weights=False)[0]) @ self.embed.weight.T


class Everywhere(nn.Module):
    """Keeps its weights in places that no name tells: a list, a closure, and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 4)
        self.kept = [self.first.weight]
        weight = self.first.weight
        self.twice: Callable[[Tensor], Tensor] = lambda x: F.linear(torch.tanh(x), weight)
        self.part = self.last.weight.detach()  # shares the memory, and is a constant

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.first(x)) + x @ self.kept[0]
        out = torch.empty(len(x), 4, dtype=x.dtype)
        out[:, :2] = self.last(y)[:, :2]
        out[:, 2:] = F.linear(y, self.part)[:, 2:] + self.last.bias[2:]
        return out


class Recomputed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.part, self.last = nn.Sequential(nn.Linear(12, 7), nn.Tanh()), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return self.last(checkpoint(self.part, x, use_reentrant=self.use_reentrant))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return above * weight**2, (above * x * 2 * weight).sum(0)


class SquareBothWays(Square):
    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, weight: Tensor | None) -> Tensor:
        primal = ctx.saved_tensors
        tangent = torch.zeros_like(primal[0])
        if x is not None:
            tangent = tangent + x * primal[1] ** 2
        return tangent if weight is None else tangent + primal[0] * 2 * primal[1] * weight


class Custom(nn.Module):
    def __init__(self, function: type[Square]) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(12, 7), nn.Parameter(torch.randn(7))
        self.last, self.function = nn.Linear(7, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function.apply(self.first(x), self.scale))


class Hidden(torch.autograd.Function):
    """Reads a weight that is no argument of it, as fused layers written by hand do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = layer(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        torch.autograd.backward(ctx.y, above)
        return ctx.x.grad, None


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(Hidden.apply(x.requires_grad_(), self.first)))


class Straight(torch.autograd.Function):
    """Rounds, and lets gradients through as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round(decimals=1)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Tensor:
        return above

    @staticmethod
    def jvp(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Rounded(nn.Module):
    """A function whose derivatives of the two passes differ, only for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 7, bias=False), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Straight.apply(self.first(x)))


class OwnKernel(nn.Module):
    """Insists on a kernel of attention that has no rule for tangents."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(TOKENS, WIDTH), model_cases.Block(WIDTH, False)

    def forward(self, tokens: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.block(self.embed(tokens)) @ self.embed.weight.T


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (
            torch.compile(nn.Linear(12, 7), backend="aot_eager"),
            nn.Linear(7, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Mapped(nn.Module):
    """Calls a layer inside a transform of functorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.last = nn.Linear(12, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(torch.func.vmap(self.inside)(x)))


# --- losses ---------------------------------------------------------------------------------------


def pixel_classes() -> dict[str, Batch]:
    """Three classes of pixels, by their brightness."""
    images = model_cases.CASES["conv_bn"].data()["train"][0]
    return {"train": (images, (images[:, 0] > 0).long() + (images[:, 0] > 1).long())}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def gradient_penalty(model: nn.Module, batch: Batch) -> Tensor:
    x = batch[0].detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return cross_entropy(model(batch[0]), batch[1]) + (slope**2).sum(1)


def own_gradient(model: nn.Module, batch: Batch) -> Tensor:
    """Takes a derivative by the parameters."""
    values = cross_entropy(model(batch[0]), batch[1])
    (slope,) = torch.autograd.grad(values.sum(), model[0].weight, create_graph=True)
    return values + slope.square().sum()


def sizes(model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    outputs = model(batch[0])
    weights = (batch[1][:, None] == torch.arange(4)).double() + 0.5
    return {"squares": (outputs**2, weights), "sizes": (outputs.abs(), weights * 2)}


def data_parallel(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(nn.DataParallel(model)(batch[0]), batch[1])


def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs + torch.randn_like(outputs), targets)


VECTORS, TEXT = model_cases.CASES["relu_mlp"].data, model_cases.CASES["transformer"].data
CLASSES_OF, TOKENS_OF = Loss(F.cross_entropy), Loss(model_cases.every_token)


def stated(
    build: Callable[[], nn.Module], loss: Loss = CLASSES_OF, data: Data = VECTORS
) -> Callable[[], Task]:
    return lambda: Task(build, data(), {"train": replace(loss, on="train")})


mlp = model_cases.smooth_mlp
TASKS: dict[str, Callable[[], Task]] = {
    **{name: case.task for name, case in model_cases.CASES.items()},
    "pixel classes": stated(Labelled, data=pixel_classes),
    "weight norm": stated(weight_norm),
    "lstm": stated(lambda: Recurrent(nn.LSTM), TOKENS_OF, TEXT),
    "gru": stated(lambda: Recurrent(nn.GRU), TOKENS_OF, TEXT),
    "attention": stated(Attention, TOKENS_OF, TEXT),
    "everywhere": stated(Everywhere),
    "recomputed, its input too": stated(lambda: Recomputed(False)),
    "own function": stated(lambda: Custom(SquareBothWays)),
    "gradient penalty": stated(mlp, Loss(call=gradient_penalty)),
    "data parallel": stated(mlp, Loss(call=data_parallel)),
    "compiled": stated(Compiled),
    "mapped": stated(Mapped),
}


# --- a task at a point ----------------------------------------------------------------------------


@dataclass
class Lab:
    """A task's first loss at a point, with two motions, on a batch."""

    objective: Objective
    motions: list[Motion]
    batch: Batch
    loss: str

    def derivatives(self, dtype: torch.dtype | None = None) -> ElementDerivatives:
        return ElementDerivatives(
            self.objective.tensors.differentiable,
            lambda batch: self.objective.values(self.loss, fresh(batch)),
            dtype or self.objective.dtype,
        )

    def shares(self) -> ElementShares:
        with self.objective.mode():
            return self.derivatives().shares(self.motions, self.batch)

    def check(self, dtype: torch.dtype | None = None) -> None:
        with self.objective.mode():
            self.derivatives(dtype).check(self.batch)


def build_lab(task: Callable[[], Task], precision: str = "float64", loss: str = "") -> Lab:
    torch.manual_seed(3)
    objective = build_objective(
        task,
        [loss] if loss else None,
        ObjectiveSettings(
            device=torch.device("cpu"), precision=precision, norm_stats="running", batch_size=None
        ),
    )
    name = next(iter(objective.losses))
    points = [{key: tensor.detach().clone() for key, tensor in objective.point.items()}]
    for _ in range(2):
        points.append(
            {
                key: tensor + 0.1 * torch.rand(tensor.shape).to(tensor.dtype)
                for key, tensor in points[-1].items()
            }
        )
    objective.place(points[1])
    batch = objective.splits[str(objective.losses[name].split)].sample(0, EXAMPLES)
    assert isinstance(batch, tuple)
    return Lab(objective, [Motion(*points[:2]), Motion(*points[1:])], batch, name)


def of_elements(lab: Lab) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Return values, weights, and every element's derivative along every motion, each by a backward
    pass of its own, normalisation written out.
    """
    objective, loss = lab.objective, lab.objective.losses[lab.loss]
    with _float64():
        model = objective.task.model().double().eval()
        model.load_state_dict(objective.model.state_dict())
        model = _with_plain_norms(model, False)
        named = dict([*model.named_parameters(), *model.named_buffers()])
        tensors = {name: named[name].requires_grad_() for name in objective.tensors.differentiable}
        data = tuple(
            part.double() if part.is_floating_point() else part.clone() for part in lab.batch
        )
        answer = (
            loss.call(model, data) if loss.call else loss.per_element()(model(data[0]), data[1])
        )
        values, weights = answer if isinstance(answer, tuple) else (answer, None)
        weighted = values if weights is None else values * weights
        rows = [
            torch.autograd.grad(
                element, list(tensors.values()), retain_graph=True, allow_unused=True
            )
            for element in weighted.reshape(-1)
        ]
    shares = {
        name: torch.tensor(
            [
                [
                    0.0
                    if gradients[index] is None
                    else float(
                        ((motion.end[name] - motion.start[name]).double() * gradients[index]).sum()
                    )
                    for gradients in rows
                ]
                for motion in lab.motions
            ],
            dtype=torch.float64,
        )
        for index, name in enumerate(tensors)
    }
    return weighted.detach(), weights, shares


# --- laws -----------------------------------------------------------------------------------------


# what float32 leaves of y - t where the two nearly agree is known to a few digits: an element of a
# squared error has a size of at least a hundredth of the largest
@pytest.mark.parametrize(
    ("precision", "bound", "least"), [("float64", 1e-10, 0.0), ("float32", 1e-5, 0.01)]
)
@pytest.mark.parametrize("name", TASKS)
def test_shares_are_those_of_a_backward_pass_of_each_element(
    name: str, precision: str, bound: float, least: float
) -> None:
    lab = build_lab(TASKS[name], precision)
    found = lab.shares()
    values, weights, truth = of_elements(lab)
    assert found.values.shape == values.shape
    assert found.weights is not None or weights is None
    if found.weights is not None:  # ones where the loss gives none itself
        assert torch.equal(
            found.weights, torch.ones_like(values) if weights is None else weights.double()
        )
    torch.testing.assert_close(found.values.double(), values.double(), rtol=bound, atol=bound)
    size = sum(shares.abs() for shares in truth.values())
    assert isinstance(size, Tensor)
    assert bool(size.sum(1).gt(0).all())
    size = torch.maximum(size, least * size.amax(1, keepdim=True))
    assert found.shares.keys() == truth.keys()
    for tensor, shares in found.shares.items():
        assert shares.dtype == torch.float64
        assert shares.shape == (2, values.numel())
        assert bool(((shares - truth[tensor]).abs() <= bound * size).all()), tensor


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", TASKS)
def test_the_check_agrees_where_shares_are_right(name: str, precision: str) -> None:
    build_lab(TASKS[name], precision).check()


def test_the_check_agrees_under_autocast() -> None:
    build_lab(TASKS["transformer"], "bfloat16").check(torch.bfloat16)


@pytest.mark.parametrize("entry", ["squares", "sizes"])
def test_entries_of_a_dict_have_shares_of_their_own(entry: str) -> None:
    lab = build_lab(stated(mlp, Loss(call=sizes)), loss=f"train/{entry}")
    lab.check()
    found = lab.shares()
    one = replace(lab.objective.losses[lab.loss], call=lambda *given: sizes(*given)[entry])
    lab.objective.losses[lab.loss] = one
    _, _, truth = of_elements(lab)
    for tensor, shares in found.shares.items():
        torch.testing.assert_close(shares, truth[tensor], rtol=0, atol=1e-12)


def test_a_tensor_that_does_not_move_has_shares_of_exactly_0_and_takes_no_pass() -> None:
    lab = build_lab(TASKS["relu_mlp"])
    moving = {"0.weight": lab.motions[0].end["0.weight"]}
    motion = Motion(lab.motions[0].start, {**lab.motions[0].start, **moving})
    calls = []
    lab.objective.model.register_forward_hook(lambda *_: calls.append(None))
    lab.motions = [motion, motion]
    shares = lab.shares().shares
    assert len(calls) == passes(tensors=1, directions=2)
    assert {name for name, share in shares.items() if share.any()} == {"0.weight"}


def test_a_pass_for_each_tensor_and_direction() -> None:
    lab, calls = build_lab(TASKS["transformer"]), []
    lab.objective.model.register_forward_hook(lambda *_: calls.append(None))
    lab.shares()
    assert len(calls) == passes(len(lab.objective.tensors.differentiable), 2)


@pytest.mark.parametrize("name", ["transformer", "conv_bn", "lstm", "weight norm", "compiled"])
def test_the_module_and_torch_are_as_before(name: str) -> None:
    lab = build_lab(TASKS[name], "float32")
    lab.shares()  # compiles, and sees to what is looked up once
    own = lab.objective.tensors
    before = (
        {key: tensor.clone() for key, tensor in own.point.items()},
        [tensor.requires_grad for tensor in own.point.values()],
        [getattr(torch._VF, function) for function in ("lstm", "gru")],
        [torch._weight_norm, torch.backends.mha.get_fastpath_enabled()],
        [torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()],
        torch.backends.cuda.flash_sdp_enabled(),
    )
    for tensor in own.differentiable.values():
        tensor.grad = None
    lab.check()
    lab.shares()
    assert all(torch.equal(own.point[key], tensor) for key, tensor in before[0].items())
    assert [tensor.requires_grad for tensor in own.point.values()] == before[1]
    assert [getattr(torch._VF, function) for function in ("lstm", "gru")] == before[2]
    assert [torch._weight_norm, torch.backends.mha.get_fastpath_enabled()] == before[3]
    assert [torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()] == before[4]
    assert torch.backends.cuda.flash_sdp_enabled() == before[5]
    assert all(tensor.grad is None for tensor in own.differentiable.values())
    with forward_ad.dual_level():
        tangents = [forward_ad.unpack_dual(tensor).tangent for tensor in own.point.values()]
    assert all(tangent is None for tangent in tangents)


def test_everything_is_as_before_where_the_loss_fails() -> None:
    lab = build_lab(stated(lambda: Custom(Square)))
    own = lab.objective.tensors
    with pytest.raises(InputError):
        lab.shares()
    assert all(tensor.requires_grad for tensor in own.differentiable.values())
    lab.objective.values(lab.loss, fresh(lab.batch))[0].sum().backward()
    assert all(tensor.grad is not None for tensor in own.differentiable.values())


# --- what has no derivative in the forward pass ---------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Task], tuple[str, ...]]] = {
    "a function without a jvp": (
        stated(lambda: Custom(Square)),
        ("'scale'", "Square, a custom function, has no jvp", 'per="example"'),
    ),
    "a kernel without a rule": (
        stated(OwnKernel, TOKENS_OF, TEXT),
        ("'embed.weight'", "_scaled_dot_product_flash_attention", "no rule", 'per="example"'),
    ),
    "a derivative by the parameters": (
        stated(mlp, Loss(call=own_gradient)),
        ("'0.weight'", "does not require grad", 'per="example"'),
    ),
    "lost in a recomputed part": (
        stated(lambda: Recomputed(True)),
        ("'part.0.weight', 'part.0.bias'", "CheckpointFunction", "use_reentrant=False"),
    ),
    "lost in a fused layer": (
        stated(Fused),
        ("'first.weight', 'first.bias'", "Hidden", 'per="example"'),
    ),
    "other in the forward pass": (stated(Rounded), ("'first.weight'", "Straight", 'per="example"')),
    "at random": (stated(mlp, Loss(noisy)), ("values of the loss change", "Seed")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_derivative_in_the_forward_pass_is_refused(case: str) -> None:
    task, words = REFUSED[case]
    lab = build_lab(task)
    with pytest.raises(InputError) as refusal:
        lab.check()
    for word in words:
        assert word in str(refusal.value)
