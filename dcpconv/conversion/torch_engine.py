"""``--engine torch``: torch's own functions, the reference that ours are held against.

It needs the whole model in memory.  What it is for: comparing, and files that the streaming engine
declines (the form before zip archives, compressed items, objects of unknown classes).  Nothing is
unpickled without restrictions unless the caller says ``trust``.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch
import torch.distributed.checkpoint.metadata as dcp_metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from dcpconv.conversion.report import ConversionReport, Side
from dcpconv.core.catalog import Catalog, Form, KeyPath, TensorEntry
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import DcpconvError, FormatError, NotACheckpointError
from dcpconv.engine.copying import write_error
from dcpconv.engine.publish import staging
from dcpconv.engine.space import check_space
from dcpconv.formats import dcp, ranks, safetensors, torchfile
from dcpconv.formats.dcp.metadata import read_metadata
from dcpconv.formats.dcp.names import METADATA_FILE
from dcpconv.formats.opening import open_checkpoint
from dcpconv.formats.torchfile.files import require_whole
from dcpconv.formats.torchfile.nesting import flatten, key_of
from dcpconv.formats.torchfile.unpickling import TRUST_HINT
from dcpconv.plan.coverage import AS_STORED
from dcpconv.stores.local import identity_of, require_unchanged

_DISTRIBUTED: Final = frozenset({"DTensor", "ShardedTensor"})
"""Classes of tensors that are one rank's share; those that are whole were read as plain ones."""


def form_of(source: Path) -> Form:
    """The form of a source that torch reads by itself.

    Raises:
        NotACheckpointError: It is absent, or of no such form.
    """
    if not source.exists():
        raise NotACheckpointError("there is no such file or directory", [("path", source)])
    if dcp.is_dcp(source):
        return "dcp"
    if source.is_file() and torchfile.is_torch_file(source):
        return "torch"
    found = "safetensors" if safetensors.is_hf(source) else "neither"
    if ranks.is_run(source):
        found = "one file per rank"
    raise NotACheckpointError(
        "torch's own functions read one torch.save file or a DCP directory",
        [("path", source), ("found", found)],
        hint="leave --engine out" if found != "neither" else None,
    )


def convert_plain(
    source: Path,
    target: Path,
    *,
    form: Form,
    overwrite: bool,
    trust: bool,
    require: Callable[[Catalog], object],
) -> ConversionReport:
    """``torch_save_to_dcp`` or ``dcp_to_torch_save``, staged and published like every result.

    Args:
        source: One torch.save file, or a DCP directory.
        target: Where the other form of it goes.
        form: Of the target.
        overwrite: Replace an existing target, in one step once the result is complete.
        trust: Unpickle without restrictions what the restricted unpickler refuses.
        require: Raises for what the streaming engine would not publish either.

    Raises:
        FormatError: The source is damaged, holds no model, or needs ``trust``.
        TargetExistsError: The target exists, or is being written.
        NoSpaceError: The disk cannot hold the result.
    """
    own = form_of(source)
    is_file = form == "torch"
    with staging(target, overwrite=overwrite, is_file=is_file, source=source) as stage:
        state = load(source, trust=trust)
        require(_listed(state, source, own))
        nbytes: Counter[str] = Counter()
        for tensor in _tensors(state):
            name = str(tensor.dtype).removeprefix("torch.")
            nbytes[BY_NAME[name].label if name in BY_NAME else name] += tensor.nbytes
        keys, total = sum(1 for _ in _tensors(state)), sum(nbytes.values())
        check_space(target, total)
        if is_file:
            torch.save(state, stage.path / stage.target.name)
        else:
            _save(state, stage.path)
        written = {path.name: path.stat().st_size for path in stage.path.iterdir()}
        stage.publish()
    dtypes = tuple(label for label, _ in nbytes.most_common())
    files = [source] if own == "torch" else [*source.glob("*.distcp")]
    written_files = sum(name != METADATA_FILE for name in written)
    return ConversionReport(
        source=Side(str(source), own, AS_STORED, keys, len(files), total, dtypes),
        target=Side(str(target), form, AS_STORED, keys, written_files, total, dtypes),
        copied=keys,
        relabelled=(),
        cast=0,
        lossy=(),
        tied=(),
        ignored=(),
        left=(),
        allowed=(),
        side_files=(),
        notes=(),
        moved={"by torch": total},
        disk_nbytes=sum(written.values()),
        seconds=0.0,  # counted by who calls
        is_dry_run=False,
    )


