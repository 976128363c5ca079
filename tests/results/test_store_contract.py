"""Zarr's own tests of stores, on the store through which it reads runs.

An override below says where ours is narrower than the contract, and why; everything else of the
suite runs as zarr wrote it.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.buffer import cpu, default_buffer_prototype
from zarr.testing.store import StoreTests

import lca_posthoc
from lca_posthoc.errors import LCAError
from lca_posthoc.results import read_manifest
from lca_posthoc.results.chunks import CheckedStore
from lca_posthoc.results.commits import Commits
from lca_posthoc.results.files import read_json, seal, write_json
from lca_posthoc.results.metadata import metadata_files
from tests.helpers.cli import marker, record, write_task

PARTS = ("steps", "tensors")
CHUNKS = ("steps/residual/c/0", "steps/residual/c/2", "tensors/helping/c/1/0")
METADATA = "steps/residual/zarr.json"
RANGES = [
    (b"\x01\x02\x03\x04", None),
    (b"\x01\x02\x03\x04", RangeByteRequest(1, 4)),
    (b"\x01\x02\x03\x04", OffsetByteRequest(1)),
    (b"\x01\x02\x03\x04", SuffixByteRequest(1)),
    (b"\x01\x02\x03\x04", SuffixByteRequest(0)),
    (b"\x01\x02\x03\x04", SuffixByteRequest(9)),
    (b"", None),
]
PROTOTYPE = default_buffer_prototype()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three spans of two segments."""
    root = tmp_path_factory.mktemp("contract")
    record(root / "ck")
    task = write_task(root / "task.py")
    lca_posthoc.run(root / "ck", task, cluster="inline", span=2, out=root / "run.lca")
    return root / "run.lca"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run.lca")
    return tmp_path / "run.lca"


def of(data: bytes) -> cpu.Buffer:
    return cpu.Buffer.from_bytes(data)


async def listed(keys: AsyncIterator[str]) -> list[str]:
    return sorted([key async for key in keys])


