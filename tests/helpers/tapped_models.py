"""Small models and losses of every kind that examples are told apart in, and which tensors' shares
cannot be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

EXAMPLES = 6
TIME, WIDTH, TOKENS = 4, 8, 11
CLASSES = 3

Data = tuple[Tensor, Tensor]
Values = Callable[[nn.Module, Data], Tensor]


# --- models ---------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.LayerNorm(7), nn.Linear(7, 6, bias=False)),
        *(nn.PReLU(6), nn.RMSNorm(6), nn.Linear(6, CLASSES)),
    )


def conv_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        *(nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)),
        *(nn.InstanceNorm2d(6, affine=True), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=3, stride=2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)),
    )


def conv_1d_3d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 4, 2), nn.Unflatten(2, (3, 3, 1))),
        *(nn.Conv3d(4, 2, (2, 2, 1)), nn.Tanh(), nn.ConvTranspose3d(2, 2, 2), nn.Flatten(1)),
        nn.Linear(36, CLASSES),
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.up(self.norm(x)).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Causal, with positions and a tied head written as a product."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(TIME, WIDTH)
        self.block = Block()

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.block(self.embedding(tokens) + positions) @ self.embedding.weight.T


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, WIDTH, 3, stride=3)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.block, self.head = Block(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x += self.positions
        return self.head(self.block(x)[:, 0])


class Conv1D(nn.Module):
    """The layer of GPT-2 in transformers, which flattens batch and time."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.out = out
        self.weight, self.bias = (
            nn.Parameter(torch.randn(width, out)),
            nn.Parameter(torch.ones(out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], self.out)


def gpt_2_layers() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(TOKENS, WIDTH), Conv1D(9, WIDTH), nn.GELU(), Conv1D(TOKENS, 9)
    )


def weight_norm() -> nn.Module:
    first = parametrizations.weight_norm(nn.Linear(5, 7))
    second = parametrizations.spectral_norm(nn.Linear(7, 7))
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(7, CLASSES))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(7, 5).tril())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masked() -> nn.Module:
    first = nn.Linear(5, 7)
    parametrize.register_parametrization(first, "weight", Masked())
    return nn.Sequential(first, nn.Tanh(), nn.Linear(7, CLASSES))


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(7, 5))
        self.a, self.b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(7, 2))
        self.scale = nn.Parameter(torch.rand(7) + 1)
        self.head = nn.Parameter(torch.randn(CLASSES, 7))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.base + 2 * self.b @ self.a).T / self.scale - self.scale
        return torch.einsum("ni,ci->nc", y, self.head) + (1 - self.scale[:CLASSES] * y[:, :CLASSES])


class Attention(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(
            WIDTH, 2, batch_first=batch_first, kdim=WIDTH, vdim=WIDTH
        )
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.cross(x, torch.tanh(x), x)[0])


class SequenceFirst(Attention):
    def __init__(self) -> None:
        super().__init__(batch_first=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.T).transpose(0, 1)


class Flattened(nn.Module):
    """Flattens batch and time, in either order."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(tokens.flatten())))
        x = x.unflatten(0, tokens.shape).transpose(0, 1).flatten(0, 1)
        x = torch.tanh(self.second(x)).unflatten(0, (tokens.shape[1], -1))
        return self.head(x).transpose(0, 1)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(TOKENS, WIDTH, mode="mean")
        self.table = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.mix = nn.Bilinear(WIDTH, WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mix(self.bag(tokens), self.table[tokens].sum(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.lstm, self.head = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


class Square(torch.autograd.Function):
    """A custom function of a parameter and data."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return x * weight**2

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        return above * weight**2, (above * x * 2 * weight).sum(0)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(5, 7), nn.Parameter(torch.randn(7))
        self.last = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Square.apply(self.first(x), self.scale))


class Written(nn.Module):
    """Parameters that are written into other tensors, or over."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.shift = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
        self.last = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.zeros_like(x)
        rows[:, 1:] = self.token[1:]
        shift = self.shift.clone()
        shift[:2] = 1.0
        return self.last(x + rows + shift)


class Queries(nn.Module):
    """Attends to the data with queries of its own, as Perceivers do."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, WIDTH))
        self.embedding, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(2 * WIDTH, TOKENS)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        queries = self.queries.expand(len(tokens), -1, -1)
        y = self.attention(queries, x, x, need_weights=False)[0].flatten(1)
        return (x + self.head.weight.mean() * x) @ self.embedding.weight.T + self.head(y)[:, None]