@contextmanager
def rewritten(source: Path, target: Path, *, trust: bool) -> Iterator[Catalog]:
    """Lends a DCP directory that torch wrote from ``source``, beside ``target``, for streaming.

    It is gone when the block ends; after a crash, the next conversion to ``target`` removes it.

    Raises:
        FormatError: The source is damaged, or needs ``trust``.
        TargetExistsError: The target exists, or is being written.
    """
    own = form_of(source)
    beside = target.with_name(f"{target.name}.by-torch")
    with staging(beside, overwrite=False, is_file=False) as scratch:
        state = load(source, trust=trust)
        check_space(target, 2 * sum(tensor.nbytes for tensor in _tensors(state)))
        _save(state, scratch.path)
        del state
        catalog = open_checkpoint(scratch.path)
        note = "torch read the source; it took memory and disk for the whole of it"
        said, _ = safetensors.from_side_file(source) if own == "dcp" else ({}, ())
        notes = (*catalog.notes, note)
        yield replace(catalog, source=source, form=own, notes=notes, metadata=said)


def _listed(state: dict[Any, Any], source: Path, form: Form) -> Catalog:
    """What torch has read, as a catalog of keys and shapes: without any bytes to read."""
    tensors: dict[str, TensorEntry] = {}
    objects: dict[str, object] = {}
    paths: dict[str, KeyPath] = {}
    for path, leaf in flatten(state, is_tensor=lambda node: isinstance(node, torch.Tensor)):
        key = key_of(path)
        paths[key] = path
        if not isinstance(leaf, torch.Tensor):
            objects[key] = leaf
            continue
        name = str(leaf.dtype).removeprefix("torch.")
        dtype = BY_NAME.get(name, BY_NAME["uint8"])  # torch has types that only torch can write
        tensors[key] = TensorEntry(key, dtype, tuple(leaf.shape), ())
    return Catalog(form, source, source, {}, tensors, objects, paths)


def load(source: Path, *, trust: bool) -> dict[str, Any]:
    """Everything in a torch.save file or DCP directory, in memory.

    Args:
        source: The file or directory.
        trust: Where the restricted unpickler refuses, unpickle as torch's own functions do: code
            that the file names is imported and run.

    Raises:
        FormatError: It is damaged, holds no mapping, is one rank's share, or needs ``trust``.
        SourceChangedError: It changed meanwhile.
    """
    ranks.refuse_share(source)
    is_directory = form_of(source) == "dcp"
    read = _load_directory if is_directory else _load_file
    if not is_directory:
        require_whole(source)
    directory = source if is_directory else source.parent
    names = [*source.glob("*.distcp"), source / METADATA_FILE] if is_directory else [source]
    identities = {file.name: identity_of(file) for file in names}
    try:
        try:
            state = read(source, is_restricted=True)
        except (Exception, CheckpointException) as error:
            if not trust or not _is_refusal(_cause(error)):
                raise
            state = read(source, is_restricted=False)
    except (Exception, CheckpointException) as error:
        raise _explained(_cause(error), source) from error
    require_unchanged(directory, identities)
    shares = [tensor for tensor in _tensors(state) if type(tensor).__name__ in _DISTRIBUTED]
    if shares:
        raise FormatError(
            "file is one rank's share of a checkpoint, not the whole",
            [("file", source), ("in pieces", len(shares))],
            hint="give the directory with the files of all ranks, and leave --engine out",
        )
    if not isinstance(state, dict):
        raise FormatError(
            "file holds no mapping of names to tensors",
            [("file", source), ("found", type(state).__name__)],
            hint="save a state_dict instead",
        )
    return state


def _load_file(source: Path, *, is_restricted: bool) -> Any:
    return torch.load(source, map_location="cpu", weights_only=is_restricted)


