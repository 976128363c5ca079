"""Tensors of every layout in containers of every kind: moved, converted, cut, compared and hashed;
losses on them against dense ones.
"""

from __future__ import annotations

import copy
import enum
import os
import subprocess
import sys
import threading
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader

from lca_posthoc import Loss, Task
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.objective import ObjectiveSettings, Split, build_objective, check_loss
from lca_posthoc.numerics.objective.containers import (
    change_tensors,
    copied,
    digest_of,
    named_parts,
    opened,
    rows,
    same_bytes,
    size_of,
    tensors_of,
)
from lca_posthoc.numerics.objective.sources import move
from lca_posthoc.tasks.task import convert_module

CPU, META = torch.device("cpu"), torch.device("meta")
DENSE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).relu()
COMPLEX = torch.view_as_complex(torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(1)))

# --- tensors of every layout ----------------------------------------------------------------------


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([DENSE[:2], DENSE[2:]], layout=layout)


def odd_stride() -> Tensor:
    return torch.as_strided(DENSE.clone(), (1, 1), (4, 7))


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "COO": lambda: DENSE.to_sparse(),
    "COO, not coalesced": lambda: torch.sparse_coo_tensor(
        [[0, 0, 5], [1, 1, 3]], [1.0, 2.0, 3.0], (6, 4)
    ),
    "COO with dense rows": lambda: DENSE.to_sparse(1),
    "CSR": lambda: DENSE.to_sparse_csr(),
    "CSC": lambda: DENSE.to_sparse_csc(),
    "BSR": lambda: DENSE.to_sparse_bsr((2, 2)),
    "BSC": lambda: DENSE.to_sparse_bsc((2, 2)),
    "sparse and complex": lambda: COMPLEX.to_sparse(),
    "sparse and empty": lambda: torch.zeros(6, 4).to_sparse(),
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "quantised": lambda: torch.quantize_per_tensor(DENSE, 0.1, 3, torch.quint8),
    "quantised by channel": lambda: torch.quantize_per_channel(
        DENSE, torch.full((6,), 0.1), torch.zeros(6, dtype=torch.int64), 0, torch.qint8
    ),
    "a scalar": lambda: torch.tensor(3.0),
    "empty": lambda: torch.empty(0, 3),
    "one number, odd stride": odd_stride,
    "every second number": lambda: DENSE[:, ::2],
    "transposed": lambda: DENSE.T,
    "expanded": lambda: DENSE[:1].expand(5, 4),
    "conjugated": lambda: COMPLEX.conj(),
    "negated": lambda: COMPLEX.conj().imag,
    "bool": lambda: DENSE > 0,
    "float8": lambda: DENSE.to(torch.float8_e4m3fn),
    "bfloat16": lambda: DENSE.bfloat16(),
}


def dense(tensor: Tensor) -> Tensor:
    if tensor.is_nested:
        return torch.cat(list(tensor.unbind()))
    tensor = (
        tensor.dequantize()
        if tensor.is_quantized
        else tensor.to_dense()
        if tensor.is_sparse
        else tensor
    )
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tensor_of_any_layout_is_converted_hashed_and_compared(name: str) -> None:
    tensor = LAYOUTS[name]()
    moved = move(tensor, CPU, torch.float64)
    if tensor.is_floating_point():
        assert moved.dtype == torch.float64
        assert torch.equal(dense(moved), dense(tensor).double())
    assert moved.layout == tensor.layout
    assert move(tensor, CPU, torch.float32).layout == tensor.layout
    assert same_bytes(tensor, LAYOUTS[name]())
    assert digest_of(tensor) == digest_of(LAYOUTS[name]())
    assert size_of(tensor) >= 0


def test_every_layout_has_a_hash_of_its_own() -> None:
    tensors = [make() for make in LAYOUTS.values()]
    assert len(set(map(digest_of, tensors))) == len(tensors)
    assert [same_bytes(one, other) for one in tensors for other in tensors if one is not other] == [
        False
    ] * (len(tensors) * (len(tensors) - 1))


@pytest.mark.parametrize(
    "name", [name for name in LAYOUTS if name not in ("empty", "sparse and empty")]
)
def test_one_number_that_differs_is_seen_in_every_layout(name: str) -> None:
    tensor = LAYOUTS[name]()
    if tensor.is_quantized:
        other = torch.quantize_per_tensor(DENSE, 0.1, 4, torch.quint8)
    elif tensor.layout == torch.strided and not tensor.is_nested:
        other = tensor.resolve_conj().clone(memory_format=torch.contiguous_format)
        other.view(-1)[-1] = not bool(other.view(-1)[-1].to(torch.complex64).real)
    else:
        other = tensor.clone()
        values = (
            other.unbind()[1]
            if other.is_nested
            else other._values()
            if other.is_sparse
            else other.values()
        )
        values.view(-1)[-1] += 1
    assert digest_of(tensor) != digest_of(other)
    assert not same_bytes(tensor, other)


