"""Compute directional derivatives of every example's loss, tensor by tensor, in one backward pass.

If a parameter meets data in an operation y = f(a, W), the derivative of example x's loss along a
direction ΔW is the sum of δ · ∂f/∂W ΔW over the entries of y that belong to x, with δ the gradient
of the output. `Taps` detaches parameters there, so that their gradients are not computed, and
registers a hook on y that computes these sums. Tensors computed from parameters only (transposes,
normalised weights, B · A of adapters) carry a direction for each parameter to where they meet data.
Operations without a rule get the parameter itself: autograd then computes its gradient, and its
shares are reported as untold. So are those of every tensor if the loss takes forward-mode
derivatives, which taps cannot see.

Sites store what they need of the forward pass themselves: activation checkpointing gives the same
shares, but saves no memory. This module does not know whether an axis is that of the examples, or
whether the loss mixes them: `tap_check.check` compares with single examples.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..schema import uses_of
from .containers import tensors_of
from .directions import Motion
from .example_axis import FIRST, Axes, ExampleAxis
from .tangents import (
    ADDITIONS,
    LIKE_ANOTHER,
    NAMES,
    RESHAPING,
    Call,
    Function,
    Place,
    Rule,
    rule_of,
)
from .tap_products import Products
from .tap_sites import Derived, Made, Operands, Parameter, Recorder, Site, Untold, Versions

_DERIVATIVES: frozenset[Function] = frozenset(
    (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
)
# Python functions of these modules would hide the calls they make from a mode
_PYTHON_FUNCTIONS: tuple[Any, ...] = (torch.nn.functional, torch.functional, torch._tensor)
_PLAIN: tuple[type, ...] = (Tensor, torch.nn.Parameter)
# functions that describe a tensor or set a mode, and return no tensor
_TELLING: frozenset[Function] = frozenset(
    (
        *(Tensor.dim, Tensor.size, Tensor.stride, Tensor.numel, Tensor.__len__, Tensor.data_ptr),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.is_inference),
        *(torch.is_floating_point, torch.is_complex, torch.is_inference, torch.numel),
        torch._C._set_grad_enabled,
    )
)
KEPT = 2**24  # bytes; directions of models up to this size are computed once for all batches


class _Anchor(torch.autograd.Function):
    """Make a new tensor require a gradient in place, so that it can have a hook."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *above: Any) -> tuple[None, None]:
        return None, None


class _Batch:
    """Process the calls of a forward pass over one batch.

    Args:
        tensors: the parameters.
        data: the batch.
        hook: called with a site and the gradient of its output.
    """

    def __init__(
        self, tensors: Mapping[int, Made], data: object, hook: Callable[[Site, Tensor], None]
    ) -> None:
        self._made, self._hook = dict(tensors), hook
        self._data = WeakTensorKeyDictionary()
        for tensor in tensors_of(data):
            self._data[tensor] = True
        self._sites: list[Site] = []
        self.differentiated = False

    def run(self, call: Call) -> Any:
        """Execute a call, with its parameters detached if their shares can be computed otherwise."""
        if call.function in _DERIVATIVES:
            self.differentiated = True
            return call.run()
        made = self._operands(call)
        if made and call.kwargs and call.function in NAMES:
            call = call.by_position(NAMES[call.function])
            made = self._operands(call)
        if not made or not torch.is_grad_enabled() or _is_transformed():
            return self._marked(call, call.run())
        if call.function in LIKE_ANOTHER or not self._meets_data(call):
            return self._derived(call, made)
        rule = rule_of(call)
        if rule is None or not _suits(call):
            return self._marked(call, self._left(call, made))
        return self._tapped(call, made, rule)

    def release(self) -> None:
        """Free the operands of all sites, and all tensors computed from parameters."""
        for site in self._sites:
            site.release()
        self._made.clear()

    def _operands(self, call: Call) -> dict[Place, Made]:
        """Return the operands that were computed from parameters only."""
        known = self._made
        return {
            place: known[id(tensor)]
            for place, tensor in call.operands.items()
            if id(tensor) in known
        }

    def _meets_data(self, call: Call) -> bool:
        """Return whether an operand depends on data."""
        return any(
            tensor.requires_grad or tensor in self._data
            for tensor in call.operands.values()
            if id(tensor) not in self._made
        )

    def _marked(self, call: Call, result: Any) -> Any:
        """Remember that a result depends on data, if an operand does; one that requires a gradient
        needs no mark.
        """
        written = call.args[0] if call.function is torch.Tensor.__setitem__ else result
        unmarked = [
            tensor
            for tensor in (written if isinstance(written, (list, tuple)) else (written,))
            if isinstance(tensor, Tensor) and not tensor.requires_grad
        ]
        if unmarked and self._meets_data(call):
            for tensor in unmarked:
                self._data[tensor] = True
        return result

    def _left(self, call: Call, made: Operands) -> Any:
        """Execute a call on the parameters themselves."""
        before = Versions(call)
        result = call.run()
        try:
            before.check()
        except Untold:  # an operand that was written to has a new value
            for operand in made.values():
                self._made.pop(id(operand.tensor), None)
        return result

    def _derived(self, call: Call, made: dict[Place, Made]) -> Any:
        """Execute a call on parameters only, and keep the directions of its result."""
        result = self._left(call, made)
        several = isinstance(result, (list, tuple))
        detached = _detached(call, made)
        for output, tensor in enumerate(result if several else (result,)):
            if isinstance(tensor, Tensor) and tensor.requires_grad and id(tensor) not in self._made:
                self._made[id(tensor)] = Derived(
                    tensor, detached, made, output if several else None
                )
        return result

    def _tapped(self, call: Call, made: dict[Place, Made], rule: Rule) -> Any:
        """Execute a call with parameters detached, and register a hook on its result."""
        call = _detached(call, made)
        result = call.run()
        several = isinstance(result, tuple)
        output = result[0] if several else result
        if output._is_view():
            output = output.clone()
        if not output.requires_grad:
            anchor = torch.zeros((), device=output.device, requires_grad=True)
            output = _Anchor.apply(output, anchor)  # type: ignore[no-untyped-call]
        casts = torch.is_autocast_enabled(output.device.type)
        if call.function in ADDITIONS:
            call = call.with_operands({place: None for place in call.operands if place not in made})
        site = Site(len(self._sites), call, made, rule, casts)
        self._sites.append(site)
        output.register_hook(lambda above: self._hook(site, above))
        return (output, *result[1:]) if several else output


