"""Checkpoints in shards: torch.distributed.checkpoint writes its own here, in one process and in
two; DeepSpeed's are written by hand to the form that its own zero_to_fp32.py reads. What an import
makes of them is what a recorder saw.
"""

from __future__ import annotations

import enum
import pickle
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn

from lca_posthoc.checkpoints.trajectory import open_trajectory
from lca_posthoc.convert.named_states import numbered
from lca_posthoc.errors import InputError

from ..helpers.cli import lca, refused
from ..helpers.saved_checkpoints import told
from .test_convert import Hostile
from .test_import_optimizer import STEPS, Training, assert_told

State = dict[str, Any]
Names = dict[int, str]


def in_two_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Groups that torch knows the names of."""
    named = list(model.named_parameters())
    decayed = [pair for pair in named if "bias" not in pair[0] and "norm" not in pair[0]]
    others = [pair for pair in named if "bias" in pair[0] or "norm" in pair[0]]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.02)


def momentum_with_names(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9)


NAMED = {
    "AdamW": Training(optimizer=in_two_groups),
    "Adam": Training(
        optimizer=lambda model: torch.optim.Adam(model.named_parameters(), lr=0.02),
        skipped=(),
    ),
    "SGD": Training(optimizer=momentum_with_names),
}


# --- torch.distributed.checkpoint -------------------------------------------------------------------


def names_in(optimizer: State) -> Names:
    return {
        number: name
        for group in optimizer["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }


def by_name(optimizer: State) -> State:
    """The state as `get_optimizer_state_dict` gives it."""
    names = names_in(optimizer)
    return {
        "state": {names[number]: slots for number, slots in optimizer["state"].items()},
        "param_groups": [
            {
                **{key: value for key, value in group.items() if key != "param_names"},
                "params": group["param_names"],
            }
            for group in optimizer["param_groups"]
        ],
    }


def flat(optimizer: State) -> State:
    """The same, with `flatten_optimizer_state_dict`."""
    named = by_name(optimizer)
    return {
        f"state.{name}.{slot}": value
        for name, slots in named["state"].items()
        for slot, value in slots.items()
    } | {
        f"param_groups.{name}.{key}": value
        for group in named["param_groups"]
        for name in group["params"]
        for key, value in group.items()
        if key != "params"
    }


def write(folder: Path, state: Mapping[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no processes take part
        dcp.save(dict(state), checkpoint_id=folder)
    return folder


def of_torch(form: Callable[[State], State]) -> Callable[..., Path]:
    def layout(place: Path, step: int, state: Mapping[str, Tensor], **beside: State) -> Path:
        inside = {"model": dict(state), "optimizer": form(beside["optimizer"]), "epoch": 0}
        return write(place / f"step-{step}", inside)

    return layout


def of_titan(place: Path, step: int, state: Mapping[str, Tensor], **beside: State) -> Path:
    """The model's tensors at the top, the optimiser's flat, as torchtitan saves them."""
    return write(place / f"step-{step}", {**state, "optimizer": flat(beside["optimizer"])})


def of_accelerate(place: Path, step: int, state: Mapping[str, Tensor], **beside: State) -> Path:
    """Folders for the model and the optimiser in that of a trainer."""
    path = place / f"checkpoint-{step}"
    write(path / "optimizer_0", {"optimizer": by_name(beside["optimizer"])})
    return write(path / "pytorch_model_fsdp_0", {"model": dict(state)})


TORCH = {
    "numbered": of_torch(dict),
    "named": of_torch(by_name),
    "flat": of_torch(flat),
    "titan": of_titan,
    "accelerate": of_accelerate,
}


def assert_weights(imported: Path, recorded: Path) -> None:
    for step in range(STEPS + 1):
        own, other = (
            load_file(path / f"step_{step:08d}.safetensors") for path in (imported, recorded)
        )
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize(
    ("layout", "name"),
    [*((layout, "AdamW") for layout in TORCH), ("named", "SGD"), ("flat", "SGD")],
)
def test_what_torch_saved_distributed_is_told_as_a_recorder_does(
    tmp_path: Path, layout: str, name: str
) -> None:
    NAMED[name].run(tmp_path, TORCH[layout])
    heard = told(tmp_path / "saved", tmp_path / "imported")
    assert any(f"read {STEPS} steps of {name}" in note for note in heard), heard
    assert_weights(tmp_path / "imported", tmp_path / "recorded")
    assert_told(tmp_path / "imported", tmp_path / "recorded")


RANK = """\
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
place, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
for step in (0, 1):
    torch.manual_seed(step)
    state = {"rows": torch.randn(5, 3), "columns": torch.randn(2, 7), "whole": torch.randn(4)}
    kinds = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}
    if rank == 0:
        torch.save(state, f"{place}/whole_{step}.pt")
    cut = {name: distribute_tensor(value, mesh, [kinds[name]]) for name, value in state.items()}
    dcp.save({"model": cut}, checkpoint_id=f"{place}/saved/step_{step}")