@pytest.mark.parametrize(
    "name", ["COO", "COO, not coalesced", "CSR", "CSC", "BSR", "BSC", "transposed"]
)
@pytest.mark.parametrize("positions", [range(2, 6), torch.tensor([4, 5, 0, 1])])
def test_rows_of_a_sparse_tensor_are_those_of_a_dense_one(
    name: str, positions: range | Tensor
) -> None:
    tensor = LAYOUTS[name]()
    if name == "transposed":
        tensor = tensor.T
    cut = rows(tensor, positions)
    assert cut.layout == tensor.layout
    assert torch.equal(dense(cut), torch.stack([dense(tensor)[int(at)] for at in positions]))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_rows_of_a_nested_tensor(layout: torch.layout) -> None:
    cut = rows(nested(layout), torch.tensor([1, 0]))
    assert cut.layout == layout
    assert [part.tolist() for part in cut.unbind()] == [DENSE[2:].tolist(), DENSE[:2].tolist()]


def test_data_made_in_inference_mode_can_be_trained_on() -> None:
    with torch.inference_mode():
        made = DENSE * 2
    weight = torch.ones(4, requires_grad=True)
    (move(made, CPU, torch.float32) @ weight).square().sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_buffer_of_any_layout_is_converted_with_its_module(name: str) -> None:
    module, tensor = nn.Module(), LAYOUTS[name]()
    module.register_buffer("held", tensor, persistent=False)
    convert_module(module, CPU, torch.float64)
    held = module.get_buffer("held")
    wide = (
        torch.float64
        if tensor.is_floating_point()
        else torch.complex128
        if tensor.is_complex()
        else tensor.dtype
    )
    assert (held.dtype, held.layout) == (wide, tensor.layout)
    assert torch.equal(dense(held), dense(tensor).to(dense(held).dtype))


# --- containers of every kind ---------------------------------------------------------------------


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Any


@dataclass
class Graph:
    """A stand-in for the batches of graph libraries."""

    nodes: Any
    label: str = "g"


class Target:
    def __init__(self, boxes: Any) -> None:
        self.boxes, self.more = boxes, [{"mask": boxes}]


class Owner:
    """Knows what belongs to it, which knows it."""

    def __init__(self, x: Any) -> None:
        self.inner = SimpleNamespace(x=x, owner=self)
        self.lock = threading.Lock()


class Mine(dict[str, Any]):
    pass


