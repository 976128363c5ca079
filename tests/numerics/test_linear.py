"""Linear layers by oneDNN: the values and gradients of the definition, whoever calls them and
however.
"""

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

import lca_posthoc
from lca_posthoc import Loss, Task
from lca_posthoc.numerics.objective import ObjectiveSettings, build_objective
from lca_posthoc.numerics.objective import linear as subject
from tests.helpers.cli import write_task
from tests.helpers.faults import clean_runs

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
    return [
        value.detach(),
        *torch.autograd.grad(value, [each for each in wide if each is not None], above.double()),
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", SHAPES)
def test_values_and_gradients_are_those_of_the_definition(
    case: str, bias: bool, taken: list[str]
) -> None:
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
    sliced = weight.detach()[:, :32].t().contiguous().t().requires_grad_()  # column by column
    subject.linear(F.linear)(turned, sliced, bias).sum().backward()
    assert sliced.grad is not None
    exact = torch.ones(64, 16, dtype=torch.float64).t() @ turned.double()
    assert (sliced.grad - exact).norm() <= 2e-6 * exact.norm()
    assert taken


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.ones(4, 3), torch.ones(2, 3), torch.tensor(3.0)),
        (torch.ones(4, 3), torch.ones(2, 3), torch.ones(1)),
        (torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 2)),
        (torch.ones(4, 3), torch.arange(4.0).as_strided((2, 3), (1, 1))),
        (torch.ones(4, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)),
        (torch.ones(4, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)),
        (torch.ones(3), torch.ones(2, 3)),
        (torch.ones(4, 3), torch.ones(3)),
        (torch.ones(0, 3), torch.ones(2, 3)),
        (torch.ones(4, 3).to_sparse(), torch.ones(2, 3)),
    ],
    ids=[
        "scalar bias",
        "short bias",
        "bias of a matrix",
        "overlapping",
        "float64",
        "bfloat16",
        "vector",
        "one unit",
        "nothing",
        "sparse",
    ],
)
def test_what_does_not_suit_it_is_as_before(tensors: tuple[Tensor, ...], taken: list[str]) -> None:
    found = subject.linear(F.linear)(*tensors)
    assert torch.equal(found.to_dense(), F.linear(*tensors).to_dense())
    assert taken == []


def test_shapes_that_do_not_agree_are_refused_in_the_same_words() -> None:
    with pytest.raises(RuntimeError) as ours:
        subject.linear(F.linear)(torch.ones(4, 3), torch.ones(2, 5))
    with pytest.raises(RuntimeError) as theirs:
        F.linear(torch.ones(4, 3), torch.ones(2, 5))
    assert str(ours.value) == str(theirs.value)


def test_small_products_are_as_before(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    inputs, weight, bias = _made((64, 32), 16, True)
    assert torch.equal(
        subject.linear(F.linear)(inputs, weight, bias), F.linear(inputs, weight, bias)
    )  # type: ignore[arg-type]


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
    shared = torch.func.vmap(lambda each: (F.linear(inputs, weight) * each).sum())(
        torch.arange(3.0)
    )
    assert torch.allclose(shared, F.linear(inputs, weight).sum() * torch.arange(3.0), rtol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight.detach(), torch.ones_like(weight))
        moved = torch.autograd.forward_ad.unpack_dual(F.linear(inputs.detach(), dual)).tangent
        assert torch.allclose(
            moved, inputs.sum(1, keepdim=True).expand(-1, 16), rtol=1e-4, atol=1e-4
        )
    _, tangent = torch.func.jvp(
        lambda given: loss(given, inputs[0]), (weight,), (torch.ones_like(weight),)
    )
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
def test_derivatives_of_derivatives_are_those_of_the_definition(taken: list[str]) -> None:
    inputs, weight, bias = _made((64, 32), 16, True)
    found = []
    for kind in (torch.float32, torch.float64):
        tensors = [
            each.detach().to(kind).requires_grad_()
            for each in (inputs, weight, bias)
            if each is not None
        ]
        value = F.linear(*tensors).tanh().sum()
        gradients = torch.autograd.grad(value, tensors, create_graph=True)
        sum(each.square().sum() for each in gradients).backward()
        found.append([each.grad for each in tensors])
    for ours, exact in zip(*found, strict=True):
        assert ours is not None
        assert exact is not None
        assert (ours - exact).norm() <= 1e-5 * exact.norm()
    assert taken


@pytest.mark.usefixtures("replaced")
def test_what_a_gradient_does_not_need_may_change_meanwhile(taken: list[str]) -> None:
    inputs, weight, bias = _made((64, 32), 16, True)
    assert inputs is not None
    assert weight is not None
    held = inputs * 2
    value = F.linear(held, weight.detach(), bias)
    held.add_(1)
    value.sum().backward()
    assert inputs.grad is not None
    assert torch.allclose(
        inputs.grad, 2 * weight.detach().sum(0).expand(64, -1), rtol=1e-4, atol=1e-4
    )
    assert taken


@pytest.mark.usefixtures("replaced")
def test_overlapping_inputs_have_the_same_gradient(taken: list[str]) -> None:
    _, weight, _ = _made((64, 32), 16, False)
    assert weight is not None
    windows = torch.randn(95, generator=torch.Generator().manual_seed(2)).unfold(0, 32, 1)
    F.linear(windows, weight).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, windows.sum(0).expand(16, -1), rtol=1e-4, atol=1e-4)
    assert taken


