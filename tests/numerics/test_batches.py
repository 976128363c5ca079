"""Data of every kind as batches: the same bits whatever serves them, in order or by group, kept or
streamed, whole or in part.
"""

from __future__ import annotations

import random
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lca_posthoc.errors import InputError
from lca_posthoc.numerics.objective import Split, batches, sources

N = 23
INPUTS, TARGETS = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 4
ITEMS = list(zip(INPUTS, TARGETS, strict=True))
CPU = torch.device("cpu")


def split_of(data: Any, subset: str | None = None, dtype: torch.dtype = torch.float32) -> Split:
    return Split("train", data, CPU, dtype, subset)


class Items(Dataset[Any]):
    """Map-style, whatever it holds."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class AtOnce(Items):
    def __getitem__(self, index: int) -> Any:
        raise AssertionError("read one by one")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.items[index] for index in indices]


class Stream(IterableDataset[Any]):
    """Calls `give` at every pass, with the number of the pass."""

    def __init__(self, give: Callable[[int], Iterable[Any]]) -> None:
        self.give, self.passes = give, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.give(self.passes))


class Readable:
    """No data set at all, but it can be read again."""

    def __iter__(self) -> Iterator[Any]:
        return iter(ITEMS)


def same(_: int) -> list[Any]:
    return ITEMS


def stacked(items: list[Any]) -> Any:
    return torch.stack([each[0] for each in items]), torch.stack([each[1] for each in items])


def hugging_face(data: Mapping[str, Any] | None = None) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict(data or {"x": INPUTS.tolist(), "y": TARGETS.tolist()})


def of_rows(rows: list[Any]) -> Any:
    return torch.tensor([each["x"] for each in rows]), torch.tensor([each["y"] for each in rows])


INDEXED: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (INPUTS, TARGETS),
    "a dict of tensors": lambda: {"x": INPUTS, "y": TARGETS},
    "a map-style data set": lambda: Items(ITEMS),
    "a data set read at once": lambda: AtOnce(ITEMS),
    "a list of examples": lambda: ITEMS,
    "a shuffling loader": lambda: DataLoader(
        TensorDataset(INPUTS, TARGETS), 5, shuffle=True, drop_last=True
    ),
    "a loader that collates": lambda: DataLoader(Items(ITEMS), 4, collate_fn=stacked),
    "a loader that cuts batches": lambda: DataLoader(
        Items(ITEMS), batch_sampler=BatchSampler(SequentialSampler(ITEMS), 5, False)
    ),
    "Hugging Face": hugging_face,
    "Hugging Face, torch": lambda: hugging_face().with_format("torch"),
    "Hugging Face, numpy": lambda: hugging_face().with_format("numpy"),
    "Hugging Face, a transform": lambda: hugging_face(
        {"x": (2 * INPUTS).tolist(), "y": TARGETS.tolist()}
    ).with_transform(lambda rows: {"x": torch.tensor(rows["x"]) / 2, "y": torch.tensor(rows["y"])}),
    "Hugging Face in a loader": lambda: DataLoader(hugging_face(), 5, collate_fn=of_rows),
}
ITERABLE: dict[str, Callable[[], Any]] = {
    "an iterable data set": lambda: Stream(same),
    "a readable": Readable,
    "a loader of an iterable": lambda: DataLoader(Stream(same), 5, collate_fn=stacked),
    "Hugging Face, iterable": lambda: hugging_face().to_iterable_dataset(),
}
EVERY = {**INDEXED, **ITERABLE}
SUBSETS = {
    None: range(N),
    "3:17": range(3, 17),
    ":4": range(4),
    "20:": range(20, N),
    "5,2,9": (5, 2, 9),
    "7:8": (7,),
}


def columns(batch: Any) -> list[Tensor]:
    return list(batch.values() if isinstance(batch, Mapping) else batch)


def assert_same(found: Iterable[tuple[int, Any]], wanted: Iterable[tuple[int, Any]]) -> None:
    for (group, batch), (label, truth) in zip(list(found), list(wanted), strict=True):
        assert group == label
        for one, other in zip(columns(batch), columns(truth), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def naive(
    positions: Iterable[int], size: int, labels: list[Any] | None = None
) -> list[tuple[int, Any]]:
    """What batches are: examples in order, group after group, cut."""
    positions = list(positions)
    labels = [labels[each] for each in positions] if labels else [0] * len(positions)
    found = []
    for group, label in enumerate(sorted(set(labels))):
        inside = [each for each, its in zip(positions, labels, strict=True) if its == label]
        for start in range(0, len(inside), size):
            index = inside[start : start + size]
            found.append((group, (INPUTS[index], TARGETS[index])))
    return found


@pytest.fixture(params=[0.25, 0.0], ids=["resident", "streamed"])
def share(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(sources, "_RESIDENT_SHARE", request.param)
    return float(request.param)


# --- the same batches, whatever serves them -------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("subset", SUBSETS)
def test_every_kind_of_data_gives_the_batches_of_tensors(
    kind: str, subset: str | None, share: float
) -> None:
    split = split_of(EVERY[kind](), subset)
    positions = list(SUBSETS[subset])
    if kind in ITERABLE and share == 0:
        positions.sort()  # it is read in its own order
    assert (split.examples, split.total, split.random) == (len(positions), N, False)
    for size in (4, 4, N, 4):
        assert_same(split.batches(size), naive(positions, size))
    start = len(positions) // 2
    assert_same([(0, split.sample(start, 99))], naive(positions[start:], 99))
    assert split.digest == split_of(EVERY[kind](), subset).digest


@pytest.mark.parametrize("kind", INDEXED)
@pytest.mark.parametrize("subset", SUBSETS)
def test_every_kind_of_data_gives_the_groups_of_tensors(
    kind: str, subset: str | None, share: float
) -> None:
    split = split_of(EVERY[kind](), subset)
    order = split.order(TARGETS)
    for size in (2, 2, 3):
        assert_same(split.batches(size, order), naive(SUBSETS[subset], size, TARGETS.tolist()))
        assert_same(split.batches(size), naive(SUBSETS[subset], size))


@pytest.mark.parametrize("kind", ITERABLE)
def test_iterable_data_that_is_kept_has_groups(kind: str) -> None:
    split = split_of(ITERABLE[kind]())
    assert_same(split.batches(2, split.order(TARGETS)), naive(range(N), 2, TARGETS.tolist()))


def test_batches_hold_every_example_once_in_the_dtype_asked_for_the_last_one_smaller(
    share: float,
) -> None:
    split = split_of((INPUTS, TARGETS), dtype=torch.float64)
    for size in (1, 7, N, N + 3, 7):
        for _ in range(2):
            found = [batch for _, batch in split.batches(size)]
            assert [len(batch[1]) for batch in found[:-1]] == [size] * (len(found) - 1)
            assert torch.equal(torch.cat([batch[0] for batch in found]), INPUTS.double())
            assert torch.equal(torch.cat([batch[1] for batch in found]), TARGETS)


def test_text_and_numbers_beside_tensors_are_handed_on() -> None:
    split = split_of(hugging_face({"x": INPUTS.tolist(), "text": [str(each) for each in range(N)]}))
    assert split.sample(0, 2)["text"] == ["0", "1"]


# --- kept or streamed -----------------------------------------------------------------------------


class Example:
    """No tensor, so that it is handed on as it is."""

    def __init__(self, index: int) -> None:
        self.index = index


class Counting(Items):
    """Makes examples when they are read, and knows how many are alive and how often any was
    read.
    """

    def __init__(
        self, make: Callable[[int], Any] = lambda index: torch.full((3,), float(index))
    ) -> None:
        self.alive, self.most, self.reads, self.make = weakref.WeakSet[Any](), 0, 0, make

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Any:
        item = self.make(index)
        self.alive.add(item)
        self.most, self.reads = max(self.most, len(self.alive)), self.reads + 1
        return item


@pytest.mark.parametrize("room", [0, 200])
def test_data_larger_than_its_room_is_never_held_entirely(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "room_on", lambda device: room * sys.getsizeof(Example(0)))
    data = Counting(Example)
    # a batch is its examples, so that they live as long as it does
    split = split_of(DataLoader(data, collate_fn=list))
    for passes in (1, 2):
        for taken, (_, batch) in enumerate(split.batches(10)):
            assert [each.index for each in batch] == list(range(10 * taken, 10 * taken + 10))
            while data.reads < 400 * (passes - 1) + min(400, 10 * (taken + 3)):
                time.sleep(0)  # the thread reads two batches ahead, however slow this is
        assert data.reads == 400 * passes
        assert data.most <= (room if passes == 1 else 0) + 10 * 5
        data.most = 0


def test_resident_batches_are_read_once_group_by_group() -> None:
    data = Counting()
    split = split_of(data)
    order = split.order([index % 4 for index in range(400)])
    for only, reads in (
        (range(1, 2), 100),
        (range(1, 3), 200),
        (range(1, 3), 200),
        (None, 400),
        (None, 400),
    ):
        found = list(split.batches(7, order, only))
        assert data.reads == reads
        assert [group for group, _ in found] == sorted(group for group, _ in found)
        assert {group for group, _ in found} == set(only or range(4))
        assert all(set((batch[:, 0] % 4).tolist()) == {group} for group, batch in found)


def test_what_is_resident_never_exceeds_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Counting()
    monkeypatch.setattr(batches, "room_on", lambda device: 250 * 12)
    split = split_of(data)
    order = split.order([index % 4 for index in range(400)])
    list(split.batches(10, order))
    data.reads = 0
    list(split.batches(10, order))
    assert data.reads == 200  # of four groups of 100 examples, two fit


def test_a_pass_that_is_left_early_reads_no_more_and_leaves_the_next_one_whole(
    share: float,
) -> None:
    data = Counting()
    split = split_of(data)
    passing = split.batches(2)
    next(passing)
    passing.close()
    reads = data.reads
    assert reads <= 2 * 4  # the batch that was wanted, two ahead, and one that was begun
    assert len(list(split.batches(2))) == 200
    assert data.reads == reads + 400


def test_every_pass_is_read_by_the_one_thread_that_reads() -> None:
    readers = set[threading.Thread]()

    def make(index: int) -> Tensor:
        readers.add(threading.current_thread())
        return torch.full((3,), float(index))

    before = set(threading.enumerate())
    for _ in range(2):
        split = split_of(Counting(make))
        list(zip(split.batches(7), split.batches(5), strict=False))
        split.sample(0, 3)
        assert split.digest == split_of(Counting()).digest
    (reader,) = readers
    assert reader is not threading.current_thread()
    assert reader.daemon
    assert set(threading.enumerate()) - before <= {reader}


def test_two_passes_at_once_do_not_disturb_each_other(share: float) -> None:
    split = split_of(Items(ITEMS))
    order = split.order(TARGETS)
    for other in (
        lambda: split.batches(2),
        lambda: split.batches(2, order),
        lambda: split.batches(3),
    ):
        one, two = zip(*zip(split.batches(2), other(), strict=False), strict=True)
        assert_same(one, naive(range(N), 2)[: len(one)])
        assert_same(two, list(other())[: len(two)])


class Damaged(Items):
    def __getitem__(self, index: int) -> Any:
        if index == 11:
            raise self.error
        return super().__getitem__(index)

    error: BaseException = ValueError("image 11 is damaged")


def test_an_error_on_the_way_surfaces_after_the_batches_before_it(share: float) -> None:
    passing = split_of(Damaged(ITEMS)).batches(4)
    assert_same([next(passing), next(passing)], naive(range(8), 4))
    with pytest.raises(
        InputError,
        match=r"4 examples of split 'train', from 8 to 11, .*ValueError: image 11 is "
        r"damaged",
    ):
        next(passing)


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), InputError("asked for"), KeyboardInterrupt()]
)
def test_errors_that_say_enough_surface_unchanged(error: BaseException) -> None:
    data = Damaged(ITEMS)
    data.error = error
    with pytest.raises(type(error)) as caught:
        list(split_of(data).batches(4))
    assert caught.value is error


def test_no_gradient_flows_into_data(share: float) -> None:
    split = split_of((INPUTS.clone().requires_grad_(), TARGETS))
    assert not split.sample(0, 2)[0].requires_grad
    assert not any(batch[0].requires_grad for _, batch in split.batches(4))


# --- iterable data --------------------------------------------------------------------------------


def shuffled(_: int) -> list[Any]:
    return random.sample(ITEMS, N)


@pytest.mark.parametrize(
    "give",
    [
        shuffled,
        lambda count: [] if count > 1 else ITEMS,
        lambda count: [(x + count, y) for x, y in ITEMS],
    ],
)
def test_iterable_data_that_differs_when_read_again_is_refused(
    give: Callable[[int], Any], share: float
) -> None:
    with pytest.raises(
        InputError,
        match=r"split 'train' yields other examples when it is read again\. Seed the "
        r"generator",
    ):
        split_of(Stream(give))


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda count: ITEMS[: N - (count > 2)], "fewer examples than the 23 of its first pass"),
        (lambda count: ITEMS + ITEMS[: count > 2], "more examples than the 23 of its first pass"),
        (
            lambda count: ITEMS[:-1] + ITEMS[: 1 + (count > 3)][-1:],
            "other examples than the 23 of its first pass",
        ),
    ],
)
def test_a_later_pass_that_differs_is_refused(
    give: Callable[[int], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_RESIDENT_SHARE", 0)
    split = split_of(Stream(give))
    with pytest.raises(InputError, match=message):  # noqa: PT012 - in one of two passes
        list(split.batches(4))
        list(split.batches(4))


def test_data_that_cannot_be_kept_has_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_RESIDENT_SHARE", 0)
    with pytest.raises(InputError, match=r"too large to keep in memory.*Give a map-style Dataset"):
        split_of(Stream(same)).order(TARGETS)


def test_a_random_sample_of_streamed_data_is_the_one_of_kept_data_in_its_own_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = split_of(Stream(same), "0.4@1")
    positions = batches.positions_of_subset("0.4@1", N)
    assert positions is not None
    assert_same(kept.batches(4), naive(positions.tolist(), 4))
    monkeypatch.setattr(sources, "_RESIDENT_SHARE", 0)
    assert_same(split_of(Stream(same), "0.4@1").batches(4), naive(sorted(positions.tolist()), 4))


def test_an_error_inside_iterable_data_names_the_split() -> None:
    def give(_: int) -> Iterator[Any]:
        yield ITEMS[0]
        raise OSError("shard 2 is gone")

    with pytest.raises(InputError, match="split 'train' cannot be read: OSError: shard 2 is gone"):
        split_of(Stream(give))


# --- groups ---------------------------------------------------------------------------------------

NAMES = ["b", "a", "c"]
GROUPINGS: dict[str, tuple[Any, list[Any]]] = {
    "a tensor": (TARGETS, TARGETS.tolist()),
    "an array of small integers": (TARGETS.numpy().astype(np.int8), TARGETS.tolist()),
    "a list of integers": (
        [-each for each in TARGETS.tolist()],
        [-each for each in TARGETS.tolist()],
    ),
    "strings": ([NAMES[each % 3] for each in range(N)], [NAMES[each % 3] for each in range(N)]),
    "an array of strings": (
        np.array(NAMES)[np.arange(N) % 3],
        [NAMES[each % 3] for each in range(N)],
    ),
    "bools": (TARGETS == 1, [int(each == 1) for each in TARGETS.tolist()]),
    "bools and integers": ([True, 0, 2] * 7 + [False, 1], [1, 0, 2] * 7 + [0, 1]),
    "numpy scalars": (list(TARGETS.numpy()), TARGETS.tolist()),
    "scalar tensors": (list(TARGETS), TARGETS.tolist()),
    "a function giving a tensor": (
        lambda inputs, targets: targets % 2,
        [each % 2 for each in TARGETS.tolist()],
    ),
    "a function giving an array": (
        lambda inputs, targets: targets.numpy() > 1,
        [each > 1 for each in TARGETS.tolist()],
    ),
    "a function giving strings": (
        lambda inputs, targets: [NAMES[each % 3] for each in targets],
        [NAMES[each % 3] for each in TARGETS.tolist()],
    ),
}


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("subset", ["2:21", None, "0.5@3"])
def test_groups_are_what_they_are_called(
    grouping: str, subset: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_GROUPED_AT_ONCE", 5)
    group_by, labels = GROUPINGS[grouping]
    split = split_of((INPUTS, TARGETS), subset)
    order = split.order(group_by)
    chosen = batches.positions_of_subset(subset, N)
    positions = range(N) if chosen is None else chosen.tolist()
    assert order.labels == sorted({labels[each] for each in positions})
    assert {type(each) for each in order.labels} <= {int, str}
    assert all(each.dtype == torch.int64 for each in order.members)
    assert sum(order.counts) == split.examples
    assert_same(split.batches(2, order), naive(positions, 2, labels))


def test_a_dict_batch_is_handed_to_group_by_as_it_is_on_the_cpu() -> None:
    split = split_of({"x": INPUTS, "y": TARGETS}, dtype=torch.float64)
    given = []
    assert split.order(lambda batch: given.append(batch) or batch["y"]).labels == [0, 1, 2, 3]
    assert given[0]["x"].dtype == torch.float32


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    size=st.integers(1, 12),
    keep=st.booleans(),
    data=st.data(),
)
def test_groups_cut_the_examples_into_batches_of_one_label_each_and_keep_their_order(
    labels: list[int], size: int, keep: bool, data: st.DataObject
) -> None:
    split = split_of((torch.arange(len(labels)), torch.tensor(labels)))
    order = split.order(labels)
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(order.labels))] * 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "room_on", lambda device: 10**9 if keep else 0)
        only = list(split.batches(size, order, range(first, last)))
        found = list(split.batches(size, order))
    assert sorted(torch.cat([batch[0] for _, batch in found]).tolist()) == list(range(len(labels)))
    assert all(set(batch[1].tolist()) == {order.labels[group]} for group, batch in found)
    for group in range(len(order.labels)):
        inside = [batch[0] for its, batch in found if its == group]
        assert torch.equal(torch.cat(inside), order.members[group])
        assert [len(each) for each in inside[:-1]] == [size] * (len(inside) - 1)
    assert_same(only, [each for each in found if first <= each[0] < last])


BAD_GROUPS: dict[str, tuple[Any, str]] = {
    "floats": (TARGETS.double(), "labels of type float"),
    "NaN": ([float("nan")] * N, "labels of type float"),
    "bfloat16": (TARGETS.bfloat16(), "labels of type float"),
    "mixed": ([1] * (N - 1) + ["a"], "labels of type int and str"),
    "None": ([None] * N, "labels of type NoneType"),
    "elements, too few": (torch.zeros(N - 1, 2, dtype=torch.int64), "labels of shape .* for 23"),
    "elements, floats": (torch.zeros(N, 2), "labels of type float32"),
    "elements, none": (torch.zeros(N, 0, dtype=torch.int64), "labels of shape"),
    "a function of elements, too few": (
        lambda inputs, targets: inputs[1:] > 0,
        "labels of shape .* for 23",
    ),
    "no dimension": (torch.tensor(3), "a Tensor, not a list"),
    "too few": (TARGETS[:9], "9 labels for 23 examples"),
    "a number": (3, "a int, not a list"),
    "a function of nothing": (lambda *batch: None, "a NoneType, not a list"),
    "a function of a word": (lambda *batch: "a" * N, "a str, not a list"),
    "a function of one": (lambda inputs, targets: targets[:1], "1 labels for 23 examples"),
    "a function of floats": (lambda inputs, targets: targets / 2, "labels of type float"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_groups_that_are_none_are_refused(case: str) -> None:
    group_by, message = BAD_GROUPS[case]
    with pytest.raises(
        InputError,
        match=f"group_by on split 'train' gave {message}.*one integer or string for every example",
    ):
        split_of((INPUTS, TARGETS)).order(group_by)


def test_an_error_of_group_by_is_shown() -> None:
    with pytest.raises(InputError, match="group_by on split 'train' failed: KeyError: 0"):
        split_of((INPUTS, TARGETS)).order(lambda inputs, targets: {}[0])


def by_sum(rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Sorted within the batch, as `pack_padded_sequence` wants it by length."""
    return stacked(sorted(rows, key=lambda row: -float(row[0].sum())))


