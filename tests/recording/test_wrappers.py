"""What wraps a model or an optimiser changes nothing of what is recorded: the whole state dict,
after the whole step.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import lca_posthoc
from lca_posthoc import Loss, Recorder, Task
from lca_posthoc.base import locks
from lca_posthoc.checkpoints.trajectory import normalise
from lca_posthoc.errors import InputError, LCAWarning, ResourceError
from lca_posthoc.recording.callback import Recording
from lca_posthoc.results import hold

INPUTS, TARGETS = (
    torch.randn(24, 4, generator=torch.Generator().manual_seed(0)),
    torch.arange(24) % 3,
)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A warning is part of what is promised: where one is due it is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", LCAWarning)  # notes of a run
        yield


# --- the model ------------------------------------------------------------------------------------


class Net(nn.Module):
    """A part with running statistics, and a head; the part may be wrapped."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda part: part) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part = wrap(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.part(inputs)))
        return scores


class Renames(Net):
    """Its state dict calls the head by another name."""

    def state_dict(self, *given: Any, **options: Any) -> dict[str, Any]:
        held = super().state_dict(*given, **options)
        return {name.replace("head.", "top."): value for name, value in held.items()}


class Copies(Net):
    """Its state dict holds copies."""

    def state_dict(self, *given: Any, **options: Any) -> dict[str, Any]:
        return {
            name: value.detach().clone()
            for name, value in super().state_dict(*given, **options).items()
        }


class Adds(Net):
    """A hook puts a number into its state dict that moves with training."""

    def __init__(self) -> None:
        super().__init__()
        self._register_state_dict_hook(
            lambda module, state, *_: state.update(norm=module.head.weight.detach().norm())
        )


class Counts(Net):
    """Has a state beside its tensors that is one."""

    def get_extra_state(self) -> Tensor:
        return torch.tensor(7)

    def set_extra_state(self, state: Tensor) -> None:
        assert int(state) == 7


class Averages(Net):
    """Holds an average of its head, with a count and a flag, as EMA wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("initted", torch.tensor(False))
        self.register_buffer("step", torch.tensor(0))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.step += 1
            self.average.weight.lerp_(self.head.weight.detach(), 0.1)
        return super().forward(inputs)


def normed() -> nn.Module:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.head)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    "checkpointed": lambda: Net(checkpoint_wrapper),
    "checkpointed twice": lambda: checkpoint_wrapper(Net(checkpoint_wrapper)),
    "compiled part": lambda: Net(torch.compile),  # type: ignore[arg-type]
    "compiled, checkpointed part": lambda: Net(
        lambda part: torch.compile(checkpoint_wrapper(part))
    ),  # type: ignore[return-value]
    "data parallel": lambda: nn.DataParallel(Net(checkpoint_wrapper)),
    "averaged": lambda: AveragedModel(Net()),
    "weight norm": normed,
    "renames": Renames,
    "copies": Copies,
    "adds": Adds,
    "counts": Counts,
    "averages": Averages,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_file_holds_what_the_state_dict_held_and_a_run_takes_it(
    tmp_path: Path, name: str
) -> None:
    model = MODELS[name]()
    states = []
    with Recorder(tmp_path / "ck", model) as recorder:
        for step in range(3):
            recorder.save(step)
            states.append(
                {normalise(each): value.clone() for each, value in model.state_dict().items()}
            )
            with torch.no_grad():
                for tensor in [*model.parameters(), *model.buffers()]:
                    tensor += tensor.new_tensor(1) if tensor.dtype != torch.bool else False
    for path, state in zip(sorted((tmp_path / "ck").glob("*.safetensors")), states, strict=True):
        stored = load_file(path)
        assert stored.keys() == state.keys()
        assert all(torch.equal(stored[each], value) for each, value in state.items())
    if "compiled" not in name:
        task = Task(MODELS[name], {"train": (INPUTS, TARGETS)}, {"train": Loss(F.cross_entropy)})
        run = lca_posthoc.run(
            tmp_path / "ck", task, out=tmp_path / "run.lca", cluster="inline", device="cpu"
        )
        floating = {
            each
            for each, value in states[0].items()
            if value.is_floating_point() and each != "norm"
        }
        names = {
            normalise(each).replace("head.", "top.") if name == "renames" else normalise(each)
            for each in run["train"].allocation
        }
        assert names == floating


def test_tensors_that_are_not_dense_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model = Net()
    model.register_buffer("links", torch.eye(3).to_sparse())
    with pytest.raises(
        InputError,
        match=r"'links' of the model is sparse .* "
        r"register_buffer\(.*persistent=False\)",
    ):
        Recorder(tmp_path / "ck", model).save(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch will have such tensors no more
        model.register_buffer("links", torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8))
    with pytest.raises(InputError, match=r"'links' of the model is quantised \(torch.qint8\)"):
        Recorder(tmp_path / "ck", model).save(0)
    model.register_buffer("links", torch.eye(3).to_sparse(), persistent=False)
    with Recorder(tmp_path / "ck", model) as recorder:
        recorder.save(0)


class Tells(Net):
    """Has a state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}


