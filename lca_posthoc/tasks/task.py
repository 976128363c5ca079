"""Define the task a user supplies (a model, data and losses) and load it in every process."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict

import cloudpickle

from ..base.text import did_you_mean
from ..errors import InputError
from . import task_bundle

if TYPE_CHECKING:
    import torch


class Entry(TypedDict, total=False):
    """Describe where to find a task, as `pack_task` returns it.

    `kind` is "object", "file" (with `path`, `function`) or "module" (with `module`, `function`).
    """

    kind: Required[str]
    sha256: Required[str]
    path: str
    module: str
    function: str


@dataclass(frozen=True)
class Loss:
    """Define a named objective, over one split or of the parameters alone.

    Args:
        fn: called as `fn(model(inputs), targets)`; returns one value per element. If it takes
            `reduction`, it gets `reduction="none"`; a loss module is used with its reduction set to
            none. `ignore_index` and class weights of `cross_entropy` and `nll_loss` (functions,
            partials of them, modules) weight elements as in their own mean.
        on: name of the split.
        call: an alternative to `fn` for language models, masks and several inputs: called as
            `call(model, batch)`; returns values or `(values, weights)`. Values are per element, in
            any shape; weights have the same shape. A function or a call may return a dict of these:
            each entry is then a loss of its own; entry `boxes` of the loss `train` is named
            `train/boxes`.
        group_by: integer or string labels that divide the split; the loss of each group is
            allocated in the same pass over the data. Give one label per example, as a function of
            the unpacked batch (`group_by(inputs, targets)`) or as a tensor or list for the whole
            split; or one per element (kinds of tokens, classes of pixels), in a tensor or array of
            the shape of the loss's values.
        per: "example" also keeps the loss change of every example, and the contribution of every
            tensor to it; "element" does so for every element (target token, pixel, label).
        term: an alternative to `fn` for a regulariser: called as `term(model)`; returns a scalar
            that depends on the parameters alone.
        l2: an alternative to `fn`: the term ½ · l2 · Σθ² over all parameters, whose gradient is
            what `weight_decay=l2` adds.

    Raises:
        InputError: if an argument is invalid.
    """

    fn: Callable[..., Any] | None = None
    on: str = "train"
    call: Callable[..., Any] | None = None
    group_by: Any = None
    per: Literal["example", "element"] | None = None
    term: Callable[[Any], Any] | None = None
    l2: float | None = None

    def __post_init__(self) -> None:
        functions = [
            function
            for function in (self.fn, self.call, self.term, self.l2)
            if function is not None
        ]
        if len(functions) != 1:
            raise InputError(
                "Loss takes one of: a function, Loss(F.cross_entropy, on='train'); Loss(call=fn, "
                "on='train'); Loss(term=fn); Loss(l2=1e-4)."
            )
        if self.l2 is not None:
            if (
                isinstance(self.l2, bool)
                or not isinstance(self.l2, int | float)
                or not 0 < self.l2 < math.inf
            ):
                raise InputError(f"Loss(l2=…) must be a positive number, got {self.l2!r}.")
        else:
            _callable_as_stated(self.kind, functions[0])
        if self.split is None and self.group_by is not None:
            raise InputError(
                "a term of the parameters has no examples to group. Leave group_by out."
            )
        if self.per not in (None, "example", "element"):
            raise InputError(f"Loss(per=…) is 'example' or 'element', got {self.per!r}.")
        if self.per == "element" and self.group_by is not None:
            raise InputError(
                'Loss(per="element") takes no group_by. State two losses of the same function, one '
                "with per and one with group_by."
            )
        if self.split is None and self.per is not None:
            raise InputError(
                "a term of the parameters has no examples to keep apart. Leave per out."
            )
        if isinstance(self.group_by, type) and self.group_by not in (int, str):
            raise InputError(
                f"Loss(group_by={self.group_by.__name__}) is a class. Give labels, or a function "
                "of a batch that returns one for every example: group_by=lambda inputs, targets: "
                "targets."
            )
        if callable(self.group_by):
            _returns_at_once(f"Loss(group_by={_name_of(self.group_by)})", self.group_by)
        if isinstance(self.on, Mapping | list | tuple) or callable(self.on):
            raise InputError(
                f"Loss(on=…) is the name of a split, got {type(self.on).__name__}. The data itself "
                f"goes into Task(data={{'train': …}})."
            )

    @property
    def kind(self) -> str:
        """Return "function", "call", "term" or "l2", the form in which the loss is given."""
        return next(
            kind
            for kind, function in zip(_KINDS, (self.fn, self.call, self.term, self.l2), strict=True)
            if function is not None
        )

    @property
    def split(self) -> str | None:
        """Return the name of the split that the loss is over; None for a term of the parameters."""
        return self.on if self.fn is not None or self.call is not None else None

    @property
    def source(self) -> object:
        """Return the object that computes the values: losses with the same source have the same
        values on a batch.
        """
        return self.fn if self.fn is not None else self.call if self.call is not None else self

    @property
    def reduces(self) -> bool:
        """Return whether the function has a `reduction` of its own that the probe can compare with."""
        if _is_module(self.fn):
            return hasattr(self.fn, "reduction")
        return self.fn is not None and _takes_reduction(self.fn)

    @property
    def replaced(self) -> str | None:
        """Return the function's own reduction if it is neither a mean nor none; averages over
        elements replace it.
        """
        if not self.reduces:
            return None
        if _is_module(self.fn):
            reduction = getattr(self.fn, "reduction", None)
        else:
            assert self.fn is not None
            reduction = inspect.signature(self.fn).parameters["reduction"].default
        return (
            reduction if isinstance(reduction, str) and reduction not in ("mean", "none") else None
        )

    @property
    def is_of_torch(self) -> bool:
        """Return whether the function is one of torch's own, which return a tensor and nothing
        else.
        """
        return _is_of_outputs(self.fn)

    def on_device(self, device: torch.device, dtype: torch.dtype) -> Loss:
        """Return the loss with its tensors, such as class weights, converted for the computation.

        Args:
            device: device of the computation.
            dtype: type of floating tensors.
        """
        import torch

        if isinstance(self.fn, torch.nn.Module):
            moved = copy.deepcopy(self.fn)
            convert_module(moved, device, dtype)
            return replace(self, fn=moved)
        if isinstance(self.fn, functools.partial):
            keywords = {
                name: value.to(device, dtype if value.is_floating_point() else None)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in self.fn.keywords.items()
            }
            return replace(self, fn=functools.partial(self.fn.func, *self.fn.args, **keywords))
        return self

    def per_element(self) -> Callable[[Any, Any], Any]:
        """Return the function as `(outputs, targets) -> values`, without reduction."""
        return self._with_reduction("none")

    def mean(self) -> Callable[[Any, Any], Any]:
        """Return the function as `(outputs, targets) -> value`, with its own mean."""
        return self._with_reduction("mean")

    def _with_reduction(self, reduction: str) -> Callable[[Any, Any], Any]:
        assert self.fn is not None
        if _is_module(self.fn):
            module = copy.copy(self.fn)
            if self.reduces:
                setattr(module, "reduction", reduction)  # noqa: B010 - a plain attribute, which nn.Module's types do not know
            return module
        return functools.partial(self.fn, reduction=reduction) if self.reduces else self.fn

    def element_weights(self, targets: object) -> torch.Tensor | None:
        """Return the weight of each target in torch's mean of `cross_entropy` and `nll_loss`; None
        for other losses.

        The unreduced values of these two already include the class weight, and are 0 for ignored
        targets. Weights are float64 and have the targets' shape. Return None also if targets are
        not class indices.
        """
        import torch

        if isinstance(self.fn, torch.nn.CrossEntropyLoss | torch.nn.NLLLoss):
            weight, ignored = self.fn.weight, self.fn.ignore_index
        else:
            keywords = self.fn.keywords if isinstance(self.fn, functools.partial) else {}
            plain = (
                self.fn.func
                if isinstance(self.fn, functools.partial) and not self.fn.args
                else self.fn
            )
            if plain not in (torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss):
                return None
            weight, ignored = keywords.get("weight"), keywords.get("ignore_index", -100)
        if not isinstance(targets, torch.Tensor) or targets.is_floating_point():
            return None
        counted = targets != ignored
        if weight is None:
            return counted.double()
        return torch.where(counted, weight.double()[torch.where(counted, targets, 0)], 0.0)


def convert_module(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Convert a module in place.

    `Module.to` would make complex tensors real; they become the complex type of the same precision.

    Args:
        module: the module.
        device: target device.
        dtype: type of floating tensors.
    """
    imaginary = {
        name: tensor.data for name, tensor in every_name(module).items() if tensor.is_complex()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Casting complex values to real")
        module.to(device=device, dtype=dtype)
    for name, tensor in every_name(module).items():
        if name in imaginary:
            tensor.data = imaginary[name].to(device, dtype.to_complex())


def every_name(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers under every name they have."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


_KINDS = ("function", "call", "term", "l2")
_STATED = {
    "function": ("Loss({})", "fn(outputs, targets)", 2),
    "call": ("Loss(call={})", "fn(model, batch)", 2),
    "term": ("Loss(term={})", "fn(model)", 1),
}


def _callable_as_stated(kind: str, function: object) -> None:
    """Check that an object can compute the values of a loss, and is not a class, a result, a metric
    or a function of other arguments.

    Raises:
        InputError: if it cannot; the message says what it is.
    """
    import torch

    form, called, count = _STATED[kind]
    name = _name_of(function)
    stated = form.format(name)
    if isinstance(function, str):
        raise InputError(
            f"Loss needs something to call, got str {function!r}. Give the function itself: "
            f"Loss(F.cross_entropy), {called}."
        )
    if isinstance(function, torch.Tensor):
        raise InputError(
            f"{form.format('…')} was given a tensor of shape {list(function.shape)}, the result of "
            f"a loss. Give the function itself, which is called as {called}: "
            "Loss(F.cross_entropy), not Loss(F.cross_entropy(outputs, targets))."
        )
    if isinstance(function, type) and not _is_used_as_function(function):
        if issubclass(function, torch.autograd.Function):
            raise InputError(
                f"{stated} is the class of an autograd function. Give its function: "
                f"{form.format(f'{name}.apply')}."
            )
        raise InputError(
            f"{stated} is a class. Give an instance of it: {form.format(f'{name}()')}."
        )
    if not callable(function):
        raise InputError(
            f"Loss needs something to call, got {type(function).__name__}. {form.format('…')} is "
            f"called as {called}."
        )
    if all(callable(getattr(function, method, None)) for method in ("update", "compute", "reset")):
        raise InputError(
            f"{form.format('…')} was given a metric, {type(function).__name__}, which accumulates "
            "over batches. Give the function that training minimises, which returns one value for "
            "every element."
        )
    _returns_at_once(stated, function)
    if kind == "call" and _is_of_outputs(function):
        raise InputError(
            f"{stated} is a function of outputs and targets, but is called as {called}. Write "
            f"Loss({name})."
        )
    problem = _does_not_take(function, count, {"reduction"} if kind == "function" else set())
    if problem is not None:
        raise InputError(f"{stated} is called as {called}, but {problem}.")


def _is_used_as_function(kind: type) -> bool:
    """Return whether calling a class works like calling a function: its own `__new__` may return
    anything.
    """
    import torch

    own = isinstance(kind.__new__, FunctionType)
    return own and not issubclass(kind, torch.nn.Module | torch.autograd.Function)


def _is_of_outputs(function: object) -> bool:
    import torch

    inner = function.func if isinstance(function, functools.partial) else function
    if isinstance(inner, torch.nn.Module):
        return type(inner).__module__ == "torch.nn.modules.loss"
    return getattr(inner, "__module__", None) == "torch.nn.functional"


def _returns_at_once(stated: str, thing: object) -> None:
    """Check that a function does not return a coroutine or a generator.

    Raises:
        InputError: if it does.
    """
    inner = thing.func if isinstance(thing, functools.partial) else thing
    for function in (
        inner,
        getattr(inner, "forward", inner) if _is_module(inner) else type(inner).__call__,
    ):
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise InputError(
                f"{stated} is an async function, which returns a coroutine. Give a plain function "
                "(def)."
            )
        if inspect.isgeneratorfunction(function):
            raise InputError(
                f"{stated} is a generator function (it contains yield). Give one that returns its "
                "result."
            )


def _does_not_take(function: Callable[..., object], count: int, named: set[str]) -> str | None:
    """Return a clause on what a callable takes if it cannot be called with `count` positional
    arguments and those of `named` that it has.

    Return None if it can be called so, or has no signature.
    """
    import torch

    called = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        signature = inspect.signature(called, follow_wrapped=False)
    except (TypeError, ValueError):  # builtins without a signature
        return None
    try:
        signature.bind(*[None] * count, **dict.fromkeys(named & signature.parameters.keys()))
    except TypeError:
        return f"{_name_of(function)} takes ({', '.join(signature.parameters)})"
    return None


def _name_of(thing: object) -> str:
    inner = thing.func if isinstance(thing, functools.partial) else thing
    return str(getattr(inner, "__name__", type(inner).__name__))


def _is_module(thing: object) -> bool:
    import torch  # here, so that a driver with nothing to do need not load it

    return isinstance(thing, torch.nn.Module)


def _takes_reduction(fn: Callable[..., Any]) -> bool:
    try:
        return "reduction" in inspect.signature(fn).parameters
    except (TypeError, ValueError):  # builtins without a signature
        return False


@dataclass(frozen=True)
class Task:
    """Define everything needed to evaluate losses of one model on one data set.

    Args:
        model: a zero-argument factory of an `nn.Module` of the shape that was trained.
        data: split name → `(inputs, targets)` tensors, a dict of tensors, any map-style Dataset, a
            `DataLoader` (only its data set and `collate_fn` are used; the replay chooses order and
            batches), a Hugging Face `datasets` table, or iterable data that yields the same
            examples every time.
        losses: loss name → `Loss`; `lca run` uses the first by default.
        fixed: patterns (`*`, `?`) of tensors that never move, such as the base of an adapter or a
            mask with infinite entries: they stay as `model` builds them. Checkpoints need not hold
            them; if they do, the first and the last checkpoint must agree. A pattern may also match
            tensors that only the checkpoints hold and that never move; they are left out.
        show: split name → a function of the unpacked batch that returns one text for every example
            (a label, the start of a sentence), which reports show for losses that keep examples
            apart.

    Raises:
        InputError: if an argument is invalid.
    """

    model: Callable[[], Any]
    data: Mapping[str, object]
    losses: Mapping[str, Loss]
    fixed: Sequence[str] = ()
    show: Mapping[str, Callable[..., Sequence[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if _is_module(self.model) or not callable(self.model):
            raise InputError(
                "Task.model must be a zero-argument factory of a module, got "
                f"{type(self.model).__name__}. Pass the class or a lambda: model=Net, or "
                "model=lambda: Net(hidden=100)."
            )
        _builds_a_model(self.model)
        if not isinstance(self.data, Mapping) or not self.data:
            raise InputError(
                "Task.data must name at least one split: data={'train': (inputs, targets)}."
            )
        for name, split in self.data.items():
            _is_data(name, split)
        if not isinstance(self.losses, Mapping) or not self.losses:
            raise InputError(
                "Task.losses must name at least one loss: losses={'train': Loss(F.cross_entropy, "
                "on='train')}."
            )
        if isinstance(self.fixed, str):
            raise InputError(f"Task.fixed is a list of patterns: fixed=[{self.fixed!r}].")
        if not isinstance(self.show, Mapping):
            raise InputError(
                "Task.show maps a split to a function of a batch: show={'train': label}; got "
                f"{type(self.show).__name__}."
            )
        for name, shown in self.show.items():
            if name not in self.data or not callable(shown):
                raise InputError(
                    f"Task.show maps a split to a function of a batch that returns a text for "
                    f"every example; got {name!r}: {type(shown).__name__}. The task's data has "
                    f"{_names(self.data)}."
                )
        for name, loss in self.losses.items():
            if not isinstance(loss, Loss):
                raise InputError(
                    f"Task.losses[{name!r}] must be a Loss, got {type(loss).__name__}. Write "
                    "Loss(fn, on='train')."
                )
            if loss.split is not None and loss.split not in self.data:
                raise InputError(
                    f"loss {name!r} is on split {loss.on!r}, but the task's data has "
                    f"{_names(self.data)}."
                )

    def choose(self, names: list[str] | None) -> list[str]:
        """Return the names of the losses to run: the first by default, all for `["all"]`.

        Raises:
            InputError: if the task lacks a named loss.
        """
        if not names:
            return [next(iter(self.losses))]
        if names == ["all"]:
            return list(self.losses)
        for name in names:
            if self.stated(name) is None:
                raise InputError(
                    f"there is no loss {name!r} in the task; it has {_names(self.losses)}."
                    f"{did_you_mean(name, self.losses)} Use --loss NAME or --loss all."
                )
        return list(dict.fromkeys(names))

    def stated(self, name: str) -> tuple[str, str | None] | None:
        """Split the name of a result into the name of its loss and, if any, the entry of the loss's
        dict.

        Return None if there is no such loss. `train/boxes` is the entry `boxes` of `train`, unless
        a loss has that very name.
        """
        if name in self.losses:
            return name, None
        for stated, loss in sorted(self.losses.items(), key=lambda item: -len(item[0])):
            if loss.split is not None and name.startswith(f"{stated}/"):
                return stated, name.removeprefix(f"{stated}/")
        return None


def _builds_a_model(factory: Callable[..., object]) -> None:
    """Check that a factory can return a module when called without arguments.

    Raises:
        InputError: if it cannot.
    """
    import torch

    name = _name_of(factory)
    if (
        isinstance(factory, type)
        and not issubclass(factory, torch.nn.Module)
        and not _is_used_as_function(factory)
    ):
        raise InputError(
            f"Task(model={name}) is a class that is not an nn.Module. Give the class of the model, "
            "or a function that builds it."
        )
    _returns_at_once(f"Task(model={name})", factory)
    problem = (
        None
        if isinstance(factory, type) and type(factory) is not type
        else _does_not_take(factory, 0, set())
    )
    if problem is not None:
        raise InputError(
            f"Task(model={name}) is called without arguments, but {problem}. Write model=lambda: "
            f"{name}(…) with the arguments of the model that was trained."
        )


def _is_data(name: str, split: object) -> None:
    """Check that a split is not a class or a function.

    Raises:
        InputError: if it is.
    """
    what, gives = ("class", "builds") if isinstance(split, type) else ("function", "returns")
    if isinstance(split, type) or inspect.isroutine(split):
        raise InputError(
            f"Task.data[{str(name)!r}] is the {what} {split.__name__}, not data. Give what it "
            f"{gives}: {split.__name__}(…)."
        )


def parse_subsets(options: list[str]) -> dict[str, str]:
    """Parse the arguments of `--subset` into a dict: split → choice of its examples; `""` stands
    for every split.

    >>> parse_subsets(["0.1@7", "train=0:100"])
    {'': '0.1@7', 'train': '0:100'}

    Raises:
        InputError: if a split has two choices, or a choice is ambiguous.
    """
    subsets: dict[str, str] = {}
    for option in options:
        split, _, what = option.rpartition("=")
        if split in subsets:
            raise InputError(
                f"--subset is given twice for {f'split {split!r}' if split else 'all splits'}."
            )
        if re.fullmatch(r"\d+", what):
            number, prefix = int(what), f"{split}=" if split else ""
            raise InputError(
                f"--subset {option!r} could mean one example or a number of them. Write "
                f"{prefix}{number}:{number + 1} for the example at position {number}, "
                f"{prefix}:{number} for the first {number}, or {prefix}0.1@7 for a tenth drawn at "
                "random with seed 7."
            )
        subsets[split] = what
    return subsets


def _names(table: Mapping[str, object]) -> str:
    return ", ".join(repr(str(name)) for name in table) or "none"


def pack_task(task: str | Path | Task) -> tuple[Entry, bytes]:
    """Pack a task so that another process can load it.

    Args:
        task: `FILE`, `FILE:FUNCTION`, `pkg.module:FUNCTION`, or a Task object.

    Returns:
        An entry that can be stored as JSON and holds the hash of the bytes (for a module, which
        must be installed everywhere, of its own file), and the bytes: the source, or the task
        itself.

    Raises:
        InputError: if a file cannot be read, or a Task object holds something that cannot be
            pickled.
    """
    if isinstance(task, Task):
        try:
            data = cloudpickle.dumps(task)
        except Exception as error:
            raise InputError(_cannot_travel(task, error)) from error
        return {"kind": "object", "sha256": hashlib.sha256(data).hexdigest()}, data
    text = str(task)
    place, colon, function = text.rpartition(":")
    if not colon or "/" in function or function.endswith(".py"):
        place, function = text, "task"
    path = Path(place)
    if path.suffix == ".py" or path.exists():
        if not path.is_file():
            raise InputError(
                f"task file {path} does not exist. Give --task FILE, FILE:FUNCTION or "
                "pkg.module:FUNCTION."
            )
        try:
            data = task_bundle.pack_files(path.resolve())
        except OSError as error:
            raise InputError(
                f"task file {error.filename} cannot be read: {error.strerror}. Check its "
                "permissions."
            ) from None
        sha256 = hashlib.sha256(data).hexdigest()
        return {
            "kind": "file",
            "path": str(path.resolve()),
            "function": function,
            "sha256": sha256,
        }, data
    return {
        "kind": "module",
        "module": place,
        "function": function,
        "sha256": _module_sha256(place),
    }, b""


def _cannot_travel(task: Task, error: Exception) -> str:
    """Return the error message that names the part of a Task object that cannot be pickled."""
    inside = {
        "the model": task.model,
        **{f"split {name!r}": split for name, split in task.data.items()},
        **{f"loss {name!r}": loss for name, loss in task.losses.items()},
        **{f"show of split {name!r}": shown for name, shown in task.show.items()},
    }
    what: object = task
    place, attribute, problem = "it", "", error
    for name, part in inside.items():
        if (why := _unpicklable(part)) is not None:
            place, (what, attribute, problem) = name, _culprit(part, why)
            break
    inner = (
        ""
        if not attribute
        else f", at {attribute.removeprefix('.')} of its {type(inside[place]).__name__}"
    )
    return (
        f"the Task given cannot be sent to the processes that compute: {place} holds a "
        f"{type(what).__module__}.{type(what).__qualname__}{inner} ({type(problem).__name__}: "
        f"{problem}). Open connections, files, locks and generators only when an example is first "
        "read (in __getitem__); or put the task into a task file, which every process runs for "
        "itself."
    )


def _unpicklable(thing: object) -> Exception | None:
    try:
        cloudpickle.dumps(thing)
    except Exception as error:
        return error
    return None


def _culprit(thing: object, error: Exception) -> tuple[object, str, Exception]:
    """Return the innermost part that cannot be pickled, the path to it, and the error."""
    place, entered = "", {id(thing)}
    while True:
        for name, part in _inside(thing):
            if id(part) not in entered and (why := _unpicklable(part)) is not None:
                thing, place, error = part, place + name, why
                entered.add(id(part))
                break
        else:
            return thing, place, error


def _inside(thing: object) -> list[tuple[str, object]]:
    """Return the parts of an object that may be the one that cannot be pickled, each with its
    access path.
    """
    if isinstance(thing, Mapping):
        return [(f"[{key!r}]", part) for key, part in thing.items()]
    if isinstance(thing, tuple | list):
        return [(f"[{index}]", part) for index, part in enumerate(thing)]
    if isinstance(thing, functools.partial):
        return [(".func", thing.func), (".args", thing.args), (".keywords", thing.keywords)]
    if inspect.ismethod(thing):
        return [(".__self__", thing.__self__)]
    if inspect.isfunction(thing):
        variables = inspect.getclosurevars(thing)
        return [
            (f".{name}", part)
            for name, part in {**variables.nonlocals, **variables.globals}.items()
        ]
    return [(f".{name}", part) for name, part in getattr(thing, "__dict__", {}).items()]


def digest(entry: Entry) -> str:
    """Return a hash of the task's function name and source, including the modules it imports from
    its folder.
    """
    return hashlib.sha256(f"{entry['sha256']}:{entry.get('function')}".encode()).hexdigest()


def _module_sha256(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return ""
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def load(entry: Entry, data: bytes) -> Task:
    """Build the task that `pack_task` packed.

    Args:
        entry: the entry from `pack_task`.
        data: the bytes from `pack_task`.

    Raises:
        InputError: if it cannot be imported, is a different module here, has no such function,
            raises, or returns something else.
    """
    if entry["kind"] == "object":
        place = "the Task given"
        try:
            task = cloudpickle.loads(data)
        except Exception as error:
            raise InputError(
                f"cannot build the Task given in a worker: {type(error).__name__}: {error}. Put it "
                "into a task file, which is sent with what it imports from its folder, or install "
                "its imports on the worker."
            ) from error
    else:
        place = f"{entry.get('path') or entry['module']}:{entry['function']}"
        function = getattr(_module(entry, data), entry["function"], None)
        if not callable(function):
            raise InputError(
                f"{place}: there is no such function. A task file defines `def task() -> Task:`."
            )
        try:
            task = function()
        except InputError:
            raise
        except (Exception, SystemExit) as error:
            raise InputError(
                f"{place}() raised {type(error).__name__}: {error}. {_where(error)}"
            ) from error
    if not isinstance(task, Task):
        raise InputError(
            f"{place}() returned {type(task).__name__}, not a Task. End it with `return "
            "Task(model=…, data=…, losses=…)`."
        )
    return task


def loaded(task: str | Path | Task) -> Task:
    """Build a task in this process, and let its code import its own modules later; raise as
    `pack_task` and `load` do.
    """
    entry, data = pack_task(task)
    use(entry, data)
    return load(entry, data)


def use(entry: Entry, data: bytes) -> None:
    """Let the code of a task import the modules packed with it, now and while it runs.

    Args:
        entry: the entry from `pack_task`.
        data: the bytes from `pack_task`.
    """
    if entry["kind"] == "file":
        task_bundle.use(_opened(entry["path"], data))


@functools.lru_cache(maxsize=4)
def _opened(path: str, data: bytes) -> task_bundle.Parcel:
    return task_bundle.Parcel(data, Path(path))


def _module(entry: Entry, data: bytes) -> ModuleType:
    place = entry.get("path") or entry["module"]
    try:
        if entry["kind"] == "file":
            return _opened(entry["path"], data).main()
        if entry["sha256"] and _module_sha256(entry["module"]) not in ("", entry["sha256"]):
            raise InputError(
                f"module {place} in this worker's environment differs from the one where the run "
                "was started. Install the same version everywhere."
            )
        return importlib.import_module(entry["module"])
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(
            f"cannot import task {place}: {type(error).__name__}: {error}. {_where(error)}"
        ) from error


def _where(error: BaseException) -> str:
    """Return the last place in the user's own code that an error passed through; "" if there is
    none.
    """
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "lca_posthoc" not in Path(file).parts and not file.startswith("<frozen"):
            place = f"(at {file}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place
