"""Follow optimisers through their wrappers: a step ends when the outermost call that made it
returns.

Lookahead moves the weights again after its inner optimiser's step, others average them between
processes, and SAM steps in a method of its own. Wrappers that do not call `Optimizer.__init__` run
none of torch's hooks. Their methods are replaced on the instance while a recorder is attached, as
torch's schedulers do with `step`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .optimizer_guard import Takeover

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments that `step` is called with
_DEPTH = 3  # levels of nested wrappers that are searched


def runs_hooks(optimizer: object) -> bool:
    """Return whether `step` of an object runs torch's hooks, and hooks can be registered on it."""
    hooks = [getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post")]
    is_hooked = getattr(getattr(type(optimizer), "step", None), "hooked", False)
    return is_hooked and all(isinstance(hook, OrderedDict) for hook in hooks)


def is_optimizer(thing: object) -> bool:
    """Return whether a training loop can use an object as an optimiser."""
    methods = [getattr(thing, name, None) for name in ("step", "zero_grad")]
    return (
        all(map(callable, methods))
        and hasattr(thing, "param_groups")
        and not isinstance(thing, nn.Module | type)
    )


def can_follow(thing: object) -> bool:
    """Return whether the steps of an object can be detected, by torch's hooks or by replacing its
    methods.
    """
    replaceable = hasattr(thing, "__dict__") and hasattr(type(thing), "__weakref__")
    return is_optimizer(thing) and (runs_hooks(thing) or replaceable)


@dataclass(frozen=True)
class Told:
    """Hold the functions to call about a step of an attached optimiser.

    Attributes:
        begins: called when it begins, with the arguments of torch's hooks.
        stepped: called when the optimiser has stepped.
        unseen: called if the end of the step will not be detected.
        over: called when the step is over.
    """

    begins: Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Call | None]
    stepped: Callable[[], None]
    unseen: Callable[[], None]
    over: Callable[[], None]


