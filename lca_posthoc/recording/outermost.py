"""Follow optimisers through what wraps them: a step is over when the outermost call that made it
returns.

Lookahead moves the weights once more after its inner optimiser's step, others average them between
processes, and SAM steps in a method of its own. Wrappers that do not call `Optimizer.__init__` run
none of torch's hooks; their methods are replaced on the instance, as torch's schedulers do with
`step`, for as long as a recorder is attached.
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
_DEPTH = 3  # of wrappers within wrappers that are looked into


def runs_hooks(optimizer: object) -> bool:
    """Tell whether `step` of an object runs torch's hooks, and the object has a place for them."""
    hooks = [getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post")]
    is_hooked = getattr(getattr(type(optimizer), "step", None), "hooked", False)
    return is_hooked and all(isinstance(hook, OrderedDict) for hook in hooks)


def is_optimizer(thing: object) -> bool:
    """Tell whether a training loop can use an object as an optimiser."""
    methods = [getattr(thing, name, None) for name in ("step", "zero_grad")]
    return (
        all(map(callable, methods))
        and hasattr(thing, "param_groups")
        and not isinstance(thing, nn.Module | type)
    )


def can_follow(thing: object) -> bool:
    """Tell whether the steps of an object can be seen: by torch's hooks, or because its methods can
    be replaced.
    """
    replaceable = hasattr(thing, "__dict__") and hasattr(type(thing), "__weakref__")
    return is_optimizer(thing) and (runs_hooks(thing) or replaceable)


@dataclass(frozen=True)
class Told:
    """Functions to call when an attached optimiser begins a step, as torch's hooks are called, when
    it has made one, when the end of the step will not be seen, and when it is over.
    """

    begins: Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Call | None]
    stepped: Callable[[], None]
    unseen: Callable[[], None]
    over: Callable[[], None]


class Outermost:
    """Report every step of the attached optimisers, and when it is over.

    A wrapper around an attached optimiser is noticed in its first step. The end of that one is not
    seen: the step counts as over at the next call of any method of the wrapper, at the latest at
    the next step. From then on the end is seen.

    Args:
        listener: the functions to call; the optimisers keep them alive.
        takeover: counts the steps of optimisers that are not attached.
        attached: the optimisers, all of which `can_follow`.
    """

    def __init__(self, listener: Told, takeover: Takeover, attached: tuple[Optimizer, ...]) -> None:
        self._listener, self._takeover = listener, takeover
        self._attached = [weakref.ref(optimizer) for optimizer in attached]
        self._watched: list[weakref.ref[object]] = []
        self._replaced: list[tuple[weakref.ref[object], str, object, object]] = []
        self._plain: dict[int, types.CodeType] = {}  # by id: code of methods that are no wrapper's
        # in progress: of watched methods, and of those of attached ones
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
        """Remove every hook, and put every replaced method back."""
        self._watched = []
        for handle in self._handles:
            handle.remove()
        for reference, name, method, before in self._replaced:
            owner = reference()
            # a scheduler that has replaced it since goes on calling it, and it does nothing more
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
            return  # of a class whose `step` calls that of its base: torch runs the hooks of both
        self._takeover.finish()
        self._counted = True
        self._listener.stepped()
        if not self._calls:
            self._finish([owner for owner, _ in callers])

    def _finish(self, wrappers: Collection[object]) -> None:
        """Report that a step is over, unless calls of unknown wrappers are in progress: watch these
        from here on.
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
        """Replace the methods of a wrapper; with `counts_all` every call of its `step` counts, for
        nothing else shows its steps.
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
            # a copy of it, or nothing is attached any more
            if this is not wrapper() or not self._is_watched(this):
                return call(*arguments, **options)
            with self._in_progress(this, counts_all):
                return call(*arguments, **options)

        with contextlib.suppress(TypeError, ValueError):  # a builtin without a signature
            # of a bound method, without its first argument, which binding takes off once more
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
        ) is None:  # else inside a call whose end is not seen
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
        """Yield the optimisers whose methods called this, the innermost first, with their code."""
        frame = sys._getframe(1)
        while frame.f_back is not None:
            frame = frame.f_back
            owner = self._optimizer_of(frame)
            if owner is not None:
                yield owner, frame.f_code

    def _optimizer_of(self, frame: types.FrameType) -> object | None:
        """Return the optimiser whose method a frame runs, None for other code, which is looked at
        only once.
        """
        code = frame.f_code
        if not code.co_argcount or code.co_varnames[0] != "self" or id(code) in self._plain:
            return None
        variables = frame.f_locals
        owner: object = variables.get("self")
        if sys.version_info < (3, 13):
            variables.clear()  # a copy of the frame's variables, which would keep its tensors alive
        if is_optimizer(owner):
            return owner
        self._plain[id(code)] = code
        return None


def _code_of_step(optimizer: Optimizer) -> types.CodeType | None:
    """Return the code that torch runs hooks around."""
    return getattr(inspect.unwrap(type(optimizer).step), "__code__", None)


def _own_method(owner: Any, name: str) -> Callable[..., Any]:
    """Return a method of an object's class, or the one its `__getattr__` takes from what it
    wraps.
    """
    function = getattr(type(owner), name, None)
    bound: Callable[..., Any] = (
        type(owner).__getattr__(owner, name) if function is None else function.__get__(owner)
    )
    return bound


def _methods_of(wrapper: object) -> list[str]:
    """Return the names of the public methods that a wrapper's own classes have, `step` and
    `zero_grad` always.
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
    """Yield the optimisers that an object has as attributes, or in a list or table among these, and
    those in them.
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
