"""A checkpoint of any form and naming as a DCP that exists nowhere: ``CheckpointReader``.

    dcp.load(state_dict, storage_reader=CheckpointReader("hf_dir", to="lingua"))

Every tensor appears as one chunk, so each rank asks for exactly the regions it holds and nothing
more is read.  Memory stays within ``BATCH`` of tensors that a planner makes for itself, plus the
buffers of ``dcpconv.loading.reading``; with the default planner tensors are read in place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dcpconv.core.errors import DcpconvError, FormatError
from dcpconv.engine.tensors import dtype_of, torch_dtype
from dcpconv.loading.objects import Objects
from dcpconv.loading.reading import Landing, read_landings
from dcpconv.loading.supply import Options, Supply, prepare
from dcpconv.plan.block_scales import FACTORS
from dcpconv.plan.coverage import Target
from dcpconv.plan.fills import fill_of
from dcpconv.sources.adapters.naming import adapter_names
from dcpconv.sources.live_models import live_model
from dcpconv.sources.said import parse_allowed
from dcpconv.stores.local import Sources
from dcpconv.stores.schemes import path_of

BATCH = 256 << 20
"""Bytes of tensors that are asked of a planner before the first of them is read."""

_log = logging.getLogger(__name__)


class CheckpointReader(StorageReader):
    """Reads a checkpoint of any form, in the naming of the model, for ``dcp.load``.

    Nothing is opened before ``dcp.load`` asks, so that a fault reaches every rank as one
    ``CheckpointException``.  As with every DCP reader, keys that the state dict does not ask for
    are passed over; ``load_init_weights`` accounts for all of them.

    Args:
        source: A safetensors directory or file, a ``torch.save`` file, a DCP directory, or a hub
            id.
        to: Naming to present the weights in; by default every key as it is stored, with its
            containers and with values that are no tensors.
        from_: Naming of the source, where its keys leave a choice.
        keymap: File with a table of your own.
        root: Container to present the weights under: ``model`` for ``{"model": state_dict}``.
        assets: Directory with the config, where the source has none.
        spec: Numbers of the model that no file states: ``heads=8,kv_heads=2``.
        allow: Features to leave out although the naming cannot express them.
        dequantize: Multiply fp8, MXFP8, MXFP4 and int8 weights by their scales, in fp32, whatever
            their names; without ``to`` every other key stays as it is stored.
        trust: Hand objects of any class to ``torch.load``, which imports and calls what they name.
            Otherwise an object is handed on only where its pickle names harmless globals: torch's
            own safe ones, NumPy's, the plain containers and values of the standard library.
        adapter: Adapters to merge into the source on the way, ``DIR`` or ``DIR:0.5`` each; what
            they change is offered as fp32, and rounded once to the type of the tensor that asks.
        model: A model of transformers, whose keys in memory are presented: what published files
            become in it.  The meta device is enough.
        jobs: Threads.

    Attributes:
        nbytes_read: Bytes of tensors that were read, by this rank.
        losses: ``(overflowed, underflowed)`` values by key, for casts that lost some.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        to: str | None = None,
        from_: str | None = None,
        keymap: str | os.PathLike[str] | None = None,
        root: str | None = None,
        assets: str | os.PathLike[str] | None = None,
        spec: str | tuple[str, ...] = (),
        allow: tuple[str, ...] = (),
        dequantize: bool = False,
        trust: bool = False,
        adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
        model: nn.Module | None = None,
        jobs: int | None = None,
    ) -> None:
        super().__init__()
        self._source = source
        self._options = Options(
            to=to,
            from_=from_,
            keymap=Path(keymap) if keymap else None,
            assets=Path(assets) if assets else None,
            spec=(spec,) if isinstance(spec, str) else spec,
            allow=parse_allowed(allow),
            dequantize=dequantize,
            adapters=adapter_names(adapter),
        )
        self._root = root
        self._trust = trust
        self._model = model
        self._jobs = jobs
        self._load_id = str(uuid4())
        self._supply: Supply | None = None
        self._objects: Objects | None = None
        self._targets: dict[str, Target] = {}
        self.nbytes_read = 0
        self.losses: dict[str, tuple[int, int]] = {}

    @classmethod
    def of(cls, supply: Supply, *, jobs: int | None = None) -> CheckpointReader:
        """A reader of what has been accounted for already, under the keys that are wanted."""
        reader = cls(supply.catalog.source, root="", jobs=jobs)
        reader._supply = supply
        reader._objects = Objects(supply.catalog, are_wanted=False, trust=False)
        return reader

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """What was asked for."""
        return self._source

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forget what was read, and read ``checkpoint_id`` from now on if there is one."""
        self._supply = self._objects = None
        self._load_id = str(uuid4())
        if checkpoint_id:
            self._source = checkpoint_id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a local path is there; hub ids are known only once they are fetched."""
        return Path(checkpoint_id).exists()

    # The names of the variadic arguments matter: DCP reads the word `kwargs` as the offer to read
    # per-rank metadata, and would call again after a failure.
    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """The whole checkpoint, every tensor as one chunk.

        What it raises is logged as well: ``dcp.load`` of torch 2.11 passes over it and raises
        ``AssertionError("metadata is None")`` alone (``state_dict_loader.py``, ``local_step``).

        Raises:
            CoverageError: Keys are missing, unknown or misshapen; all are listed.
            FormatError: A file is truncated, malformed or unsafe.
        """
        try:
            supply, objects = self._open()
        except DcpconvError as error:
            _log.error("%s", error)
            raise
        prefix = (*(part for part in (self._root or "").split(".") if part),)
        stored = self._root is None and self._is_as_stored
        self._targets = {
            ".".join((*prefix, key)): target for key, target in supply.targets().items()
        }
        paths = {
            key: supply.catalog.path_of(target.key) if stored else (*prefix, target.key)
            for key, target in self._targets.items()
        }
        paths |= {key: supply.catalog.path_of(key) for key in objects.keys}
        entries: dict[str, Any] = {
            key: _tensor_metadata(target) for key, target in self._targets.items()
        }
        entries |= {key: BytesStorageMetadata() for key in objects.keys}
        return Metadata(
            state_dict_metadata=entries,
            planner_data=paths,
            storage_data={
                MetadataIndex(key, _origin(target), 0): key for key, target in self._targets.items()
            }
            | {MetadataIndex(key): key for key in objects.keys},
            storage_meta=StorageMeta(
                checkpoint_id=os.fspath(self._source),
                save_id=objects.save_id,
                load_id=self._load_id,
            ),
        )

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,  # noqa: FBT001 - DCP passes it by position
        *_args: Any,
        **_options: Any,
    ) -> None:
        """Nothing is left to set up: ``read_metadata`` has opened the checkpoint."""
        del metadata, is_coordinator

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every region of the plan into the planner's tensors."""
        supply, objects = self._open()
        with Sources.of(supply.catalog) as sources:
            for batch in _batches(plan.items):
                landed: list[tuple[ReadItem, Tensor]] = []
                landings: list[Landing] = []
                for item in batch:
                    key = item.storage_index.fqn
                    if item.type == LoadItemType.BYTE_IO:
                        planner.load_bytes(item, objects.saved(key))
                        continue
                    tensor = planner.resolve_tensor(item).detach()
                    landed.append((item, tensor))
                    landings.append(self._landing(supply, item, tensor))
                self.losses |= read_landings(landings, sources=sources, jobs=self._jobs)
                self.nbytes_read += sum(landing.nbytes for landing in landings)
                for item, tensor in landed:
                    planner.commit_tensor(item, tensor)
            sources.require_unchanged()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @property
    def _is_as_stored(self) -> bool:
        options = self._options
        return options.to is None and options.keymap is None and self._model is None

    def _open(self) -> tuple[Supply, Objects]:
        """What can be supplied, and the values that are no tensors."""
        if self._supply is None or self._objects is None:
            is_whole = self._is_as_stored and self._root is None
            supply = prepare(
                path_of(self._source),
                self._options,
                wanted=None if self._model is None else _shapes(self._model),
                live=None if self._model is None else live_model(self._model),
                whole=is_whole,
            )
            torn = any(fault.key.endswith(FACTORS) for fault in supply.coverage.unknown)
            hint = self._options.advice if torn else "to= names another naming"
            supply.coverage.require(self._source, hint=hint)
            self._supply = supply
            self._objects = Objects(supply.catalog, are_wanted=is_whole, trust=self._trust)
        return self._supply, self._objects

    def _landing(self, supply: Supply, item: ReadItem, tensor: Tensor) -> Landing:
        target = self._targets[item.storage_index.fqn]
        sizes = tuple(item.lengths)
        if tuple(tensor.shape) != sizes:
            raise FormatError(
                "the planner's tensor has another shape than it asked for",
                [("key", target.key), ("expected", list(sizes)), ("found", list(tensor.shape))],
            )
        factors = supply.factors_of(target)
        if factors and dtype_of(tensor) is not target.dtype:
            raise FormatError(
                "elements would be cast without the factors that belong to them",
                [("key", target.key), *(("factors", key) for key in factors)],
                hint=f"{self._options.advice}; a tensor of {target.dtype} takes them as they are",
            )
        fill = fill_of(target, tuple(item.storage_offsets), sizes)
        return Landing(item.storage_index.fqn, fill, 0, tensor)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    state = model.state_dict(keep_vars=True)
    return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}


def _origin(target: Target) -> torch.Size:
    return torch.Size([0] * len(target.shape))


def _tensor_metadata(target: Target) -> TensorStorageMetadata:
    size = torch.Size(target.shape)
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=torch_dtype(target.dtype)),
        size=size,
        chunks=[ChunkStorageMetadata(offsets=_origin(target), sizes=size)],
    )


def _batches(items: list[ReadItem]) -> Iterator[list[ReadItem]]:
    batch: list[ReadItem] = []
    nbytes = 0
    for item in items:
        size = 8 * item.lengths.numel()
        if batch and nbytes + size > BATCH:
            yield batch
            batch, nbytes = [], 0
        batch.append(item)
        nbytes += size
    if batch:
        yield batch