class Contract(StoreTests[Any, cpu.Buffer]):
    """What follows from the metadata of a run, which the store holds in memory.

    A test of the suite that does not apply is None, so that nothing is skipped.
    """

    buffer_cls = cpu.Buffer

    # nothing is ever deleted, see the test of that name
    test_delete = None
    test_delete_dir = None
    test_delete_nonexistent_key_does_not_raise = None
    # zarr asks for these only where a store has them; ours have none
    test_get_sync = None
    test_get_sync_missing = None
    test_set_sync = None
    test_delete_sync = None
    test_delete_sync_missing = None

    @pytest.fixture
    def store_kwargs(self, run: Path) -> dict[str, Any]:
        return {"path": run, "manifest": read_manifest(run), "loss": "train", "parts": PARTS}

    @pytest.fixture
    def known(self, store_kwargs: dict[str, Any]) -> dict[str, bytes]:
        manifest, loss, parts = (store_kwargs[name] for name in ("manifest", "loss", "parts"))
        return dict(metadata_files(manifest, loss, parts))

    async def get(self, store: Any, key: str) -> cpu.Buffer:
        return of((store._place / key).read_bytes())

    def test_store_repr(self, store: Any) -> None:
        assert type(store).__name__ in repr(store)

    def test_store_supports_listing(self, store: Any) -> None:
        assert store.supports_listing

    async def test_exists(self, store: Any) -> None:
        """Keys are those of a run, which has no "foo"."""
        assert not await store.exists("foo")
        assert await store.exists(METADATA)
        assert await store.exists(CHUNKS[0])

    async def test_nothing_is_ever_deleted(self, store: Any) -> None:
        """In place of three tests of the suite, which are for stores that delete."""
        before = (store._place / CHUNKS[0]).read_bytes()
        with pytest.raises((ValueError, NotImplementedError)):
            await store.delete(CHUNKS[0])
        with pytest.raises(NotImplementedError):
            await store.delete_dir("steps")
        assert (store._place / CHUNKS[0]).read_bytes() == before

    async def test_clear(self, store: Any) -> None:
        """The suite asks every store to empty itself; a run is not emptied through zarr."""
        with pytest.raises(NotImplementedError):
            await store.clear()

    # What is listed is the metadata alone: names of chunks follow from it, and a listing of a
    # directory with a million chunks is never needed.

    async def test_is_empty(self, store: Any) -> None:
        for prefix, is_empty in {"": False, "steps": False, "steps/": False, "st": True}.items():
            assert await store.is_empty(prefix) is is_empty
        assert await store.is_empty("spam/")

    async def test_list(self, store: Any, known: dict[str, bytes]) -> None:
        assert await listed(store.list()) == sorted(known)

    async def test_list_prefix(self, store: Any, known: dict[str, bytes]) -> None:
        for prefix in ("", "steps/", "steps/residual/", "spam/"):
            expected = sorted(key for key in known if key.startswith(prefix))
            assert await listed(store.list_prefix(prefix)) == expected

    async def test_list_empty_path(self, store: Any, known: dict[str, bytes]) -> None:
        assert await listed(store.list_prefix("")) == await listed(store.list()) == sorted(known)

    async def test_list_dir(self, store: Any, known: dict[str, bytes]) -> None:
        assert await listed(store.list_dir("")) == sorted(PARTS)
        for root in ("steps", "steps/residual", "steps/step/c", "spam"):
            inside = (key.removeprefix(f"{root}/") for key in known if key.startswith(f"{root}/"))
            expected = sorted({key.partition("/")[0] for key in inside})
            assert await listed(store.list_dir(root)) == expected
            assert await listed(store.list_dir(f"{root}/")) == expected

    async def test_getsize_prefix(self, store: Any, known: dict[str, bytes]) -> None:
        expected = sum(len(data) for key, data in known.items() if key.startswith("steps"))
        assert await store.getsize_prefix("steps") == expected

    # Metadata is what follows from run.json, so a test cannot choose its bytes.

    async def test_get_bytes(self, store: Any, known: dict[str, bytes]) -> None:
        for key, data in known.items():
            assert (await store.get(key, PROTOTYPE)).to_bytes() == data

    test_get_bytes_sync = None  # as `test_get_bytes`: it would choose the bytes of metadata
    test_get_json = None  # as `test_get_bytes`: it would choose the bytes of metadata
    test_get_json_sync = None  # as `test_get_bytes`: it would choose the bytes of metadata


class AsZarrOpens(CheckedStore):
    """`CheckedStore` with the argument by which the suite asks for one that is read-only; ours is
    never anything else.
    """

    def __init__(
        self, path: Path, manifest: Any, loss: str, parts: Any, read_only: bool = True
    ) -> None:
        assert read_only
        super().__init__(path, manifest, loss, parts)