dist.destroy_process_group()
"""


def test_shards_of_several_processes_are_put_together(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", RANK, str(tmp_path), str(rank)])
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    assert len(list((tmp_path / "saved" / "step_0").glob("*.distcp"))) == 2
    told(tmp_path / "saved", tmp_path / "imported")
    for step in (0, 1):
        whole = torch.load(tmp_path / f"whole_{step}.pt", weights_only=True)
        own = load_file(tmp_path / "imported" / f"step_{step:08d}.safetensors")
        assert own.keys() == whole.keys()
        assert all(torch.equal(own[name], whole[name]) for name in own)


def series(place: Path, **more: object) -> Path:
    for step in (0, 1, 2):
        state = {"model": {"w": torch.full((4,), float(step))}, **more}
        write(place / f"step_{step}", state)
    return place


def test_an_entry_is_named_with_key(tmp_path: Path) -> None:
    series(tmp_path / "saved", app={"ema": {"w": torch.full((4,), 7.0)}})
    told(tmp_path / "saved", tmp_path / "first")
    assert float(load_file(tmp_path / "first" / "step_00000002.safetensors")["w"][0]) == 2
    assert lca("import", tmp_path / "saved", tmp_path / "ema", "--key", "app.ema").exit_code == 0
    assert float(load_file(tmp_path / "ema" / "step_00000002.safetensors")["w"][0]) == 7


def hostile_table(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(folder.parent / "ran")))


def another_class(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(types.SimpleNamespace(a=1)))


def hostile_item(folder: Path) -> None:
    """An object inside the shards."""
    write(folder, {"model": {"w": torch.zeros(4)}, "extra": Hostile(folder.parent / "ran")})


def no_table(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"\x80\x04]q\x00.")


def one_byte(folder: Path) -> None:
    """Of the tensor's numbers, which torch.load does not compare with their checksum."""
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    place = data.index(torch.full((4,), 1.0).numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)


def short(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-700])