def _detached(call: Call, made: Operands) -> Call:
    return call.with_operands({place: operand.tensor.detach() for place, operand in made.items()})


def _suits(call: Call) -> bool:
    """Return whether the operands of a call are ordinary real tensors, and it does not write into a
    view.
    """
    operands = list(call.operands.values())
    in_place = call.function.__name__ in ("add_", "sub_", "__iadd__", "__isub__")
    return all(
        type(tensor) in _PLAIN and tensor.layout == torch.strided and not tensor.is_complex()
        for tensor in operands
    ) and not (in_place and operands[0]._is_view())


def _is_transformed() -> bool:
    """Return whether a functorch transform or forward mode is active."""
    functorch: bool = torch._C._are_functorch_transforms_active()
    return functorch or torch.autograd.forward_ad._current_level >= 0


def _is_of_subclass(*tensors: Any) -> bool:
    """Return whether any tensor has its own behaviour, whatever mode is active."""
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        tensors = tuple(tensors[0])
    disabled = torch._C._disabled_torch_function_impl
    return any(
        type(tensor) not in _PLAIN
        and getattr(type(tensor), "__torch_function__", disabled) is not disabled
        for tensor in tensors
    )


@contextlib.contextmanager
def _opened(*modules: Any) -> Iterator[None]:
    """Let a mode see the operations that Python functions of some torch modules call, instead of
    the functions.
    """
    native = [
        (module, name, getattr(module, name))
        for module in modules
        for name in vars(module)
        if name.startswith("has_torch_function")
    ]
    for module, name, _ in native:
        setattr(module, name, _is_of_subclass)
    try:
        yield
    finally:
        for module, name, function in native:
            setattr(module, name, function)


# --- what is taken of a batch ---------------------------------------------------------------------