def test_a_state_that_is_no_tensor_is_named_once(tmp_path: Path) -> None:
    with Recorder(tmp_path / "ck", Tells()) as recorder:
        with pytest.warns(
            UserWarning, match=r"'_extra_state' \(a dict\), which is not a tensor.*not recorded"
        ):
            recorder.save(0)
        recorder.save(1)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2))
    model.module = nn.Linear(2, 1)
    with pytest.raises(
        InputError,
        match=r"'weight' and 'module\.weight' of the model both become "
        r"'weight'",
    ):
        Recorder(tmp_path / "ck", model).save(0)


@pytest.mark.parametrize("name", ["step", "group", "total"])
@pytest.mark.parametrize("kind", ["parameter", "buffer", "count"])
def test_names_that_results_have_themselves_are_refused_before_training(
    tmp_path: Path, name: str, kind: str
) -> None:
    model = Net()
    value = torch.tensor(1) if kind == "count" else torch.tensor(1.0)
    model.register_parameter(
        name, nn.Parameter(value)
    ) if kind == "parameter" else model.register_buffer(name, value)
    recorder = Recorder(tmp_path / "ck", model)
    if kind == "count":
        with recorder:
            recorder.save(0)
    else:
        with pytest.raises(
            InputError, match=f"a tensor called '{name}'.* Rename it in the model before you train"
        ):
            recorder.save(0)


# --- the optimiser --------------------------------------------------------------------------------


class Lookahead(torch.optim.Optimizer):
    """Every second step the weights go half the way back; without the base class's `__init__`."""

    def __init__(self, inner: Any, hooks: type = dict) -> None:
        self.inner, self.count = inner, 0
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = hooks(), hooks()
        self.slow = [each.detach().clone() for each in inner.param_groups[0]["params"]]

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.count += 1
        if self.count % 2 == 0:
            for slow, each in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow.lerp_(each, 0.5)
                each.copy_(slow)