class Attributes(dict[str, Any]):
    """Its items are its attributes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Listed(list[Any]):
    pass


class Colour(enum.Enum):
    RED = 1


def objects(x: Any) -> np.ndarray:
    array = np.empty(2, dtype=object)
    array[0], array[1] = x, "text"
    return array


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "a tuple": lambda x: (x, 1, "a"),
    "a list of dicts": lambda x: [{"boxes": x}, {"boxes": x, "name": "b"}],
    "a named tuple": lambda x: Pair(x, None),
    "an ordered dict": lambda x: OrderedDict(a=x),
    "a default dict": lambda x: defaultdict(list, a=x),
    "a dict of a class": lambda x: Mine(a=x),
    "a dict that is its attributes": lambda x: Attributes(a=x),
    "a user dict": lambda x: UserDict(a=x),
    "a list of a class": lambda x: Listed([x]),
    "a deque": lambda x: deque([x], maxlen=3),
    "a set": lambda x: {x},
    "an array of objects": objects,
    "a dataclass": lambda x: Graph(x),
    "a frozen one with slots": lambda x: Slotted(x),
    "a plain object": lambda x: Target(x),
    "a namespace": lambda x: SimpleNamespace(x=x, path=Path("a"), colour=Colour.RED, text=None),
    "an object that leads back to itself": lambda x: Owner(x),
    "an object in a list": lambda x: [Target(x), (Graph({"x": x}),)],
}


def tensors(thing: Any) -> list[Tensor]:
    return list(tensors_of(thing))


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("layout", ["transposed", "CSR"])
def test_what_is_inside_is_converted_and_the_rest_stays(kind: str, layout: str) -> None:
    inside = LAYOUTS[layout]()
    thing = CONTAINERS[kind](inside)
    moved = move(thing, CPU, torch.float64)
    assert type(moved) is type(thing)
    assert [(part.dtype, part.layout) for part in tensors(moved)] == [
        (torch.float64, inside.layout)
    ] * len(tensors(thing))
    assert tensors(thing)
    assert all(part is inside for part in tensors(thing))  # the original is untouched
    assert all(torch.equal(dense(part), dense(inside).double()) for part in tensors(moved))
    assert [name for name, _ in named_parts(moved)] == [
        name for name, _ in named_parts(thing)
    ] or kind == "a set"
    assert [part for _, part in named_parts(moved) if isinstance(part, str | Path | enum.Enum)] == [
        part for _, part in named_parts(thing) if isinstance(part, str | Path | enum.Enum)
    ]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_hash_of_a_container_sees_what_is_inside(kind: str) -> None:
    make = CONTAINERS[kind]
    assert digest_of(make(DENSE)) == digest_of(make(DENSE.clone()))
    other = DENSE.clone()
    other[5, 3] += 1
    assert digest_of(make(DENSE)) != digest_of(make(other))
    assert digest_of(make("a")) != digest_of(make("b"))
    assert size_of(make(DENSE)) >= DENSE.nbytes


def test_attributes_follow_items_where_they_are_the_same() -> None:
    moved = move(Attributes(a=DENSE), CPU, torch.float64)
    assert moved.a is moved["a"]
    assert moved.a.dtype == torch.float64


def test_what_leads_to_no_tensor_is_shared_and_what_has_nothing_to_change_is_itself() -> None:
    thing = Owner(DENSE)
    moved = move(thing, CPU, torch.float64)
    assert moved.lock is thing.lock
    assert moved.inner.owner is moved
    assert move(thing, CPU, torch.float32) is thing
    for unknown in (
        object(),
        Colour.RED,
        threading.Lock(),
        Path("a"),
        len,
        nn.Linear(2, 2),
        Counter("aab"),
    ):
        assert change_tensors(unknown, Tensor.clone) is unknown or opened(unknown) is not None


def test_other_mappings_become_dicts() -> None:
    assert move(MappingProxyType({"a": DENSE}), CPU, torch.float64)["a"].dtype == torch.float64


def test_a_tokenizer_s_batch_stays_one() -> None:
    transformers = pytest.importorskip("transformers")
    moved = move(transformers.BatchEncoding({"input_ids": torch.ones(2, 3)}), CPU, torch.float64)
    assert isinstance(moved, transformers.BatchEncoding)
    assert moved.input_ids.dtype == moved["input_ids"].dtype == torch.float64


class Library:
    """An object that moves itself, and whose tensor nobody else can reach."""

    def __init__(self, x: Tensor) -> None:
        self.read = lambda: x

    def to(self, device: torch.device) -> Library:
        return Library(self.read().to(device))


class Units:
    def to(self, unit: str) -> float:
        return float(unit)


def test_an_object_with_a_method_of_its_own_is_moved_by_it() -> None:
    batch = (Library(DENSE), Units(), Graph(DENSE))
    moved = move(batch, META, torch.float32)
    assert moved[0].read().is_meta
    assert moved[1] is batch[1]
    assert moved[2].nodes.is_meta
    assert move(batch, CPU, torch.float32)[0] is batch[0]


class NoCopy:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("not to be copied")


def test_an_object_that_cannot_be_copied_is_refused_where_it_would_have_to_be() -> None:
    thing = NoCopy(DENSE)
    assert move(thing, CPU, torch.float32) is thing
    with pytest.raises(
        InputError,
        match=r"holds a NoCopy with tensors in it, which cannot be copied.*not to be "
        r"copied",
    ):
        move(thing, CPU, torch.float64)
    assert digest_of(thing) != digest_of(NoCopy(DENSE + 1))


def test_a_tensor_that_cannot_be_converted_is_refused_by_name() -> None:
    with pytest.raises(
        InputError, match="a batch cannot be moved to cpu and float64: NotImplementedError"
    ):
        move([DENSE.to_mkldnn()], CPU, torch.float64)


def hashes() -> list[str]:
    things = [make(DENSE) for make in CONTAINERS.values()] + [make() for make in LAYOUTS.values()]
    others = [
        set("abcdefgh"),
        Colour.RED,
        Path("a"),
        {"x": {1, "y", None}},
        object(),
        threading.Lock(),
        len,
        print,
    ]
    return [*map(digest_of, [*things, *others, torch.float32, lambda: 1])]


def test_hashes_are_equal_between_processes() -> None:
    program = "from tests.numerics.test_containers import hashes; print(*hashes())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent.parent, env={**os.environ, "PYTHONHASHSEED": "1"},
    )  # fmt: skip
    assert done.stdout.split() == hashes()
    assert len(set(hashes())) == len(hashes()) - 3  # four kinds of dicts count alike


# --- packed sequences -----------------------------------------------------------------------------


def test_a_packed_sequence_keeps_its_sizes_on_the_cpu() -> None:
    packed = pack_sequence([DENSE[:1], DENSE[:3], DENSE[:2]], enforce_sorted=False)
    wide = move((packed, "x"), CPU, torch.float64)[0]
    assert isinstance(wide, PackedSequence)
    assert torch.equal(wide.data, packed.data.double())
    assert wide.batch_sizes.dtype == torch.int64
    away = move(packed, META, torch.float32)
    assert away.data.is_meta
    assert away.sorted_indices.is_meta
    assert away.batch_sizes.device == CPU
    assert move(SimpleNamespace(x=packed), META, torch.float32).x.batch_sizes.device == CPU
    assert digest_of(packed) != digest_of(
        pack_sequence([DENSE[:3], DENSE[:1], DENSE[:2]], enforce_sorted=False)
    )


# --- losses on them, against the same with dense tensors ------------------------------------------

LINKS = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)).relu()
LABELS = torch.tensor([0, 1, 2, 1, 0, 2])
SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda links: links,
    "COO": lambda links: links.to_sparse(),
    "CSR": lambda links: links.to_sparse_csr(),
    "CSC": lambda links: links.to_sparse_csc(),
}


class Convolution(nn.Module):
    """Sees the whole graph; examples are its nodes."""

    def __init__(self, links: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("links", links, persistent=False)
        self.register_buffer("inputs", DENSE.clone(), persistent=False)

    def forward(self, nodes: Tensor) -> Tensor:
        return (self.links @ torch.tanh(self.linear(self.inputs)))[nodes]


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.linear.weight.T) + self.linear.bias


def of_objects(examples: list[tuple[Tensor, Tensor]]) -> Any:
    return Graph([SimpleNamespace(row=x, label=y) for x, y in examples])


def on_objects(model: nn.Module, batch: Graph) -> Tensor:
    outputs = model(torch.stack([node.row for node in batch.nodes]))
    return F.cross_entropy(
        outputs, torch.stack([node.label for node in batch.nodes]), reduction="none"
    )


def on_rows(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


EXAMPLES = list(zip(LINKS, LABELS, strict=True))
PLAIN = Task(Rows, {"train": (LINKS, LABELS)}, {"it": Loss(F.cross_entropy)})
TASKS: dict[str, tuple[Task, Task]] = {
    **{
        f"a buffer, {name}": (
            Task(lambda make=make: Convolution(make(LINKS)), {"train": (torch.arange(6), LABELS)}, {"it": Loss(F.cross_entropy)}),
            Task(lambda: Convolution(LINKS.clone()), {"train": (torch.arange(6), LABELS)}, {"it": Loss(F.cross_entropy)}),
        )
        for name, make in SPARSE.items()
    },
    **{
        f"columns, {name}": (
            Task(Rows, {"train": {"x": make(LINKS), "y": LABELS}}, {"it": Loss(call=on_rows)}),
            PLAIN,
        )
        for name, make in SPARSE.items()
    },
    "examples with sparse rows": (
        Task(
            Rows,
            {"train": DataLoader([(x.to_sparse(), y) for x, y in EXAMPLES], collate_fn=lambda pairs: tuple(
                torch.stack(column) for column in zip(*pairs, strict=True)
            ))},
            {"it": Loss(F.cross_entropy)},
        ),
        PLAIN,
    ),
    "batches of objects": (
        Task(Rows, {"train": DataLoader(EXAMPLES, collate_fn=of_objects)}, {"it": Loss(call=on_objects)}),
        PLAIN,
    ),
    "batches of examples": (
        Task(
            Rows,
            {"train": DataLoader(EXAMPLES, collate_fn=list)},
            {"it": Loss(call=lambda model, batch: torch.cat([
                F.cross_entropy(model(x[None]), y[None], reduction="none") for x, y in batch
            ]))},
        ),
        PLAIN,
    ),
}  # fmt: skip


def evaluated(task: Task, precision: str, point: dict[str, Tensor], batch_size: int | None) -> Any:
    objective = build_objective(
        lambda: task,
        None,
        ObjectiveSettings(
            device=CPU, precision=precision, norm_stats="running", batch_size=batch_size
        ),
    )
    wide = {name: tensor.to(objective.dtype) for name, tensor in point.items()}
    objective.settle_batch_sizes(wide)
    objective.place(wide)
    check_loss(objective, "it")
    assert objective.digests == objective.digests
    return objective.evaluate(wide, ["it"])["it"]


@pytest.mark.parametrize("case", TASKS)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_loss_on_them_is_that_of_dense_tensors(case: str, batch_size: int | None) -> None:
    task, plain = TASKS[case]
    torch.manual_seed(0)
    point = {name: tensor.detach().clone() for name, tensor in plain.model().state_dict().items()}
    truth = evaluated(plain, "float64", point, 6)
    for precision, bound in (("float32", 1e-6), ("float64", 1e-14)):
        ours = evaluated(task, precision, point, batch_size)
        assert abs(ours.loss - truth.loss) <= bound
        for name, gradient in truth.gradient.items():
            assert float((ours.gradient[name].double() - gradient).abs().max()) <= bound


def test_other_values_of_a_sparse_buffer_are_another_model() -> None:
    tasks = [
        Task(lambda k=k: Convolution(k * LINKS.to_sparse()), PLAIN.data, PLAIN.losses)
        for k in (1, 2)
    ]
    settings = ObjectiveSettings(
        device=CPU, precision="float32", norm_stats="running", batch_size=2
    )
    found = [build_objective(lambda task=task: task, None, settings).digests for task in tasks]
    assert found[0].keys() == found[1].keys()
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {"tensor 'links'"}


# --- writes ---------------------------------------------------------------------------------------


class Lazy(Target):
    """Notes on itself what it was asked."""

    @property
    def area(self) -> Tensor:
        if not hasattr(self, "_area"):
            self._area = self.boxes.sum(1)
        return self._area


def written(batch: Any, write: Callable[[Any], Any]) -> str | None:
    from lca_posthoc.numerics.objective.probe import _written

    copy = copied(batch)
    write(copy)
    return _written(batch, copy, "batch")


WRITES: dict[str, tuple[Any, Callable[[Any], Any], str | None]] = {
    "nothing": ([Target(DENSE), {"x": []}], lambda batch: None, None),
    "into an object": ((Target(DENSE),), lambda batch: batch[0].boxes.add_(1), "batch[0].boxes"),
    "into a list of an object": (
        Graph([DENSE]),
        lambda batch: batch.nodes[0].add_(0),
        "batch.nodes[0]",
    ),
    "another tensor": (
        Graph(DENSE),
        lambda batch: setattr(batch, "nodes", DENSE + 1),
        "batch.nodes",
    ),
    "a note on itself": (Lazy(DENSE), lambda batch: batch.area, None),
    "a sparse one": (
        {"x": DENSE.to_sparse()},
        lambda batch: batch["x"]._values().add_(1),
        "batch['x']",
    ),
    "a sequence": (
        [pack_sequence([DENSE])],
        lambda batch: batch[0].data.mul_(1),
        "batch[0]['data']",
    ),
    "a key": ({"x": DENSE}, lambda batch: batch.update(y=1), "batch"),
    "text": ({"x": "a"}, lambda batch: batch.update(x="b"), "batch['x']"),
    "what cannot be copied": ([NoCopy(DENSE)], lambda batch: None, None),
}


@pytest.mark.parametrize("case", WRITES)
def test_a_write_is_found_wherever_it_is(case: str) -> None:
    batch, write, place = WRITES[case]
    assert written(batch, write) == place


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONTAINERS)
def test_walking_leaves_nothing_behind(kind: str) -> None:
    """No cycle of references keeps a batch until the garbage collector comes."""
    import gc
    import weakref

    inside = DENSE.clone()
    thing = CONTAINERS[kind](inside)
    gc.collect()
    gc.disable()
    try:
        size_of(thing), digest_of(thing), tensors(thing), move(thing, CPU, torch.float32)
        gone = weakref.ref(inside)
        if kind == "an object that leads back to itself":
            del thing.inner.owner
        if kind == "a dict that is its attributes":
            thing.clear()
        del thing, inside
        assert gone() is None
    finally:
        gc.enable()


def test_examples_that_do_not_collate_name_the_way_out() -> None:
    split = Split("train", [Graph(DENSE)] * 3, CPU, torch.float32)
    with pytest.raises(
        InputError,
        match=r"cannot be made into a batch: "
        r"TypeError.*DataLoader\(dataset, collate_fn=",
    ):
        split.sample(0, 2)


def test_a_copy_of_columns_is_not_needed() -> None:
    """Tensors that are as they should be are handed on, not copied."""
    moved = move(copy.copy([DENSE]), CPU, torch.float32)
    assert moved[0].data_ptr() == DENSE.data_ptr()