def absent(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a function in the table": (hostile_table, "is not part of torch.distributed.checkpoint"),
    "another class in the table": (another_class, "names types.SimpleNamespace"),
    "a function in an item": (hostile_item, "is not loaded: that could run any code"),
    "no table": (no_table, "is not a table of contents"),
    "a byte": (one_byte, "does not match its checksum"),
    "a short file": (short, "ends early"),
    "a missing file": (absent, "'__0_0.distcp', which is not there"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_damaged_or_hostile_is_refused(tmp_path: Path, case: str) -> None:
    damage, words = DAMAGE[case]
    series(tmp_path / "saved")
    damage(tmp_path / "saved" / "step_1")
    refused(lca("import", tmp_path / "saved", tmp_path / "imported"), words)
    assert not (tmp_path / "saved" / "ran").exists()


def test_a_file_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    series(tmp_path / "saved")
    table = tmp_path / "saved" / "step_1" / ".metadata"
    (tmp_path / "saved" / "12345678.distcp").write_bytes(b"")
    table.write_bytes(table.read_bytes().replace(b"__0_0.distcp", b"../../ab.cde"))
    refused(lca("import", tmp_path / "saved", tmp_path / "imported"), "which is not there")


# --- DeepSpeed --------------------------------------------------------------------------------------


class ZeroStageEnum(enum.IntEnum):
    gradients = 2


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 1.0


@pytest.fixture(autouse=True)
def classes_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects that DeepSpeed's files hold, of modules that are not there when they are read."""
    for module, kind in (
        ("deepspeed.runtime.zero.config", ZeroStageEnum),
        ("deepspeed.runtime.fp16.loss_scaler", LossScaler),
    ):
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setattr(sys.modules[module], kind.__name__, kind, raising=False)
        monkeypatch.setattr(kind, "__module__", module)


def parted(values: list[Tensor], ranks: int, stage: int) -> list[Tensor]:
    """What each rank has of some parameters, flat."""
    if stage < 3:
        whole = torch.cat([value.flatten() for value in values])
        whole = torch.cat([whole, torch.zeros(-len(whole) % (2 * ranks))])
        return [part.clone() for part in whole.chunk(ranks)]
    filled = [torch.cat([v.flatten(), torch.zeros(-v.numel() % ranks)]) for v in values]
    return [torch.cat([value.chunk(ranks)[rank] for value in filled]) for rank in range(ranks)]


def of_deepspeed(
    stage: int, ranks: int, *, root: str = "global_step{}", fused: bool = False
) -> Callable[..., Path]:
    def layout(place: Path, step: int, state: Mapping[str, Tensor], **beside: State) -> Path:
        folder = place / root.format(step)
        folder.mkdir(parents=True)
        optimizer = beside["optimizer"]
        names = names_in(optimizer)
        # at stage 3 a group of parameters is cut into several flat ones
        groups = [list(group["params"]) for group in optimizer["param_groups"]]
        cut = [
            (number, part)
            for number, group in enumerate(groups)
            for part in ((group[:2], group[2:]) if stage == 3 and len(group) > 2 else (group,))
        ]
        common = {
            "module": {
                name: tensor.half()
                if tensor.is_floating_point() and name in names.values()
                else tensor
                for name, tensor in state.items()
            },
            "buffer_names": [name for name in state if name not in names.values()],
            "param_shapes": [{names[n]: state[names[n]].shape for n in part} for _, part in cut],
            "shared_params": {},
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "global_steps": step,
            "ds_version": "0.18.0",
        }
        for rank in range(ranks):
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            if stage == 3 or rank == 0:
                torch.save(common, folder / f"{prefix}mp_rank_00_model_states.pt")
            parts = [parted([state[names[n]] for n in part], ranks, stage)[rank] for _, part in cut]
            states: dict[int, State] = {}
            for flat_group, (_, part) in enumerate(cut):
                slots = [optimizer["state"].get(n) for n in part]
                if all(slots):
                    states[flat_group] = {
                        slot: parted([own[slot] for own in slots], ranks, stage)[rank]
                        if slot != "step"
                        else int(slots[0]["step"])
                        for slot in slots[0]
                    }
            settings = []
            for number, group in enumerate(optimizer["param_groups"]):
                own = {key: v for key, v in group.items() if key not in ("params", "param_names")}
                if fused:
                    keys = ("lr", "betas", "eps", "weight_decay")
                    own = {key: own[key] for key in keys} | {"bias_correction": True}
                own["params"] = [at for at, (whose, _) in enumerate(cut) if whose == number]
                settings.append(own)
            inner = {"state": states, "param_groups": settings}
            zero = {
                "loss_scaler": LossScaler(),
                "zero_stage": ZeroStageEnum.gradients,
                "partition_count": ranks if stage == 3 else [ranks] * len(cut),
                **(
                    {"fp32_flat_groups": parts, "optimizer_state_dict": inner}
                    if stage == 3
                    else {"single_partition_of_fp32_groups": parts, "base_optimizer_state": inner}
                ),
            }
            torch.save(
                {"optimizer_state_dict": zero, "ds_version": "0.18.0"},
                folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            )
        return folder

    return layout


DEEPSPEED = {
    "stage 1, one rank": of_deepspeed(1, 1),
    "stage 2": of_deepspeed(2, 3),
    "stage 3": of_deepspeed(3, 2),
    "stage 3, ranks that divide nothing": of_deepspeed(3, 7),
    "its own Adam": of_deepspeed(2, 2, fused=True),
    "in a trainer's folder": of_deepspeed(2, 2, root="checkpoint-{0}/global_step{0}"),
    "in a file of Lightning": of_deepspeed(2, 2, root="epoch=0-step={0}.ckpt/checkpoint"),
}


@pytest.mark.parametrize(
    ("layout", "name"),
    [*((layout, "AdamW") for layout in DEEPSPEED), ("stage 2", "SGD"), ("stage 3", "SGD")],
)
def test_what_deepspeed_saved_is_told_as_a_recorder_does(
    tmp_path: Path, layout: str, name: str
) -> None:
    training = replace(NAMED[name], skipped=())
    training.run(tmp_path, DEEPSPEED[layout])
    heard = told(tmp_path / "saved", tmp_path / "imported")
    assert any(f"read {STEPS} steps of {name}" in note for note in heard), heard
    assert_weights(tmp_path / "imported", tmp_path / "recorded")
    assert_told(tmp_path / "imported", tmp_path / "recorded")


def model_states(place: Path, step: int) -> Path:
    return place / f"global_step{step}" / "mp_rank_00_model_states.pt"


def changed(path: Path, change: Callable[[State], object]) -> None:
    saved = torch.load(path, weights_only=False)
    change(saved)
    torch.save(saved, path)


def without_zero(place: Path) -> None:
    """Weights and optimiser in the model's file, as a training without ZeRO has them."""
    for step in range(STEPS + 1):
        for file in place.glob(f"global_step{step}/zero*"):
            file.unlink()

        def whole(saved: State, step: int = step) -> None:
            saved["module"] = {"w": torch.full((3,), float(step))}

        changed(model_states(place, step), whole)


def frozen_and_shared(place: Path) -> None:
    for step in range(STEPS + 1):

        def add(saved: State) -> None:
            saved["frozen_param_shapes"] = {"base.w": torch.Size([2, 2])}
            saved["frozen_param_fragments"] = {"base.w": torch.arange(4.0)}
            saved["shared_params"] = {"again.weight": next(iter(saved["param_shapes"][0]))}

        changed(model_states(place, step), add)


@pytest.fixture
def of_stage_2(tmp_path: Path) -> Path:
    NAMED["AdamW"].run(tmp_path, of_deepspeed(2, 2))
    return tmp_path / "saved"


def test_weights_without_zero_are_those_of_the_model(of_stage_2: Path, tmp_path: Path) -> None:
    without_zero(of_stage_2)
    told(of_stage_2, tmp_path / "imported")
    assert [
        float(load_file(path)["w"][0])
        for path in sorted((tmp_path / "imported").glob("*.safetensors"))
    ] == [*range(STEPS + 1)]


def test_what_is_frozen_is_there_and_what_is_shared_is_said(
    of_stage_2: Path, tmp_path: Path
) -> None:
    frozen_and_shared(of_stage_2)
    heard = told(of_stage_2, tmp_path / "imported")
    own = load_file(tmp_path / "imported" / "step_00000003.safetensors")
    assert torch.equal(own["base.w"], torch.arange(4.0).view(2, 2))
    assert any("left out 'again.weight'" in note and "tied to it" in note for note in heard)


def lost_rank(place: Path) -> None:
    (place / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()


def fewer_ranks(place: Path) -> None:
    (place / "global_step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()


def tensor_parallel(place: Path) -> None:
    file = model_states(place, 2)
    (file.parent / "mp_rank_01_model_states.pt").write_bytes(file.read_bytes())


def cut_partition(place: Path) -> None:
    def cut(saved: State) -> None:
        parts = saved["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        parts[0] = parts[0][:-9]

    changed(place / "global_step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt", cut)


def no_shapes(place: Path) -> None:
    changed(model_states(place, 2), lambda saved: saved.pop("param_shapes"))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a lost rank": (lost_rank, "lacks the file of rank 0"),
    "fewer ranks": (fewer_ranks, "was saved by 2 ranks, and has files of 1"),
    "layers cut between ranks": (tensor_parallel, "has layers split between ranks"),
    "a short partition": (cut_partition, "the checkpoint is incomplete"),
    "no shapes": (no_shapes, "does not state the shapes of its parameters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_of_deepspeed_that_is_not_whole_is_refused(
    of_stage_2: Path, tmp_path: Path, case: str
) -> None:
    damage, words = REFUSED[case]
    damage(of_stage_2)
    refused(lca("import", of_stage_2, tmp_path / "imported"), words)


# --- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["torch", "deepspeed"])
def test_a_run_names_the_import_and_one_checkpoint_is_no_series(
    tmp_path: Path, layout: str
) -> None:
    folder = (
        series(tmp_path / "saved") / "step_1"
        if layout == "torch"
        else NAMED["SGD"].run(tmp_path, of_deepspeed(2, 2)) and tmp_path / "saved" / "global_step1"
    )
    for place in (folder.parent, folder):
        with pytest.raises(InputError, match="`lca import SOURCE DIR`"):
            open_trajectory(place)
    refused(lca("import", folder, tmp_path / "imported"), "is one checkpoint. Give the directory")


def test_states_of_other_forms_are_none() -> None:
    assert numbered({"state": {}, "param_groups": [{"lr": 1}]}) is None
    assert numbered({"state.w.step": 1, "other": 2}) is None
    assert numbered({"state": {"0": {"step": 1}}, "param_groups": [{"params": [0]}]}) == {
        "state": {0: {"step": 1}},
        "param_groups": [{"params": [0]}],
    }
