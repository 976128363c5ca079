"""Build the table of a model's tensors: which are allocated, which are only loaded, and along which
axis their units run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from ...checkpoints.trajectory import TensorSpec, is_statistic, normalise
from ...errors import InputError
from ...tasks.task import every_name

_ON_AXIS_1 = {"ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Conv1D"}


def tensor_table(
    model: nn.Module,
    norm_stats: str,
    fixed: Sequence[str] = (),
    held: Collection[str] | None = None,
) -> list[TensorSpec]:
    """Return the model's tensors in its own order: parameters once each with their aliases, then
    persistent buffers.

    Floating buffers are allocated as tensors of kind "buffer", except running statistics in `batch`
    mode, which the loss does not depend on. Every other stored tensor is "state". A tensor counts
    as stored if it is in the state dict, by identity or, if a hook puts a copy there, by name; a
    parameter also if its name is in `held`.

    Args:
        model: the model.
        norm_stats: mode of normalisation layers.
        fixed: patterns of tensors to leave out.
        held: normalised names of the tensors in the checkpoints; frozen parameters that are not
            among them are left out. None if the checkpoints hold all.

    Raises:
        InputError: if a parameter is complex.
    """
    stored = model.state_dict(keep_vars=True)
    by_id: dict[int, list[str]] = {}
    for name, tensor in stored.items():
        by_id.setdefault(id(tensor), []).append(name)
    by_name = set(map(normalise, stored))
    parameters, owners = dict(model.named_parameters()), _owners(model)
    table = []
    for name, tensor in [*parameters.items(), *model.named_buffers()]:
        if is_fixed(name, fixed):
            continue
        is_hidden = name in parameters and held is not None and normalise(name) in held
        if id(tensor) not in by_id and normalise(name) not in by_name and not is_hidden:
            continue  # a non-persistent buffer: the model builds it, and checkpoints lack it
        aliases = tuple(alias for alias in by_id.get(id(tensor), ()) if alias != name)
        frozen = name in parameters and not tensor.requires_grad
        if (
            frozen
            and held is not None
            and not any(normalise(alias) in held for alias in (name, *aliases))
        ):
            continue
        if name in parameters and tensor.is_complex():
            raise InputError(
                f"parameter {name!r} is complex, but a loss change is allocated to real numbers. "
                f"Keep it as a real tensor of shape {[*tensor.shape, 2]} (torch.view_as_real) and "
                "call torch.view_as_complex in forward; or freeze it with Task(fixed=[…])."
            )
        kind = "parameter" if name in parameters else "buffer"
        if not tensor.is_floating_point() or (norm_stats == "batch" and is_statistic(name)):
            kind = "state"
        table.append(
            TensorSpec(
                name,
                kind,
                tuple(tensor.shape),
                aliases,
                _unit_axis(owners[id(tensor)], tensor.dim()),
            )
        )
    return table


def added_entries(model: nn.Module) -> list[str]:
    """Return the state dict's entries that are neither parameters nor buffers, but added by hooks
    or `get_extra_state`.
    """
    own = [*model.parameters(), *model.buffers()]
    identities, names = set(map(id, own)), {normalise(name) for name in every_name(model)}
    return [
        name
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
        and id(value) not in identities
        and normalise(name) not in names
    ]


def unstored(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a model builds and does not save, by name."""
    stored = model.state_dict(keep_vars=True)
    identities, names = set(map(id, stored.values())), set(map(normalise, stored))
    return {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if id(buffer) not in identities and normalise(name) not in names
    }


def is_fixed(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a tensor keeps the value that the model builds.

    Args:
        name: name of the tensor.
        patterns: patterns of `Task.fixed`.
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _owners(model: nn.Module) -> dict[int, frozenset[str]]:
    """Map the identity of each tensor to the class names of the first module that holds it."""
    owners: dict[int, frozenset[str]] = {}
    for module in model.modules():
        kinds = frozenset(kind.__name__ for kind in type(module).__mro__)
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            owners.setdefault(id(tensor), kinds)
    return owners


def _unit_axis(owner: frozenset[str], dims: int) -> int | None:
    """Return the axis of output neurons and channels: 0, but 1 for transposed convolutions and
    Conv1D, and None for a scalar.
    """
    if dims == 0:
        return None
    return 1 if dims > 1 and owner & _ON_AXIS_1 else 0