class TestCheckedStore(Contract):
    """The store results are read through: read-only, and of committed chunks alone."""

    store_cls = AsZarrOpens

    async def set(self, store: Any, key: str, value: cpu.Buffer) -> None:
        """Put another chunk in the place of one, and commit it as a writer would."""
        file = store._place / key
        file.write_bytes(value.to_bytes())
        place = marker(store._root, "train", int(key.partition("/c/")[2].partition("/")[0]))
        document = read_json(place)
        name = file.relative_to(store._root).as_posix()
        files = {**document["files"], name: seal(file, durable=False)}  # type: ignore[dict-item]
        write_json(place, {**document, "files": files}, durable=False)

    def test_store_supports_writes(self, store: Any) -> None:
        assert not store.supports_writes

    def test_store_read_only(self, store: Any) -> None:
        """The suite expects a store that can be written to."""
        assert store.read_only
        with pytest.raises(AttributeError):
            store.read_only = False

    @pytest.mark.parametrize("read_only", [True])
    async def test_store_open_read_only(self, open_kwargs: dict[str, Any], read_only: bool) -> None:
        """The suite opens one for writing as well, which there is not."""
        await super().test_store_open_read_only(open_kwargs, read_only)

    async def test_serializable_store(self, store: Any) -> None:
        """The suite writes through the copy."""
        copy = pickle.loads(pickle.dumps(store))
        assert copy == store
        assert copy.read_only
        await self.set(store, CHUNKS[0], of(b"\x01\x02\x03\x04"))
        assert (await copy.get(CHUNKS[0], PROTOTYPE)).to_bytes() == b"\x01\x02\x03\x04"

    # Keys are those of chunks the run has: others hold nothing.

    @pytest.mark.parametrize("key", CHUNKS)
    @pytest.mark.parametrize(("data", "byte_range"), RANGES)
    async def test_get(self, store: Any, key: str, data: bytes, byte_range: ByteRequest) -> None:
        await self.set(store, key, of(data))
        observed = (await store.get(key, PROTOTYPE, byte_range)).to_bytes()
        match byte_range:
            case SuffixByteRequest(suffix):
                assert observed == data[len(data) - min(suffix, len(data)) :]
            case RangeByteRequest(start, end):
                assert observed == data[start:end]
            case OffsetByteRequest(offset):
                assert observed == data[offset:]
            case None:
                assert observed == data

    async def test_get_not_open(self, store_not_open: Any) -> None:
        assert not store_not_open._is_open
        await self.set(store_not_open, CHUNKS[0], of(b"\x01\x02\x03\x04"))
        observed = await store_not_open.get(CHUNKS[0], PROTOTYPE)
        assert observed.to_bytes() == b"\x01\x02\x03\x04"

    async def test_get_raises(self, store: Any) -> None:
        for key in (CHUNKS[0], METADATA):
            with pytest.raises(ValueError, match=r"Unexpected byte_range, got.*"):
                await store.get(key, PROTOTYPE, byte_range=(0, 2))

    async def test_get_many(self, store: Any) -> None:
        for key in CHUNKS:
            await self.set(store, key, of(key.encode()))
        requests = ((key, PROTOTYPE, None) for key in CHUNKS)
        observed = {key: data.to_bytes() async for key, data in store._get_many(requests)}
        assert observed == {key: key.encode() for key in CHUNKS}

    @pytest.mark.parametrize(
        "key_ranges",
        [
            [],
            [(CHUNKS[0], RangeByteRequest(0, 2))],
            [(CHUNKS[1], RangeByteRequest(0, 2)), (CHUNKS[2], None)],
            [
                (CHUNKS[0], RangeByteRequest(0, 2)),
                (CHUNKS[1], SuffixByteRequest(2)),
                (CHUNKS[2], OffsetByteRequest(2)),
            ],
        ],
    )
    async def test_get_partial_values(
        self, store: Any, key_ranges: list[tuple[str, ByteRequest]]
    ) -> None:
        await super().test_get_partial_values(store, key_ranges)

    @pytest.mark.parametrize("key", CHUNKS)
    @pytest.mark.parametrize("data", [b"\x01\x02\x03\x04", b""])
    async def test_getsize(self, store: Any, key: str, data: bytes) -> None:
        await super().test_getsize(store, key, data)

    async def test_what_no_marker_speaks_for_is_an_error(self, store: Any, run: Path) -> None:
        """Beyond the contract, by which a chunk that is missing is None and reads as fill."""
        (store._place / CHUNKS[0]).write_bytes(b"\x01\x02\x03\x04")
        with pytest.raises(LCAError, match="differs from the committed one"):
            await store.get(CHUNKS[0], PROTOTYPE)
        (store._place / CHUNKS[1]).unlink()
        with pytest.raises(LCAError, match="a chunk is missing"):
            await store.get(CHUNKS[1], PROTOTYPE)
        Commits(run, read_manifest(run), "train").marker(1).unlink()
        with pytest.raises(LCAError, match="is not committed any more"):
            await store.get(CHUNKS[2], PROTOTYPE)

    test_set = None  # read-only
    test_set_not_open = None  # read-only
    test_set_many = None  # read-only
    test_set_if_not_exists = None  # read-only


def test_it_is_a_store_of_zarr_and_no_wrapper_of_one() -> None:
    assert issubclass(CheckedStore, Store)
    assert CheckedStore.__module__ == "lca_posthoc.results.chunks"