class ExampleShares:
    """Collect directional derivatives of every example's summed values.

    Args:
        tensors: tensors whose shares are collected.
        directions: number of directions.
        examples: number of examples.
        axes: for each site its function and tensors, and the location of the examples in its
            output, see `tap_check.check`; None for the first axis everywhere, if it has as many
            entries as there are examples.

    Attributes:
        untold: name of a tensor → why its shares cannot be separated.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        directions: int,
        examples: int,
        axes: Axes | None,
    ) -> None:
        self._tensors, self._examples, self._axes = tensors, examples, axes
        self._uses = uses_of(signature for signature, _ in axes or ())
        self._directions = directions
        self._sums: dict[str, dict[tuple[int, int], Tensor]] = {}  # by tensor, direction and use
        self._axis_of: dict[int, ExampleAxis] = {}  # by position of the site
        self.untold: dict[str, str] = {}

    @property
    def shares(self) -> dict[str, Tensor]:
        """Return the derivatives of all tensors that can be separated, (directions, examples)
        float64; zero if the values do not depend on a tensor.
        """
        reached = self.reached
        shape = self._directions, self._examples
        return {
            name: reached[name].sum(-1)
            if name in reached
            else torch.zeros(shape, dtype=torch.float64, device=tensor.device)
            for name, tensor in self._tensors.items()
            if name not in self.untold
        }

    @property
    def reached(self) -> dict[str, Tensor]:
        """Return those of the tensors that the values depend on, by use, see `uses_of`,
        (directions, examples, uses) float64.
        """
        return {
            name: self._by_use(name, sums)
            for name, sums in self._sums.items()
            if name not in self.untold
        }

    def _by_use(self, name: str, sums: Mapping[tuple[int, int], Tensor]) -> Tensor:
        uses = len(self._uses.get(name, ("",)))
        none = torch.zeros_like(next(iter(sums.values())))
        rows = [
            sums.get(place, none)
            for place in itertools.product(range(self._directions), range(uses))
        ]
        return torch.stack(rows).reshape(self._directions, uses, -1).transpose(1, 2)

    def take(self, site: Site, source: str, index: int, products: Products) -> None:
        """Add the sums of each example.

        Args:
            site: the site.
            source: name of the tensor.
            index: index of the motion.
            products: the products at the site.
        """
        if site.position not in self._axis_of:
            self._axis_of[site.position] = self._axis(site, products.shape)
        sums = products.sums(self._axis_of[site.position], self._examples)
        uses = self._uses.get(source)
        place = index, 0 if uses is None else uses.index(site.signature[0])
        of_tensor = self._sums.setdefault(source, {})
        of_tensor[place] = of_tensor[place] + sums if place in of_tensor else sums

    def _axis(self, site: Site, shape: torch.Size) -> ExampleAxis:
        if self._axes is None:
            if not shape or shape[0] != self._examples:
                raise Untold("the first axis of its output is not that of the examples")
            return FIRST
        signature, axis = (
            self._axes[site.position] if site.position < len(self._axes) else (("", ()), None)
        )
        if signature != site.signature:
            raise Untold("the model made other calls than when the axes were found")
        if axis is None or not axis.fits(shape, self._examples):
            raise Untold("no axis of its output is that of the examples")
        return axis


class Taps(TorchFunctionMode):
    """Tap a model's parameters while it is the context of forward and backward passes.

    Args:
        tensors: leaves of autograd, by name.
        motions: the directions.
    """

    def __init__(self, tensors: Mapping[str, Tensor], motions: Sequence[Motion]) -> None:
        super().__init__()
        self._tensors, self.directions = tensors, len(motions)
        one = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        keeps = one * len(motions) <= KEPT
        self._made: dict[int, Made] = {
            id(tensor): Parameter(tensor, name, motions, keeps) for name, tensor in tensors.items()
        }
        self._batch: _Batch | None = None
        self._recorder: Recorder | None = None
        self._is_retained = False
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Taps:
        self._exit.enter_context(_opened(*_PYTHON_FUNCTIONS))
        for name, tensor in self._tensors.items():
            hook = tensor.register_post_accumulate_grad_hook(self._watch(name))  # type: ignore[no-untyped-call]
            self._exit.callback(hook.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._batch = None
        self._exit.close()

    def __torch_function__(
        self,
        function: Function,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = function.__name__
        if self._batch is None or name == "__set__" or function in _TELLING:
            return function(*args, **kwargs)
        if name == "__get__" and function not in RESHAPING:  # for example a shape or a type
            result = function(*args)
            if not isinstance(result, Tensor):
                return result
        return self._batch.run(Call(function, args, kwargs))

    def begin(self, data: object) -> None:
        """Start to observe the forward pass over a batch."""
        self._batch = _Batch(self._made, data, self._hook)

    def backward(self, total: Tensor, recorder: Recorder, retain_graph: bool = False) -> None:
        """Run a backward pass from the sum of a batch's values, and record the results at the
        sites.

        Gradients that reach a tensor itself are freed, and its shares are untold.

        Args:
            total: the sum.
            recorder: records the results.
            retain_graph: as for `torch.Tensor.backward`.
        """
        assert self._batch is not None, "no batch was begun"
        if self._batch.differentiated:
            recorder.untold |= dict.fromkeys(self._tensors, "the loss takes derivatives itself")
        if not total.requires_grad:
            return

        self._recorder, self._is_retained = recorder, retain_graph
        try:
            # the mode stays active for recomputation under activation checkpointing
            with _opened(torch.autograd):
                total.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        finally:
            self._recorder = None
            if not retain_graph:
                self._batch.release()
                self._batch = None

    def _watch(self, name: str) -> Callable[[Tensor], None]:
        """Return a hook that frees a gradient which reaches a tensor itself."""

        def reached(tensor: Tensor) -> None:
            if self._recorder is not None:
                tensor.grad = None
                self._recorder.untold.setdefault(name, "an operation on it has no rule")

        return reached

    def _hook(self, site: Site, above: Tensor) -> None:
        if self._recorder is None:  # the loss takes a derivative
            assert self._batch is not None
            self._batch.differentiated = True
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            site.record(above, self._recorder, self.directions)
        if not self._is_retained:
            site.release()
