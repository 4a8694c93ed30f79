"""``.metadata``: every spelling that a torch release has written reads the same."""

from __future__ import annotations

import enum
import io
import pickle
import pickletools
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldProperties
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dcpconv.core.catalog import Extent
from dcpconv.core.dtypes import BY_NAME
from dcpconv.formats.dcp.metadata import ListedTensor, MetadataContents, StoredChunk, read_metadata
from dcpconv.formats.dcp.metadata_writer import WrittenObject, WrittenTensor, write_metadata


def sample() -> Any:
    """Two row chunks of one tensor, and an object."""
    sizes = [torch.Size([2, 3]), torch.Size([1, 3])]
    offsets = [torch.Size([0, 0]), torch.Size([2, 0])]
    metadata = Metadata(
        state_dict_metadata={
            "model.w": TensorStorageMetadata(
                TensorProperties(dtype=torch.bfloat16),
                torch.Size([3, 3]),
                [ChunkStorageMetadata(o, s) for o, s in zip(offsets, sizes, strict=True)],
            ),
            "step": BytesStorageMetadata(),
        },
        planner_data={"model.w": ("model", "w"), "step": ("step",)},
        storage_data={
            MetadataIndex("model.w", offsets[0], 0): _StorageInfo("__0_0.distcp", 900, 800),
            MetadataIndex("model.w", offsets[1], 1): _StorageInfo("__1_0.distcp", 0, 790),
            MetadataIndex("step"): _StorageInfo("__0_0.distcp", 0, 900),
        },
        storage_meta=StorageMeta(checkpoint_id="somewhere", save_id="x"),
    )
    metadata.version = "1.0.0"  # which torch 2.6 has not got
    # A round trip, because torch.Size([0, 0]) twice would be one object here and two in real life.
    return pickle.loads(pickle.dumps(metadata))


EXPECTED = MetadataContents(
    tensors={
        "model.w": ListedTensor(
            BY_NAME["bfloat16"],
            (3, 3),
            (
                StoredChunk((0, 0), (2, 3), Extent("__0_0.distcp", 900, 800)),
                StoredChunk((2, 0), (1, 3), Extent("__1_0.distcp", 0, 790)),
            ),
        )
    },
    objects={"step": Extent("__0_0.distcp", 0, 900)},
    paths={"model.w": ("model", "w")},
    is_nesting_known=True,
    problems=(),
)


def as_written_today(_metadata: Any) -> None: ...


def without_version(metadata: Any) -> None:
    del metadata.__dict__["version"]


def without_storage_meta(metadata: Any) -> None:
    del metadata.__dict__["storage_meta"]


def with_a_path_object(metadata: Any) -> None:
    metadata.storage_meta.checkpoint_id = PurePosixPath("/somewhere/else")


def with_fields_of_another_writer(metadata: Any) -> None:
    metadata.mcore_data = {"model.w": {"order": [1, 2]}}


def with_properties_of_torch_2_0(metadata: Any) -> None:
    metadata.state_dict_metadata["model.w"].properties = OldProperties(dtype=torch.bfloat16)


def with_empty_transforms(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.transform_descriptors = []


SPELLINGS = [
    as_written_today,
    without_version,
    without_storage_meta,
    with_a_path_object,
    with_fields_of_another_writer,
    with_properties_of_torch_2_0,
    with_empty_transforms,
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("change", SPELLINGS)
def test_every_spelling_reads_the_same(change: Any, protocol: int) -> None:
    metadata = sample()
    change(metadata)
    assert read_metadata(pickle.dumps(metadata, protocol), where="here") == EXPECTED


class _EnumsByName(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, enum.Enum):
            return getattr, (type(obj), obj.name)
        return NotImplemented


def test_members_of_an_enum_by_name() -> None:
    """As Python 3.11.0 to 3.11.4 wrote them."""
    file = io.BytesIO()
    _EnumsByName(file, 4).dump(sample())
    assert b"TORCH_CONTIGUOUS_FORMAT" in file.getvalue()
    assert read_metadata(file.getvalue(), where="here") == EXPECTED


@pytest.mark.parametrize("nesting", [None, {}])
def test_without_planner_data_nesting_is_unknown(nesting: object) -> None:
    metadata = sample()
    metadata.planner_data = nesting
    contents = read_metadata(pickle.dumps(metadata), where="here")
    assert (contents.paths, contents.is_nesting_known) == ({}, False)
    assert contents.tensors == EXPECTED.tensors


def test_a_chunk_without_elements_needs_no_item() -> None:
    """FSDP2 lists one for a rank that has no row of a small tensor."""
    metadata = sample()
    metadata.state_dict_metadata["model.w"].chunks.append(
        ChunkStorageMetadata(torch.Size([3, 0]), torch.Size([0, 3]))
    )
    assert read_metadata(pickle.dumps(metadata), where="here") == EXPECTED


# ---------------------------------------------------------------------------------------- writing


def written() -> bytes:
    tensor = WrittenTensor(
        "model.w",
        ("model", "w"),
        BY_NAME["bfloat16"],
        (3, 3),
        (((0, 0), (2, 3)), ((2, 0), (1, 3))),
        (Extent("__0_0.distcp", 900, 800), Extent("__1_0.distcp", 0, 790)),
    )
    return write_metadata(
        [tensor], [WrittenObject("step", ("step",), Extent("__0_0.distcp", 0, 900))]
    )


def test_written_metadata_is_what_torch_holds() -> None:
    expected = sample()
    expected.storage_meta = StorageMeta()
    found = pickle.loads(written())
    assert found == expected
    assert [index.index for index in found.storage_data] == [0, 1, None]


def test_written_metadata_reads_back() -> None:
    assert read_metadata(written(), where="here") == EXPECTED


def test_written_metadata_is_a_clean_pickle_and_the_same_every_time() -> None:
    pickletools.dis(written(), out=io.StringIO())  # raises where the stack or memo does not fit
    assert written() == written()


@pytest.mark.parametrize(
    "offset", [0, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 62) - 1]
)
@pytest.mark.parametrize("key", ["k", "k" * 255, "k" * 256, "k" * 70_000, "schl\u00fcssel"])
def test_any_offset_and_any_key(offset: int, key: str) -> None:
    row = WrittenObject(key, ("a", 3, key), Extent("f", offset, 1))
    metadata = pickle.loads(write_metadata([], [row]))
    ((index, info),) = metadata.storage_data.items()
    assert (index.fqn, index.offset, info.offset, info.length) == (key, None, offset, 1)
    assert metadata.planner_data == {key: ("a", 3, key)}