def _load_directory(source: Path, *, is_restricted: bool) -> dict[str, Any]:
    state: dict[str, Any] = {}
    reader, planner = FileSystemReader(source), _EmptyStateDictLoadPlanner
    if is_restricted:
        reader, planner = _RestrictedReader(source, _read_metadata(source)), _RestrictedPlanner
    _load_state_dict(
        state,
        storage_reader=reader,
        planner=planner(),  # type: ignore[no-untyped-call]
        no_dist=True,
    )
    return state


def _save(state: dict[str, Any], directory: Path) -> None:
    try:
        _save_state_dict(state, storage_writer=FileSystemWriter(directory), no_dist=True)
    except CheckpointException as error:
        cause = _cause(error)
        if isinstance(cause, OSError):
            raise write_error(cause, directory) from error
        raise FormatError(
            "torch could not save this as DCP", [("reason", _first_line(cause))]
        ) from error


class _RestrictedPlanner(_EmptyStateDictLoadPlanner):
    """torch's planner, but objects are read by its restricted unpickler."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)


class _RestrictedReader(FileSystemReader):
    """torch's reader with ``.metadata`` that was read before."""

    def __init__(self, path: Path, metadata: dcp_metadata.Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        del args, kwargs
        metadata = self._metadata
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp_metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _read_metadata(directory: Path) -> dcp_metadata.Metadata:
    """``.metadata`` as torch's own object, where it names only classes that torch puts there."""
    file = directory / METADATA_FILE
    data = file.read_bytes()
    try:
        read_metadata(data, where=str(file))
    except FormatError as error:
        # Transformed items are what this engine is for.
        if error.kind != "transformed":
            raise
    metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    if not isinstance(metadata, dcp_metadata.Metadata):
        raise FormatError("this is no DCP metadata", [("file", file)])
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if module in {"pathlib", "pathlib._local"}:
            return PurePosixPath
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        try:
            return _METADATA_NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed") from None


def _member(owner: object, name: str) -> object:
    """What ``getattr`` is for in ``.metadata``: a member of one enum."""
    if owner is not dcp_metadata._MEM_FORMAT_ENCODING:  # noqa: SLF001 - torch pickles it so
        raise pickle.UnpicklingError("GLOBAL builtins.getattr is not allowed")
    return dcp_metadata._MEM_FORMAT_ENCODING[name]  # noqa: SLF001 - torch pickles it so


_METADATA_NAMES: Final[Mapping[tuple[str, str], Any]] = {
    **{
        (kind.__module__, kind.__name__): kind
        for kind in (
            dcp_metadata.Metadata,
            dcp_metadata.TensorStorageMetadata,
            dcp_metadata.BytesStorageMetadata,
            dcp_metadata.ChunkStorageMetadata,
            dcp_metadata.TensorProperties,
            dcp_metadata.MetadataIndex,
            dcp_metadata.StorageMeta,
            dcp_metadata._MEM_FORMAT_ENCODING,  # noqa: SLF001 - torch pickles it
            _StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # noqa: SLF001
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "getattr"): _member,
}


def _cause(error: BaseException) -> BaseException:
    """What went wrong inside torch's checkpoint functions, which wrap it per rank."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def _is_refusal(cause: BaseException) -> bool:
    if isinstance(cause, FormatError):
        return cause.kind == "untrusted"
    return isinstance(cause, pickle.UnpicklingError)


def _explained(cause: BaseException, source: Path) -> DcpconvError:
    """The complaint of torch as one of ours."""
    if isinstance(cause, DcpconvError):
        return cause
    if isinstance(cause, pickle.UnpicklingError):
        names = dict.fromkeys(re.findall(r"GLOBAL ([\w.]+)", str(cause)))
        reasons = [("global", name) for name in names] or [("reason", _first_line(cause))]
        return FormatError(
            "torch's restricted unpickler refuses the file; nothing in it was run",
            [("file", source), *reasons],
            hint=TRUST_HINT,
            kind="untrusted",
        )
    return FormatError(
        "torch cannot read the checkpoint", [("source", source), ("reason", _first_line(cause))]
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