def pairs(rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    assert len(rows) > 1, "contrasts"
    return stacked(rows)


def rare(inputs: Tensor, targets: Tensor) -> list[str]:
    """Every fifth example has another label than all the others."""
    few = {tuple(each) for each in INPUTS[::5].tolist()}
    return ["rare" if tuple(each) in few else "common" for each in inputs.tolist()]


@pytest.mark.parametrize("subset", [None, "2:21", "0.5@3"])
@pytest.mark.parametrize(
    "group_by", [lambda inputs, targets: targets, rare], ids=["classes", "a rare label"]
)
def test_a_function_of_batches_that_are_reordered_is_refused_and_a_list_is_not(
    group_by: Callable[..., Any], subset: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_ALONE", 4)
    split = split_of(DataLoader(Items(ITEMS), collate_fn=by_sum), subset)
    with pytest.raises(
        InputError,
        match=r"group_by on split 'train' gives labels in another order.*whole split.* "
        r"as a list",
    ):
        split.order(group_by)
    labels = group_by(INPUTS, TARGETS)
    order = split.order(labels)
    chosen = batches.positions_of_subset(subset, N)
    positions = range(N) if chosen is None else chosen.tolist()
    for label, members in zip(order.labels, order.members, strict=True):
        assert [positions[at] for at in members.tolist()] == [
            at for at in positions if labels[at] == label
        ]


def test_a_label_that_depends_on_the_examples_beside_it_is_refused() -> None:
    with pytest.raises(InputError, match="a label depends on other examples of the batch"):
        split_of((INPUTS, TARGETS)).order(
            lambda inputs, targets: inputs[:, 0] > inputs[:, 0].median()
        )


def test_examples_that_cannot_be_collated_alone_have_groups() -> None:
    split = split_of(DataLoader(Items(ITEMS), collate_fn=pairs))
    assert split.order(lambda inputs, targets: targets).counts == torch.bincount(TARGETS).tolist()


# --- subsets --------------------------------------------------------------------------------------


def test_a_random_subset_is_drawn_by_its_seed_in_random_order() -> None:
    one, again, other = (
        batches.positions_of_subset(text, 1000) for text in ("0.1@7", "0.1@7", "1e-1@8")
    )
    assert one is not None
    assert again is not None
    assert other is not None
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(one) == len(set(one.tolist())) == len(other) == 100
    assert one.tolist() != sorted(one.tolist())
    assert split_of((INPUTS, TARGETS), "0.5@1").random


@pytest.mark.parametrize(
    ("subset", "problem"),
    [
        ("", "is not in a known form"),
        ("first", "is not in a known form"),
        ("-3:", "is not in a known form"),
        ("1:9:2", "is not in a known form"),
        ("1,2,", "is not in a known form"),
        ("0.5", "is not in a known form"),
        ("0.5@-1", "is not in a known form"),
        ("nan@1", "is not in a known form"),
        ("5:5", "is empty or goes beyond the 23 examples"),
        ("9:2", "is empty or goes beyond the 23 examples"),
        ("9:24", "is empty or goes beyond the 23 examples"),
        ("23:", "is empty or goes beyond the 23 examples"),
        ("1,23", "repeats a position or goes beyond the 23 examples"),
        ("1,2,1", "repeats a position or goes beyond the 23 examples"),
        ("0@1", "is not a fraction between 0 and 1"),
        ("1.0@1", "is not a fraction between 0 and 1"),
        ("0.01@1", "at least one of 23 examples"),
    ],
)
def test_subsets_that_choose_nothing_are_refused(subset: str, problem: str) -> None:
    with pytest.raises(
        InputError, match=f"--subset '{re.escape(subset)}' .*{problem}.*A:B.*I,J,K.*FRACTION@SEED"
    ):
        split_of((INPUTS, TARGETS), subset)


# --- the digest -----------------------------------------------------------------------------------


def test_the_digest_tells_data_apart_and_not_its_container() -> None:
    digest = split_of((INPUTS, TARGETS)).digest
    assert split_of((INPUTS.clone(), TARGETS.clone())).digest == digest
    assert split_of(Items(ITEMS)).digest == split_of(Stream(same)).digest == digest
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    others = [
        (INPUTS[order], TARGETS[order]),
        (INPUTS, TARGETS.int()),
        (INPUTS.view(N, 1, 3), TARGETS),
        {"x": INPUTS, "y": TARGETS},
        {"a": INPUTS, "y": TARGETS},
        (INPUTS[:-1], TARGETS[:-1]),
        DataLoader(Items(ITEMS), collate_fn=lambda items: [*stacked(items), "text"]),
        DataLoader(Items(ITEMS), collate_fn=lambda items: [*stacked(items), np.ones(2)]),
        DataLoader(Items(ITEMS), collate_fn=lambda items: [*stacked(items), object()]),
    ]
    assert len({digest, *(split_of(each).digest for each in others)}) == 1 + len(others)
    assert split_of(others[-1]).digest == split_of(others[-1]).digest


def test_the_digest_knows_how_many_examples_there_are_and_the_subset() -> None:
    long = torch.zeros(600, 2)
    digests = {split_of((long[:count],)).digest for count in (300, 301)} | {
        split_of((long,), "0:299").digest
    }
    assert len(digests) == 3
    assert split_of((long,)).digest != split_of((long.int(),)).digest


# --- what is refused ------------------------------------------------------------------------------


def loader(**options: Any) -> Callable[[], Any]:
    return lambda: DataLoader(Items(ITEMS), **options)


class Halves(BatchSampler):
    """A batch sampler of somebody's own."""


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a number": (lambda: 7, r"is a int\. Give \(inputs, targets\) tensors.*map-style Dataset"),
    "an iterator": (lambda: iter(ITEMS), "is a list_iterator, which can be read only once"),
    "a generator": (
        lambda: (each for each in ITEMS),
        "is a generator, which can be read only once",
    ),
    "nothing": (lambda: (), r"is a tuple\. Give"),
    "a list of columns": (lambda: [INPUTS, TARGETS], "is a list of Tensor"),
    "columns of arrays": (
        lambda: {"x": INPUTS.numpy(), "y": TARGETS},
        "is a dict of Tensor, ndarray",
    ),
    "columns without an extent": (lambda: (INPUTS, torch.tensor(1)), "is a tuple of Tensor"),
    "a set": (lambda: {1, 2}, "is a set"),
    "a class": (lambda: Items, "is a type"),
    "several data sets": (
        lambda: pytest.importorskip("datasets").DatasetDict({"train": hugging_face()}),
        "is a DatasetDict of Dataset",
    ),
    "lengths": (
        lambda: {"x": INPUTS, "y": TARGETS[:9]},
        r"different lengths: \[9, 23\]\. .*one "
        r"target per input",
    ),
    "no examples": (lambda: (INPUTS[:0], TARGETS[:0]), "is empty"),
    "no iterable examples": (lambda: Stream(lambda count: []), "is empty"),
    "weights": (
        loader(sampler=WeightedRandomSampler([1.0] * N, N)),
        "whose WeightedRandomSampler selects or weights",
    ),
    "indices": (
        loader(sampler=SubsetRandomSampler([1, 2])),
        r"SubsetRandomSampler.*Subset\(dataset, indices\)",
    ),
    "replacement": (
        loader(sampler=RandomSampler(ITEMS, replacement=True)),
        "whose RandomSampler selects",
    ),
    "a draw": (loader(sampler=RandomSampler(ITEMS, num_samples=5)), "whose RandomSampler selects"),
    "the first of them": (
        loader(sampler=SequentialSampler(range(5))),
        "whose SequentialSampler selects",
    ),
    "batches of indices": (
        loader(batch_sampler=BatchSampler(SubsetRandomSampler([1, 2]), 2, False)),
        "whose SubsetRandomSampler",
    ),
    "batches of somebody's own": (
        loader(batch_sampler=Halves(SequentialSampler(ITEMS), 2, False)),
        "whose Halves selects or weights examples.*without a sampler",
    ),
    "batches already": (loader(batch_size=None), "DataLoader with batch_size=None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_is_not_served_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(InputError, match=f"split 'train' .*{message}"):
        split_of(make())


@pytest.mark.parametrize("format_", ["torch", "numpy", None])
def test_examples_of_different_shapes_are_refused_with_the_way_out(format_: str | None) -> None:
    ragged = hugging_face({"x": [[1], [1, 2]], "y": [0, 1]}).with_format(format_)
    with pytest.raises(
        InputError,
        match=r"column 'x' of split 'train' .*Pad them, or give DataLoader\(dataset, "
        r"collate_fn",
    ):
        split_of(ragged).sample(0, 2)
    padded = DataLoader(
        ragged, collate_fn=lambda rows: default_collate([int(row["y"]) for row in rows])
    )
    assert split_of(padded).sample(0, 2).tolist() == [0, 1]