class Duck:
    """A wrapper that is no optimiser by class, and clips the weights."""

    def __init__(self, inner: Any) -> None:
        self.parts = {"main": inner}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "parts":
            raise AttributeError(name)
        return getattr(self.parts["main"], name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.parts["main"].zero_grad(set_to_none)

    @torch.no_grad()
    def step(self) -> None:
        self.parts["main"].step()
        for each in self.parts["main"].param_groups[0]["params"]:
            each.clamp_(-0.1, 0.1)


class Delegates:
    """A wrapper that has nothing of its own."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class Accumulates(Duck):
    """Makes a step at every second call."""

    def step(self) -> None:
        self.parts["calls"] = self.parts.get("calls", 0) + 1
        if self.parts["calls"] % 2 == 0:
            super().step()


class SAM(torch.optim.Optimizer):
    """Up along the gradient, then down with the gradient found there."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups = inner, inner.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for each in self.param_groups[0]["params"]:
            self.state[each]["before"] = each.clone()
            each.add_(each.grad, alpha=0.1)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for each in self.param_groups[0]["params"]:
            each.copy_(self.state[each]["before"])
        self.inner.step()


class ClosureSAM(SAM):
    """Makes both in one call of `step`, which runs torch's hooks."""

    def step(self, closure: Any = None) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Clipped(torch.optim.SGD):
    """Its `step` calls that of its base, around which torch may run the hooks too."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for each in self.param_groups[0]["params"]:
            each.clamp_(-0.1, 0.1)


class Averager:
    """Stands for one that averages over processes."""

    step = 0

    def average_parameters(self, params: Any) -> None:
        for group in params:
            for each in group["params"]:
                each.data.mul_(0.9)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def post_local(inner: Any) -> Any:
    from torch.distributed.optim import PostLocalSGDOptimizer

    return PostLocalSGDOptimizer(inner, Averager())  # type: ignore[arg-type]


def accelerated(inner: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(inner)


class OwnMethod(Lookahead):
    """Moves the weights after every step, by a method of its own that anybody may call."""

    def update_slow(self) -> None:
        for slow, each in zip(self.slow, self.param_groups[0]["params"], strict=True):
            slow.lerp_(each, 0.5)
            each.copy_(slow)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.update_slow()


class Several(Lookahead):
    """Makes the steps of its parts in a comprehension, and by a function beside it; one of its
    names is a property.
    """

    @property
    def rate(self) -> float:
        return 0.5

    @staticmethod
    def doubled(value: int) -> int:
        return 2 * value

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        [make_step(each) for each in [self.inner]]
        for each in self.param_groups[0]["params"]:
            each.mul_(0.9)


def make_step(optimizer: Any) -> None:
    optimizer.step()


def scheduled(inner: Any) -> Any:
    wrapper = Lookahead(inner)
    wrapper.defaults = {}
    torch.optim.lr_scheduler.ConstantLR(wrapper)
    return wrapper


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda inner: inner,
    "Lookahead, dict": Lookahead,
    "Lookahead, OrderedDict": lambda inner: Lookahead(inner, OrderedDict),
    "Lookahead, scheduled": scheduled,
    "Lookahead of a duck": lambda inner: Lookahead(Duck(inner)),
    "duck": Duck,
    "duck of Lookahead": lambda inner: Duck(Lookahead(inner)),
    "a method of its own": OwnMethod,
    "several": Several,
    "delegates": Delegates,
    "accumulates": Accumulates,
    "SAM": SAM,
    "SAM with a closure": ClosureSAM,
    "post-local SGD": post_local,
    "accelerate": accelerated,
}


def trained(model: nn.Module, optimizer: Any, steps: int) -> list[dict[str, Tensor]]:
    """Train; the state dict after each step that the wrapper made, forward passes first as many
    loops have them.
    """
    states = []

    def gradient() -> Tensor:
        loss = F.cross_entropy(model(INPUTS), TARGETS)
        optimizer.zero_grad()
        loss.backward()
        return loss

    before = model.state_dict()["head.weight"].clone()
    for _ in range(steps):
        gradient()
        if type(optimizer) is SAM:
            optimizer.first_step()
            gradient()
            optimizer.second_step()
        elif isinstance(optimizer, ClosureSAM):
            optimizer.step(gradient)
        else:
            optimizer.step()
        state = {name: each.clone() for name, each in model.state_dict().items()}
        if not torch.equal(state["head.weight"], before):
            before = state["head.weight"]
            states.append(state)
        with torch.no_grad():  # an evaluation under other weights, as of averages
            own = copy.deepcopy(model.state_dict())
            for each in model.parameters():
                each.mul_(2)
            model.eval()(INPUTS)
            model.train().load_state_dict(own)
    return states


def assert_recorded(directory: Path, states: list[dict[str, Tensor]]) -> None:
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) == len(states)
    for path, state in zip(files, states, strict=True):
        stored = load_file(path)
        assert [name for name, each in state.items() if not torch.equal(stored[name], each)] == []


@pytest.mark.parametrize(
    "attached", ["the wrapper", "what is inside", "what is inside, before it is wrapped"]
)
@pytest.mark.parametrize("name", WRAPPERS)
def test_an_iterate_is_the_model_after_the_outermost_step(
    tmp_path: Path, name: str, attached: str
) -> None:
    model = Net()
    inner = sgd(model)
    states = [{each: value.clone() for each, value in model.state_dict().items()}]
    with Recorder(tmp_path / "ck", model) as recorder:
        if attached.endswith("wrapped"):
            recorder.attach(inner)
        wrapper = WRAPPERS[name](inner)
        if not attached.endswith("wrapped"):
            recorder.attach(wrapper if attached == "the wrapper" else inner)
        states += trained(model, wrapper, 6)
    assert len(states) == (4 if name == "accumulates" else 7)
    assert_recorded(tmp_path / "ck", states)
    if name != "Lookahead, scheduled":
        assert "step" not in {**vars(inner), **vars(wrapper)}


def test_a_followed_wrapper_is_called_as_before(tmp_path: Path) -> None:
    """Signatures are those of its methods, which others look at (accelerate, GradScaler); what is
    no method stays as it is.
    """
    model = Net()
    wrapper = Several(sgd(model))
    before = {name: inspect.signature(getattr(wrapper, name)) for name in ("step", "zero_grad")}
    with Recorder(tmp_path / "ck", model) as recorder:
        recorder.attach(wrapper)
        assert {name: inspect.signature(getattr(wrapper, name)) for name in before} == before
        assert (wrapper.rate, wrapper.doubled(3)) == (0.5, 6)


def test_a_step_that_calls_the_step_of_its_base_is_one(tmp_path: Path) -> None:
    sgd(Net())  # torch runs the hooks of the base class from here on
    model = Net()
    optimizer = Clipped(model.parameters(), lr=0.5)
    states = [{each: value.clone() for each, value in model.state_dict().items()}]
    with Recorder(tmp_path / "ck", model).attach(optimizer):
        states += trained(model, optimizer, 4)
    assert_recorded(tmp_path / "ck", states)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))],
    ids=["copied", "pickled"],
)
def test_a_copy_of_a_followed_wrapper_is_its_own(
    tmp_path: Path, copied: Callable[[Any], Any]
) -> None:
    model = Net()
    wrapper = Duck(sgd(model))
    with Recorder(tmp_path / "ck", model).attach(wrapper):  # type: ignore[arg-type]
        before = model.head.weight.detach().clone()
        other, theirs = copied((model, wrapper))
        trained(other, theirs, 1)
        assert torch.equal(model.head.weight, before)
        assert not torch.equal(other.head.weight, before)
        trained(model, wrapper, 1)
    assert len(list((tmp_path / "ck").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    "given",
    [torch.amp.GradScaler("cpu"), nn.Linear(1, 1), {"params": []}],
    ids=lambda each: type(each).__name__,
)
def test_what_cannot_be_followed_is_refused_with_the_line_that_works(
    tmp_path: Path, given: Any
) -> None:
    with pytest.raises(
        InputError,
        match=rf"attach was given {type(given).__name__}; .*recorder\.save\(step\) "
        rf"after each step",
    ):
        Recorder(tmp_path / "ck", Net()).attach(given)


# --- frozen parameters, no locks ------------------------------------------------------------------


def adapted() -> nn.Module:
    """A network of which only the head is trained."""
    model = Net()
    model.part.requires_grad_(False)
    return model


@pytest.mark.parametrize("frozen", [False, True])
def test_trainers_record_what_is_trained_and_all_where_asked(tmp_path: Path, frozen: bool) -> None:
    model = adapted()
    recording = Recording(tmp_path / "ck", **({"frozen": True} if frozen else {}))
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.5)  # type: ignore[union-attr, operator]
    recording.begin(model, 0, 2, [optimizer])
    for step in (1, 2):
        F.cross_entropy(model(INPUTS), TARGETS).backward()
        optimizer.step()
        recording.take(step)
    recording.end()
    base = {"part.0.weight", "part.0.bias", "part.1.weight", "part.1.bias"}
    assert set(model.state_dict()) - set(
        load_file(next((tmp_path / "ck").glob("*.safetensors")))
    ) == (set() if frozen else base)
    task = Task(adapted, {"train": (INPUTS, TARGETS)}, {"train": Loss(F.cross_entropy)})
    run = lca_posthoc.run(
        tmp_path / "ck", task, out=tmp_path / "run.lca", cluster="inline", device="cpu"
    )["train"]
    assert base.isdisjoint(run.allocation) is not frozen
    change = float(run.steps.loss_end[-1] - run.steps.loss_start[0])
    assert float(run.tensors.allocated.sum() + run.steps.residual.sum()) == pytest.approx(
        change, abs=1e-6
    )


def test_a_frozen_part_that_moves_all_the_same_is_said(tmp_path: Path) -> None:
    """The average of a teacher has no gradient and moves at every step."""
    model = adapted()
    recorder = Recorder(tmp_path / "ck", model, frozen=False)
    recorder.save(0)
    for each in model.part.parameters():
        each.data.lerp_(torch.full_like(each, 2.0), 0.1)
    recorder.save(1)
    with pytest.warns(
        UserWarning,
        match=r"'part.0.weight' and 3 more moved although "
        r"frozen.*frozen=True",
    ):
        recorder.close()


def test_a_parameter_that_comes_to_be_trained_is_named_with_the_switch(tmp_path: Path) -> None:
    model = adapted()
    with Recorder(tmp_path / "ck", model, frozen=False) as recorder:
        recorder.save(0)
        model.requires_grad_(True)
        with pytest.raises(
            InputError,
            match=r"'part.*' was frozen at the first step "
            r"recorded.*frozen=True",
        ):
            recorder.save(1)


def test_without_locks_recording_and_reading_work_and_a_replay_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    task = Task(Net, {"train": (INPUTS, TARGETS)}, {"train": Loss(F.cross_entropy)})
    with monkeypatch.context() as patch:
        patch.setattr(locks, "fcntl", None)
        with Recorder(tmp_path / "ck", model).attach(optimizer := sgd(model)):
            trained(model, optimizer, 2)
        with pytest.raises(ResourceError, match="runs need Linux"), hold(tmp_path):
            pass
    run = lca_posthoc.run(
        tmp_path / "ck", task, out=tmp_path / "run.lca", cluster="inline", device="cpu"
    )
    monkeypatch.setattr(locks, "fcntl", None)
    assert lca_posthoc.open_run(tmp_path / "run.lca")["train"].progress()["running"] is False
    assert len(run["train"].steps.step) == 2
