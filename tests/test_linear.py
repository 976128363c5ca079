"""Linear layers by oneDNN: the values and gradients of the definition, whoever calls them and however."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lca_posthoc.objective import linear as subject

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN product"
)
SHAPES = {
    "matrix": ((600, 96), 64),
    "sequences": ((8, 75, 96), 64),
    "one output": ((30_000, 96), 1),
    "one input": ((30_000, 1), 96),
    "four dimensions": ((2, 5, 60, 96), 64),
}


@pytest.fixture(autouse=True)
def _small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_LEAST", 1)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every product that oneDNN makes."""
    made: list[str] = []
    product = subject._product

    def noted(*args: Any) -> Tensor:
        made.append("product")
        return product(*args)

    monkeypatch.setattr(subject, "_product", noted)
    return made


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(subject, "preferred", lambda: True)
    before = F.linear
    with subject.multiplying(torch.device("cpu")):
        yield
    assert F.linear is before


def _made(shape: tuple[int, ...], out: int, bias: bool) -> list[Tensor | None]:
    made = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=made), torch.randn(out, shape[-1], generator=made)]
    return [each.requires_grad_() for each in tensors] + [
        torch.randn(out, generator=made).requires_grad_() if bias else None
    ]


def _exact(tensors: list[Tensor | None], above: Tensor) -> list[Tensor]:
    """The value and the gradients in float64."""
    wide = [None if each is None else each.detach().double().requires_grad_() for each in tensors]
    value = F.linear(*wide)  # type: ignore[arg-type]
    return [value.detach(), *torch.autograd.grad(value, [each for each in wide if each is not None], above.double())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", SHAPES)
def test_values_and_gradients_are_those_of_the_definition(case: str, bias: bool, taken: list[str]) -> None:
    tensors = _made(*SHAPES[case], bias)
    value = subject.linear(F.linear)(*tensors)
    above = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(value, [each for each in tensors if each is not None], above)
    for ours, exact in zip([value, *gradients], _exact(tensors, above), strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == exact.shape
        assert (ours - exact).norm() <= 2e-6 * exact.norm()
    assert len(taken) == 3


def test_a_gradient_nobody_wants_is_not_computed(taken: list[str]) -> None:
    inputs, weight, bias = _made((64, 32), 16, True)
    assert inputs is not None
    subject.linear(F.linear)(inputs.detach(), weight, bias).sum().backward()
    assert len(taken) == 2
    assert inputs.grad is None


def test_a_gradient_of_stride_zero_and_inputs_of_any_stride(taken: list[str]) -> None:
    inputs, weight, bias = _made((32, 64), 16, True)
    assert inputs is not None
    assert weight is not None
    turned = inputs.detach().t()  # (64, 32), its rows not contiguous
    sliced = torch.cat([weight.detach(), weight.detach()], 1)[:, ::2][:, :32].requires_grad_()
    subject.linear(F.linear)(turned, sliced, bias).sum().backward()
    assert sliced.grad is not None
    exact = torch.ones(64, 16, dtype=torch.float64).t() @ turned.double()
    assert (sliced.grad - exact).norm() <= 2e-6 * exact.norm()
    assert taken


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.ones(4, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)),
        (torch.ones(4, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)),
        (torch.ones(3), torch.ones(2, 3)),
        (torch.ones(4, 3), torch.ones(3)),
        (torch.ones(0, 3), torch.ones(2, 3)),
        (torch.ones(4, 3).to_sparse(), torch.ones(2, 3)),
    ],
    ids=["float64", "bfloat16", "vector", "one unit", "nothing", "sparse"],
)
def test_what_does_not_suit_it_is_as_before(tensors: tuple[Tensor, Tensor], taken: list[str]) -> None:
    found = subject.linear(F.linear)(*tensors)
    assert torch.equal(found.to_dense(), F.linear(*tensors).to_dense())
    assert taken == []


