"""Whether a run that is gone on with is of the checkpoints, the model, the losses and the data that are there now."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from . import store
from .cluster import Cluster, Spec
from .errors import InputError
from .preparation import as_json, ask
from .store import LossRecord, RunWriter, StoredTensor
from .trajectory import Checkpoint
from .worker import losses_at


def same_checkpoints(writer: RunWriter, found: list[Checkpoint], root: str) -> None:
    """The recorded checkpoints must be the first ones found, but for those no number relies on yet; more may follow."""
    steps = [checkpoint.step for checkpoint in found]
    for index, checkpoint in enumerate(writer.manifest.checkpoints):
        if index >= len(found) or steps[index] != checkpoint.step:
            what = (
                f"step {steps[index]} is new before step {checkpoint.step}"
                if checkpoint.step in steps
                else f"step {checkpoint.step} is missing"
            )
        elif found[index] != checkpoint and writer.relies_on(index):
            what = f"the content of step {checkpoint.step} differs"
        else:
            continue
        raise InputError(
            f"{root} holds other checkpoints than {writer.path} was made from: {what}. Restore them, or write another run with --out."
        )


def same_tensors(writer: RunWriter, found: list[StoredTensor]) -> None:
    """The model must have the tensors that are recorded."""
    before, now = ({each.spec.name: each for each in table} for table in (writer.manifest.tensors, found))
    if found != writer.manifest.tensors:
        name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
        raise InputError(
            f"the task's model has other tensors than {writer.path} was made with: {name!r} differs. Build the model that was trained, "
            "or write another run with --out."
        )


def same_loss(name: str, recorded: LossRecord, found: LossRecord, same_end: bool) -> None:
    """A recorded name must mean the same loss: same settings, same value and gradient norm on a fixed sample."""
    from .objective import Identity

    for setting in ("on", "kind", "examples", "groups", "counts"):
        if getattr(recorded, setting) != getattr(found, setting):
            raise InputError(_other_loss(name, setting, getattr(recorded, setting), getattr(found, setting)))
    for place in (0, 1) if same_end else (0,):
        before, now = recorded.identity[place], found.identity[place]
        if before and now and not Identity(**before).matches(Identity(**now)):
            where = "first" if place == 0 else "last"
            shown = [f"{each['loss']:.6g} and {each['gradient_norm']:.6g} on a sample" for each in (before, now)]
            raise InputError(_other_loss(name, f"value and gradient norm at the {where} checkpoint", *shown))


def same_values(cluster: Cluster, writer: RunWriter, common: Spec, again: Mapping[str, Collection[int]]) -> None:
    """Losses that are gone on with must have their values over all of their data, at a checkpoint where those are known.

    Args:
        cluster: one worker of which evaluates them.
        writer: of the run.
        common: what specs of spans have in common.
        again: committed spans that will be computed again, by loss.
    """
    known = {name: store.meeting(writer.commits(name), again.get(name, ())) for name in common["losses"]}
    meetings: dict[str, list[str]] = {}
    for name, found in known.items():
        if found is not None:
            meetings.setdefault(str(found[0]), []).append(name)
    if not meetings:
        return
    checkpoints = writer.manifest.checkpoints
    where = {index: as_json(checkpoints[int(index)]) for index in meetings}
    spec = {**common, "run": str(writer.path.resolve()), "meetings": meetings, "checkpoints": where, "span": 1}
    for name, now in ask(cluster, losses_at, spec)["losses"].items():
        index, before = known[name] or (0, now)
        if store.differ(writer.commits(name), before, now):
            what = f"value over its whole data at step {checkpoints[index].step}"
            raise InputError(_other_loss(name, what, f"{before:.8g}", f"{now:.8g}"))


def _shortly(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _other_loss(name: str, field: str, before: object, now: object) -> str:
    return (
        f"loss {name!r} is not the one recorded under that name: its {field} was {_shortly(before)}, now {_shortly(now)}. Give the "
        f"new loss another name, drop the old one with `lca remove RUN --loss {name}`, or write another run with --out."
    )
