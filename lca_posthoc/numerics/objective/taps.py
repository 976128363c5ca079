"""Directional derivatives of every example's loss, tensor by tensor, from one backward pass.

Where a parameter meets data in an operation y = f(a, W), the derivative of example x's loss along a
direction ΔW is the sum, over the entries of y that belong to x, of δ · ∂f/∂W ΔW, with δ the
gradient of the output. `Taps` detaches parameters there, so that no gradient of theirs is computed,
and hangs a hook on y, which takes these sums. Tensors made of parameters alone (transposes,
normalised weights, B · A of adapters) carry a direction for each parameter to where they meet data.

Operations without a rule get the parameter itself: autograd then delivers a gradient to it, and its
shares are reported as untold. So are those of every tensor where derivatives are taken in the
forward pass, which taps are blind to.

Sites hold what they need of the forward pass themselves: activation checkpointing gives the same
shares, but saves no memory. Whether an axis is that of the examples, and whether the loss mixes
them, is not known here: `tap_check.check` compares with single examples.
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
# their functions in Python would hide from a mode what they call
_PYTHON_FUNCTIONS: tuple[Any, ...] = (torch.nn.functional, torch.functional, torch._tensor)
_PLAIN: tuple[type, ...] = (Tensor, torch.nn.Parameter)
# what tells of a tensor or of a mode, and returns no tensor
_TELLING: frozenset[Function] = frozenset(
    (
        *(Tensor.dim, Tensor.size, Tensor.stride, Tensor.numel, Tensor.__len__, Tensor.data_ptr),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.is_inference),
        *(torch.is_floating_point, torch.is_complex, torch.is_inference, torch.numel),
        torch._C._set_grad_enabled,
    )
)
KEPT = 2**24  # bytes: directions of models up to it are computed once for all batches


class _Anchor(torch.autograd.Function):
    """Make a new tensor require a gradient, in place, so that it can have a hook."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *above: Any) -> tuple[None, None]:
        return None, None


class _Batch:
    """The calls of a forward pass over one batch.

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
        """Return what a call returns, its parameters detached where that can be made up for."""
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
        """Free the operands of all sites, and what was made of parameters."""
        for site in self._sites:
            site.release()
        self._made.clear()

    def _operands(self, call: Call) -> dict[Place, Made]:
        """Return the operands that are made of parameters."""
        known = self._made
        return {
            place: known[id(tensor)]
            for place, tensor in call.operands.items()
            if id(tensor) in known
        }

    def _meets_data(self, call: Call) -> bool:
        """Tell whether an operand depends on data."""
        return any(
            tensor.requires_grad or tensor in self._data
            for tensor in call.operands.values()
            if id(tensor) not in self._made
        )

    def _marked(self, call: Call, result: Any) -> Any:
        """Remember that a result depends on data, where an operand does; one that requires a
        gradient tells by itself.
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
        """Return what a call of the parameters themselves returns."""
        before = Versions(call)
        result = call.run()
        try:
            before.check()
        except Untold:  # one that was written to is made of something else now
            for operand in made.values():
                self._made.pop(id(operand.tensor), None)
        return result

    def _derived(self, call: Call, made: dict[Place, Made]) -> Any:
        """Return the result of a call on parameters alone, and keep its directions."""
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
        """Return the result of a call with parameters detached, with a hook on it."""
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
    """Tell whether the operands of a call are ordinary real tensors, and it writes into no view."""
    operands = list(call.operands.values())
    in_place = call.function.__name__ in ("add_", "sub_", "__iadd__", "__isub__")
    return all(
        type(tensor) in _PLAIN and tensor.layout == torch.strided and not tensor.is_complex()
        for tensor in operands
    ) and not (in_place and operands[0]._is_view())


def _is_transformed() -> bool:
    """Tell whether a transform of functorch's or forward mode is active."""
    functorch: bool = torch._C._are_functorch_transforms_active()
    return functorch or torch.autograd.forward_ad._current_level >= 0


def _is_of_subclass(*tensors: Any) -> bool:
    """Tell whether any tensor has behaviour of its own, whatever mode is on."""
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
    """Let a mode see the operations that functions in Python of some modules of torch's consist of,
    in place of the functions.
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
    """Directional derivatives of every example's summed values.

    Args:
        tensors: whose shares are taken.
        directions: their number.
        examples: their number.
        axes: by position of a site its function and tensors, and where the examples are in its
            output, see `tap_check.check`; None for the first axis everywhere, which is trusted
            where it has as many entries as there are examples.

    Attributes:
        untold: why the shares of a tensor cannot be told, by name.
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
        self._axis_of: dict[int, ExampleAxis] = {}  # by position of a site
        self.untold: dict[str, str] = {}

    @property
    def shares(self) -> dict[str, Tensor]:
        """Return the derivatives of the tensors that can be told, (directions, examples) float64;
        zero where the values do not depend on a tensor.
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
        """Add the sums of each example."""
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
            raise Untold("the model ran otherwise than where the axes were found")
        if axis is None or not axis.fits(shape, self._examples):
            raise Untold("no axis of its output is that of the examples")
        return axis


class Taps(TorchFunctionMode):
    """Taps a model's parameters, while it is the context of forward and backward passes.

    Args:
        tensors: leaves of autograd's, by name.
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
        if name == "__get__" and function not in RESHAPING:  # a shape, a type
            result = function(*args)
            if not isinstance(result, Tensor):
                return result
        return self._batch.run(Call(function, args, kwargs))

    def begin(self, data: object) -> None:
        """Watch the forward pass over a batch, which follows."""
        self._batch = _Batch(self._made, data, self._hook)

    def backward(self, total: Tensor, recorder: Recorder, retain_graph: bool = False) -> None:
        """Run a backward pass from the sum of a batch's values, and have what the sites come to
        recorded.

        Gradients that reach a tensor itself are freed, and its shares are untold.
        """
        assert self._batch is not None, "no batch was begun"
        if self._batch.differentiated:
            recorder.untold |= dict.fromkeys(self._tensors, "the loss takes derivatives itself")
        if not total.requires_grad:
            return

        self._recorder, self._is_retained = recorder, retain_graph
        try:
            # the mode stays on, for what runs again under activation checkpointing
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
        if self._recorder is None:  # a derivative that the loss takes
            assert self._batch is not None
            self._batch.differentiated = True
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            site.record(above, self._recorder, self.directions)
        if not self._is_retained:
            site.release()