def test_small_products_are_as_before(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    inputs, weight, bias = _made((64, 32), 16, True)
    assert torch.equal(subject.linear(F.linear)(inputs, weight, bias), F.linear(inputs, weight, bias))  # type: ignore[arg-type]


@pytest.mark.usefixtures("replaced")
def test_transforms_of_functions_are_as_before(taken: list[str]) -> None:
    inputs, weight, _ = _made((64, 32), 16, False)
    assert inputs is not None
    assert weight is not None

    def loss(weight: Tensor, one: Tensor) -> Tensor:
        return F.linear(one[None], weight).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight.detach(), inputs.detach())
    exact = 2 * torch.einsum("no,ni->noi", F.linear(inputs, weight), inputs)
    assert torch.allclose(each, exact, rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(lambda given: loss(given, inputs[0]), (weight,), (torch.ones_like(weight),))
    assert torch.allclose(tangent, exact[0].sum(), rtol=1e-4)


@pytest.mark.usefixtures("replaced")
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_give_the_same_gradient(reentrant: bool, taken: list[str]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    inputs = torch.randn(16, 32).requires_grad_()
    plain = torch.autograd.grad(net(inputs).square().sum(), list(net.parameters()))
    recomputed = checkpoint(net, inputs, use_reentrant=reentrant)
    recomputed.square().sum().backward()
    for each, parameter in zip(plain, net.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(each, parameter.grad)
    assert taken


@pytest.mark.usefixtures("replaced")
def test_compiled_code_is_as_before(taken: list[str]) -> None:
    compiled = torch.compile(lambda *given: F.linear(*given), backend="eager")
    inputs, weight, bias = _made((64, 32), 16, True)
    plain = subject.linear(F.linear)
    assert torch.allclose(compiled(inputs, weight, bias), plain(inputs, weight, bias), rtol=1e-4, atol=1e-5)


def _bits(seed: int) -> bytes:
    torch.set_num_threads(1)
    made = torch.Generator().manual_seed(seed)
    inputs, weight = torch.randn(700, 300, generator=made), torch.randn(90, 300, generator=made).requires_grad_()
    value = subject.linear(F.linear)(inputs, weight)
    value.square().sum().backward()
    assert weight.grad is not None
    return value.detach().numpy().tobytes() + weight.grad.numpy().tobytes()


def test_bits_repeat_in_every_process() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert len(set(pool.map(_bits, [3, 3, 3, 3]))) == 1


SETTINGS = {
    "nothing": "pass",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "tf32 as it was": "torch.backends.cuda.matmul.allow_tf32 = True",
    "tf32 on a GPU": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "bfloat16 on a CPU": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "bfloat16 in convolutions": "torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
}
ASKS = """
import torch
from lca_posthoc.objective.evaluate import tf32
from lca_posthoc.worker import state

{setting}
backends = torch.backends
read = lambda: [each.fp32_precision for each in (backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv)]
before, seen = read(), []

@state.reported
def work(spec):
    seen.append(read())
    seen.append(torch.get_float32_matmul_precision())
    with tf32(True):
        seen.append(backends.cuda.matmul.fp32_precision)
    seen.append(read())
    return {{}}

assert work({{}}) == {{}}, work({{}})
assert seen == [["ieee"] * 3, "highest", "tf32", ["ieee"] * 3], seen
same = {{"none": "ieee"}}  # nothing said is float32 too
after = read()
assert all(same.get(after[at], after[at]) == same.get(before[at], before[at]) for at in (0, 2)), (before, after)
"""


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="settings of torch 2.9 and later")
@pytest.mark.parametrize("setting", SETTINGS)
def test_float32_is_float32_whatever_the_users_code_has_set(setting: str) -> None:
    code = ASKS.format(setting=SETTINGS[setting])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_replaced_for_a_gpu_or_where_torch_does_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    before = F.linear
    for device, preferred in (("cuda", True), ("cpu", False)):
        monkeypatch.setattr(subject, "preferred", lambda preferred=preferred: preferred)
        with subject.multiplying(torch.device(device)):
            assert F.linear is before


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\n", "AVX512", True),
        ("vendor_id\t: GenuineIntel\n", "AVX512", False),
        ("vendor_id\t: AuthenticAMD\n", "AVX2", False),
        (None, "AVX512", False),
    ],
)
def test_the_kind_of_processor_alone_decides(
    cpuinfo: str | None, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path) -> str:
        assert str(path) == "/proc/cpuinfo"
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert subject.preferred.__wrapped__() is expected