@pytest.mark.usefixtures("replaced")
def test_autocast_casts_as_before(taken: list[str]) -> None:
    inputs, weight, bias = _made((64, 32), 16, True)
    assert inputs is not None
    assert weight is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(inputs, weight, bias).dtype == torch.bfloat16
    assert taken == []


def test_batches_are_as_large_whoever_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for preferred in (True, False):
        monkeypatch.setattr(subject, "preferred", lambda preferred=preferred: preferred)
        inputs, targets = torch.randn(300, 64), torch.randint(10, (300,))
        task = Task(
            lambda: nn.Sequential(
                nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
            ),
            {"train": (inputs, targets)},
            {"train": Loss(F.cross_entropy, on="train")},
        )
        objective = build_objective(
            lambda task=task: task,
            None,
            ObjectiveSettings(
                device=torch.device("cpu"),
                precision="float32",
                norm_stats="running",
                batch_size=None,
            ),
        )
        found.append(objective.saved_bytes("train"))
    assert found[0] == pytest.approx(found[1], rel=0.1)
    assert found[0] < 4 * (2 * 256 + 64 + 2 * 10 + 2 * 256) * 2  # no weights


SETS = """
import torch
torch.set_num_threads(2)
torch.set_float32_matmul_precision("medium")
torch.backends.cudnn.benchmark = True
"""
CHECKS = """\
    def forward(self, inputs):
        held = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
        if held != (1, "highest", False):
            raise RuntimeError(f"the task's own settings are in force: {held}")
"""


def test_what_a_task_file_sets_when_it_is_imported_holds_for_no_span(tmp_path: Path) -> None:
    place = clean_runs.lay_out(tmp_path, 4)
    task = write_task(place / "small_task.py", "    def forward(self, inputs):\n", CHECKS)
    task.write_text(SETS + task.read_text())
    before = (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
    )
    lca_posthoc.run(
        place / "checkpoints", task, out=tmp_path / "run.lca", cluster="inline", device="cpu"
    )
    assert (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
    ) == before


@pytest.mark.usefixtures("replaced")
def test_compiled_code_is_as_before(taken: list[str]) -> None:
    compiled = torch.compile(lambda *given: F.linear(*given), backend="eager")
    inputs, weight, bias = _made((64, 32), 16, True)
    plain = subject.linear(F.linear)
    assert torch.allclose(
        compiled(inputs, weight, bias), plain(inputs, weight, bias), rtol=1e-4, atol=1e-5
    )


def _bits(seed: int) -> bytes:
    torch.set_num_threads(1)
    made = torch.Generator().manual_seed(seed)
    inputs, weight = (
        torch.randn(700, 300, generator=made),
        torch.randn(90, 300, generator=made).requires_grad_(),
    )
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
    "bfloat16 on all of a CPU": "torch.backends.mkldnn.fp32_precision = 'bf16'",
    "tf32 everywhere": "torch.backends.fp32_precision = 'tf32'",
    "bfloat16 in convolutions": "torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
}
ASKS = """
import dataclasses
import torch
from lca_posthoc.numerics.objective.precision import tf32
from lca_posthoc.replay.worker import state

{setting}
backends = torch.backends
mkldnn, cudnn = backends.mkldnn, backends.cudnn
parts = (backends.cuda.matmul, mkldnn.matmul, mkldnn.conv, mkldnn.rnn, cudnn.conv, cudnn.rnn)
read = lambda: [each.fp32_precision for each in parts]
before, seen = read(), []

Nothing = dataclasses.make_dataclass("Nothing", [])

@state.reported(Nothing)
def work(request):
    seen.append(read())
    seen.append(torch.get_float32_matmul_precision())
    with tf32(True):
        seen.append(read())
    seen.append(read())
    return Nothing()

assert work({{}}) == {{}}, work({{}})
assert seen == [["ieee"] * 6, "highest", ["tf32", "ieee", "ieee", "ieee", "tf32", "tf32"], ["ieee"] * 6], seen
same = {{"none": "ieee"}}  # nothing said is float32 too
after = read()
assert all(same.get(after[at], after[at]) == same.get(before[at], before[at]) for at in (0, 2, 3, 4, 5)), (before, after)
"""


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="settings of torch 2.9 and later"
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_float32_is_float32_whatever_the_users_code_has_set(setting: str) -> None:
    code = ASKS.format(setting=SETTINGS[setting])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_replaced_for_a_gpu_or_where_torch_does_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