class Outermost:
    """Report every step of the attached optimisers, and when it is over.

    A wrapper around an attached optimiser is first noticed during a step. The end of that step goes
    undetected: the step counts as over at the next call of any method of the wrapper, at the latest
    at the next step. Later steps end visibly.

    Args:
        listener: functions to call; the optimisers keep them alive.
        takeover: counts the steps of optimisers that are not attached.
        attached: the optimisers, each of which `can_follow` accepts.
    """

    def __init__(self, listener: Told, takeover: Takeover, attached: tuple[Optimizer, ...]) -> None:
        self._listener, self._takeover = listener, takeover
        self._attached = [weakref.ref(optimizer) for optimizer in attached]
        self._watched: list[weakref.ref[object]] = []
        self._replaced: list[tuple[weakref.ref[object], str, object, object]] = []
        self._plain: dict[int, types.CodeType] = {}  # id → code of methods of other objects
        # depth of the calls in progress: of watched methods, and of attached optimisers' methods
        self._calls = self._own_calls = 0
        self._counted = False
        self._handles = []
        for optimizer in attached:
            inner = list(optimizers_in(optimizer))
            if runs_hooks(optimizer):
                self._handles.append(optimizer.register_step_pre_hook(self._before_step))
                self._handles.append(optimizer.register_step_post_hook(self._after_step))
                counts_all = False
            else:
                counts_all = not any(map(runs_hooks, inner))
            if inner or not runs_hooks(optimizer):
                self._watch(optimizer, counts_all)

    def end(self) -> None:
        """Remove every hook and restore every replaced method."""
        self._watched = []
        for handle in self._handles:
            handle.remove()
        for reference, name, method, before in self._replaced:
            owner = reference()
            # a scheduler may have replaced it since; it still calls ours, which only passes on
            if owner is not None and vars(owner).get(name) is method:
                vars(owner).pop(name)
                if before is not None:
                    vars(owner)[name] = before

    def _before_step(
        self, optimizer: Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Call | None:
        self._listener.over()
        self._takeover.begin()
        return self._listener.begins(optimizer, arguments, options)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        callers = list(self._callers())
        if any(owner is optimizer and code is _code_of_step(optimizer) for owner, code in callers):
            return  # this `step` is called by a subclass's `step`: torch runs the hooks of both
        self._takeover.finish()
        self._counted = True
        self._listener.stepped()
        if not self._calls:
            self._finish([owner for owner, _ in callers])

    def _finish(self, wrappers: Collection[object]) -> None:
        """Report that a step is over, unless calls of unknown wrappers are in progress; then start
        to watch these.
        """
        if not wrappers:
            self._listener.over()
            return
        self._listener.unseen()
        for wrapper in wrappers:
            if can_follow(wrapper) and not self._is_watched(wrapper):
                self._watch(wrapper, counts_all=False)

    # --- the methods of wrappers ------------------------------------------------------------------

    def _watch(self, wrapper: object, counts_all: bool) -> None:
        """Replace the methods of a wrapper.

        With `counts_all`, every call of its `step` counts as a step, because nothing else reveals
        its steps.
        """
        reference = weakref.ref(wrapper)
        self._watched.append(reference)
        for name in _methods_of(wrapper):
            before = vars(wrapper).get(name)
            method = types.MethodType(
                self._stand_in(reference, name, before, counts_all and name == "step"), wrapper
            )
            object.__setattr__(wrapper, name, method)
            self._replaced.append((reference, name, method, before))

    def _stand_in(
        self,
        wrapper: weakref.ref[object],
        name: str,
        before: Callable[..., Any] | None,
        counts_all: bool,
    ) -> Callable[..., Any]:
        """Return a function that calls a method and reports the end of the call."""

        shown = before or _own_method(wrapper(), name)

        @functools.wraps(shown)
        def method(this: object, *arguments: object, **options: object) -> Any:
            call = before or _own_method(this, name)
            # a copy of the wrapper, or nothing is attached any more
            if this is not wrapper() or not self._is_watched(this):
                return call(*arguments, **options)
            with self._in_progress(this, counts_all):
                return call(*arguments, **options)

        with contextlib.suppress(TypeError, ValueError):  # a builtin without a signature
            # `shown` is bound, so its signature lacks `self`; add one for binding to remove again
            signature = inspect.signature(shown)
            first = inspect.Parameter("this", inspect.Parameter.POSITIONAL_ONLY)
            parameters = [first, *signature.parameters.values()]
            method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return method

    @contextlib.contextmanager
    def _in_progress(self, wrapper: object, counts_all: bool) -> Iterator[None]:
        is_attached = any(reference() is wrapper for reference in self._attached)
        begins = is_attached and not self._own_calls
        if (begins or not self._calls) and next(
            self._callers(), None
        ) is None:  # otherwise inside a call whose end goes undetected
            self._listener.over()
        inner_before = self._takeover.inner_steps
        if begins:
            self._counted = False
            self._takeover.begin()
        self._calls += 1
        self._own_calls += is_attached
        try:
            yield
        finally:
            self._calls -= 1
            self._own_calls -= is_attached
            if begins:
                self._takeover.finish()
        has_inner_steps = self._takeover.inner_steps > inner_before
        if begins and not self._counted and (counts_all or has_inner_steps):
            self._listener.stepped()
        if not self._calls:
            self._finish([owner for owner, _ in self._callers()])

    def _is_watched(self, thing: object) -> bool:
        return any(reference() is thing for reference in self._watched)

    def _callers(self) -> Iterator[tuple[object, types.CodeType]]:
        """Yield the optimisers whose methods are on the call stack, the innermost first, with their
        code.
        """
        frame = sys._getframe(1)
        while frame.f_back is not None:
            frame = frame.f_back
            owner = self._optimizer_of(frame)
            if owner is not None:
                yield owner, frame.f_code

    def _optimizer_of(self, frame: types.FrameType) -> object | None:
        """Return the optimiser whose method a frame runs, or None for other code, which is examined
        only once.
        """
        code = frame.f_code
        if not code.co_argcount or code.co_varnames[0] != "self" or id(code) in self._plain:
            return None
        variables = frame.f_locals
        owner: object = variables.get("self")
        if sys.version_info < (3, 13):
            variables.clear()  # this copy of the frame's variables would keep tensors alive
        if is_optimizer(owner):
            return owner
        self._plain[id(code)] = code
        return None


def _code_of_step(optimizer: Optimizer) -> types.CodeType | None:
    """Return the code of `step` without torch's hooks."""
    return getattr(inspect.unwrap(type(optimizer).step), "__code__", None)


def _own_method(owner: Any, name: str) -> Callable[..., Any]:
    """Return a method of an object's class, or the one that `__getattr__` forwards to the wrapped
    object.
    """
    function = getattr(type(owner), name, None)
    bound: Callable[..., Any] = (
        type(owner).__getattr__(owner, name) if function is None else function.__get__(owner)
    )
    return bound


def _methods_of(wrapper: object) -> list[str]:
    """Return the names of the public methods defined by a wrapper's own classes, always with `step`
    and `zero_grad`.
    """
    names = {"step": None, "zero_grad": None}
    for kind in type(wrapper).__mro__:
        if kind is not object and not kind.__module__.startswith("torch."):
            names |= {
                name: None
                for name, value in vars(kind).items()
                if isinstance(value, types.FunctionType)
            }
    effective = {
        name: inspect.getattr_static(type(wrapper), name, None)
        for name in names
        if not name.startswith("_")
    }
    return [
        name
        for name, value in effective.items()
        if value is None or isinstance(value, types.FunctionType)
    ]


def optimizers_in(wrapper: object, depth: int = _DEPTH) -> Iterator[object]:
    """Yield the optimisers in an object's attributes, also inside lists and dictionaries,
    recursively.

    Args:
        wrapper: the object.
        depth: levels of nested wrappers to search.
    """
    for value in list(vars(wrapper).values()) if depth and hasattr(wrapper, "__dict__") else ():
        parts = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, list | tuple)
            else [value]
        )
        for part in parts:
            if part is not wrapper and is_optimizer(part):
                yield part
                yield from optimizers_in(part, depth - 1)