class Edited(nn.Module):
    """Writes into what layers return."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, CLASSES)
        self.shift, self.into_view = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y[:, 0] = 1.0
        y[:, 1:3].mul_(2)
        view = y[:, 3:]
        y += self.shift
        y.sub_(self.first.bias, alpha=3)
        y[:, 2:4] += self.into_view
        return self.last(y) + view.sum(1, keepdim=True)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(7))
        self.c, self.d = nn.Parameter(torch.randn(CLASSES, 7)), nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, bias=self.b, weight=self.a)
        y = F.layer_norm(y, (7,), bias=self.b, weight=self.c[0])
        y = F.conv1d(y[:, None], weight=self.b.view(7, 1, 1), bias=self.b).mean(1)
        y = torch.sub(y, other=self.b, alpha=2) * torch.where(y > 0, self.b, y)
        y = torch.rsub(self.b, y, alpha=0.5) / (self.b**2 + 1) + torch.sqrt(self.b.abs()) / (
            y**2 + 1
        )
        y = torch.addmm(input=self.d, mat1=y, mat2=self.c.T, beta=2, alpha=0.5)
        return torch.baddbmm(self.d, y[:, None], self.d.diag().expand(len(y), -1, -1))[:, 0]


class Derived(nn.Module):
    """Makes weights of parameters, at random too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
        self.c, self.random = nn.Parameter(torch.randn(CLASSES, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.stack([self.a, self.b.exp(), self.a * self.b.cumsum(0)]).softmax(-1)
        first, second = (weight + self.c @ torch.outer(self.a, self.b)).split([2, 3], dim=1)
        y = x @ torch.cat([first, second.double().to(x)], 1).mT
        torch.manual_seed(0)
        return y + (x * F.dropout(self.random)).sum(1, keepdim=True)


class Sorted(nn.Module):
    """Sorts the examples, as is done for packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.last = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.last(torch.tanh(self.inside(x[order]))[order.argsort()])


class Routed(nn.Module):
    """Sends an example to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)])

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(len(x), CLASSES)
        for index, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0) == bool(index)
            y[chosen] = expert(x[chosen])
        return y


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, CLASSES)
        self.block = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7))

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant)
        return self.last(y)


class Transformed(nn.Module):
    """Calls a layer inside a transform of functorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.last = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.func.vmap(self.inside)(x))


class Detached(nn.Module):
    """Uses parameters with and without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weights = torch.softmax(self.first(x), -1)
        y = F.linear(x * weights, self.first.weight.detach(), self.first.bias)
        y.relu_()
        return self.last(y + self.first.bias.data)


# --- cases ----------------------------------------------------------------------------------------


def of_classes(model: nn.Module, data: Data) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1][:, 0] % CLASSES, reduction="none")


def of_tokens(model: nn.Module, data: Data) -> Tensor:
    logits = model(data[1])
    values = F.cross_entropy(logits.flatten(0, 1), data[1].flatten(), reduction="none")
    return values.view(data[1].shape) * torch.arange(1, 1 + TIME)


def with_decay(model: nn.Module, data: Data) -> Tensor:
    decay = sum((parameter**2).sum() for parameter in model.parameters())
    return of_classes(model, data) + 0.01 * decay


def gradient_penalty(model: nn.Module, data: Data) -> Tensor:
    x = data[0].detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return of_classes(model, data) + (slope**2).sum(1)


def contrastive(model: nn.Module, data: Data) -> Tensor:
    outputs = model(data[0])
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")


@dataclass(frozen=True)
class Case:
    """A model and a loss.

    Attributes:
        build: the model.
        values: the loss.
        shape: of an example's input.
        untold: tensors whose shares cannot be told; names that end in `.` stand for a module's.
        axes: whether the axes of the examples must be found first.
    """

    build: Callable[[], nn.Module]
    values: Values = of_classes
    shape: tuple[int, ...] = (5,)
    untold: tuple[str, ...] = ()
    axes: bool = False


CASES = {
    "mlp": Case(mlp),
    "mlp with decay": Case(mlp, with_decay),
    "conv net": Case(conv_net, shape=(2, 6, 6)),
    "conv 1d, 3d": Case(conv_1d_3d, shape=(2, 10)),
    "transformer": Case(Transformer, of_tokens),
    "vision transformer": Case(VisionTransformer, shape=(2, 6, 6)),
    "gpt-2's layers": Case(gpt_2_layers, of_tokens, axes=True),
    "weight norm": Case(weight_norm),
    "masked": Case(masked),
    "lora": Case(LoRA),
    "attention": Case(Attention, of_tokens, axes=True),
    "sequence first": Case(SequenceFirst, of_tokens, axes=True),
    "flattened": Case(Flattened, of_tokens, axes=True),
    "bag": Case(Bag, lambda model, data: of_classes(model, (data[1], data[1]))),
    "lstm": Case(Recurrent, of_tokens, untold=("lstm.",)),
    "custom function": Case(Custom, untold=("scale",)),
    "written": Case(Written, untold=("token", "shift")),
    "queries": Case(Queries, of_tokens, axes=True),
    "edited": Case(Edited, untold=("into_view",)),
    "keywords": Case(Keywords),
    "derived": Case(Derived, untold=("random",)),
    "sorted": Case(Sorted, untold=("inside.",), axes=True),
    "routed": Case(Routed, untold=("experts.",)),
    "checkpointed": Case(lambda: Checkpointed(False)),
    "checkpointed, reentrant": Case(lambda: Checkpointed(True)),
    "transformed": Case(Transformed, untold=("inside.",)),
    "detached": Case(Detached),
    "gradient penalty": Case(mlp, gradient_penalty, untold=("",)),
}
