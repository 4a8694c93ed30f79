"""A published checkpoint as the target of ``dcp.save``: ``CheckpointWriter``.

    dcp.save(model.state_dict(), storage_writer=CheckpointWriter("out/hf", to="hf"))

The planner's items are the boxes of a checkpoint that lies in the ranks' memory.  Rank 0 plans the
conversion of it, as ``convert`` would from the files that torch writes, and every rank writes its
own boxes to where they belong in the result: one pass, and no rank ever holds a whole tensor.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dcpconv.conversion.report import ConversionReport
from dcpconv.conversion.request import Request, Wanted, float_dtype
from dcpconv.conversion.saving.gathering import gather_files, sending_group
from dcpconv.conversion.saving.held import SOURCE, unequal
from dcpconv.conversion.saving.runs import are_equal
from dcpconv.conversion.saving.shares import Share
from dcpconv.conversion.saving.staged import Stage, stage
from dcpconv.conversion.saving.whole_files import InStore, OnDisk, WholeFiles
from dcpconv.conversion.saving.writing import write_share
from dcpconv.core.catalog import Form
from dcpconv.engine.execute import CastLoss
from dcpconv.engine.passing import PassingDigests
from dcpconv.sources.said import Said
from dcpconv.stores.remote import RemotePath
from dcpconv.stores.schemes import target_of


class CheckpointWriter(StorageWriter):
    """Writes what ranks hold as a checkpoint of any form and naming, for ``dcp.save``.

    The result is the one that ``convert`` makes of the DCP that torch would have written, but for
    blanks behind the header of a safetensors file, which line it up with its source.  It is whole
    or absent: rank 0 renames it into place once every rank has written and synced its part.  All
    ranks have to see the target's directory.  In a store every object is sent by one rank, which
    the others send what they hold of it, and the index or ``.metadata`` is made last.

    Args:
        target: Where the result goes, a path or a URL of ``s3``, ``gs``, ``az`` or ``hf``;
            ``checkpoint_id`` of ``dcp.save`` goes before it.
        form: ``hf``, ``dcp`` or ``torch``.
        to: Naming of the result; by default ``hf`` for the hf form, else the model's own.
        from_: Naming of the model, where its keys leave a choice.
        keymap: A table of your own, which ``to`` and ``from_`` may then name.
        root: Key that the weights sit under in a dcp or torch result; ``""`` for none.
        only: Take only what sits under this key (``model``), or keys that match this pattern.
        dtype: Cast floating-point tensors of two or more dims (``bf16``, ``fp16``, ``fp32``).
        cast_all: Cast floating-point vectors and scalars too.
        assets: Directory with the model's config and tokenizer, or its parameter file.
        spec: Numbers of the model that no file states, or states wrongly: ``heads=8,kv_heads=2``.
        allow: Features to leave out although the target cannot express them, by name;
            ``overflow`` allows a cast to produce infinities.
        max_file_size: Bytes of tensors per file at most, for hf and dcp results.
        overwrite: Replace an existing target, in one step once the result is complete.
        fingerprint: Report the fingerprint of the result, for which rank 0 reads what others have
            written, and leave its manifest in it, or beside one file: ``runs verify --deep``
            compares the contents with that later.
        whole_files: Have every file written by one rank, from its first byte to its last, which
            the other ranks send what they hold of it; by default only in stores, and on file
            systems that take no bytes in any order.
        process_group: The ranks that save together, the one that ``dcp.save`` is given.
        jobs: Threads per rank.
        progress: Called with the bytes that this rank has written since its last call, from worker
            threads.

    Attributes:
        report: What was saved, on every rank, once ``dcp.save`` has returned; on other ranks than
            the first without what casts lost and without the fingerprint.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | None = None,
        *,
        form: Form = "hf",
        to: str | None = None,
        from_: str | None = None,
        keymap: str | os.PathLike[str] | None = None,
        root: str | None = None,
        only: str | None = None,
        dtype: str | None = None,
        cast_all: bool = False,
        assets: str | os.PathLike[str] | None = None,
        spec: str | Sequence[str] = (),
        allow: Sequence[str] = (),
        max_file_size: int | None = None,
        overwrite: bool = False,
        fingerprint: bool = False,
        whole_files: bool | None = None,
        process_group: dist.ProcessGroup | None = None,
        jobs: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        said = Said.parse(from_=from_, keymap=keymap, assets=assets, spec=spec, allow=allow)
        wanted = Wanted(
            path=Path(target) if target is not None else Path(),
            form=form,
            to=to,
            root=root,
            dtype=float_dtype(dtype),
            cast_all=cast_all,
            chunks=1,
            model_parallel=1,
            max_file_size=max_file_size,
            overwrite=overwrite,
            fingerprint=fingerprint,
        )
        self._target = target
        self._request = Request(SOURCE, said, only, wanted, trust=False)
        self._whole_files = whole_files
        self._group = process_group
        self._jobs = jobs
        self._progress = progress
        self._stage: Stage | None = None
        self._started = 0.0
        self.report: ConversionReport | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do, and any URL that is written to."""
        del checkpoint_id
        return True

    @property
    def checkpoint_id(self) -> str | os.PathLike[str] | None:
        """Where the result goes."""
        return self._target

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save, into ``checkpoint_id`` if there is one."""
        self.abandon()
        self.report = None
        if checkpoint_id is not None:
            self._target = checkpoint_id
        if self._target is None:
            raise ValueError("CheckpointWriter needs a target, or dcp.save a checkpoint_id")
        wanted = replace(self._request.wanted, path=Path(self._target))
        self._request = replace(self._request, wanted=wanted)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001 - torch's signature
        """Nothing is opened before all ranks have said what they hold."""
        del is_coordinator, args
        if not kwargs.get("use_collectives", True):
            raise ValueError(
                "CheckpointWriter needs use_collectives=True: ranks write common files"
            )
        self._started = time.perf_counter()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """A rank says what it holds, if it knows where that goes: a URL needs packages."""
        target_of(self._request.wanted.path)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0 plans the result, or raises the verdict that every rank hears."""
        self.abandon()
        self._stage = stage(plans, self._request, whole_files=self._whole_files)
        # Whatever ends the save otherwise, the staging directory goes with this object.
        weakref.finalize(self, self._stage.stack.close)
        shares = self._stage.shares(len(plans))
        return [
            replace(plan, storage_data=share) for plan, share in zip(plans, shares, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what this rank holds."""
        share = plan.storage_data
        if not isinstance(share, Share):
            raise TypeError("the save plan is of another writer")
        progress = self._progress or (lambda _: None)

        def check() -> None:
            differing = [
                (tie.second.index.fqn, tie.owner.index.fqn)
                for tie in share.ties
                if not are_equal(_held(tie.second, planner), _held(tie.owner, planner))
            ]
            if differing:
                raise unequal(differing)

        def item(number: int) -> Tensor:
            return _held(plan.items[number], planner)

        if share.whole:
            losses = self._gather(share, item, check, progress)
        else:
            check()
            losses = write_share(
                share, item=item, jobs=self._jobs, progress=progress, digests=self._digests
            )
        seconds = time.perf_counter() - self._started
        self.report = replace(share.report, is_dry_run=False, seconds=seconds)
        written = Counter[int]()
        for write in share.writes:
            written[write.item] += write.nbytes
        results = [
            WriteResult(item.index, written[number], losses if number == 0 else ())
            for number, item in enumerate(plan.items)
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _gather(
        self,
        share: Share,
        item: Callable[[int], Tensor],
        check: Callable[[], None],
        progress: Callable[[int], None],
    ) -> tuple[CastLoss, ...]:
        """Write whole files together with the other ranks; returns what casts lost."""
        with sending_group(self._group) as group:
            gathered = gather_files(
                share,
                item=item,
                check=check,
                files=self._files(share),
                group=group,
                progress=progress,
            )
        if self._stage is not None:
            self._stage.all_have_ended()
            if not gathered.is_whole:
                self.abandon()
        if gathered.failure is not None:
            raise gathered.failure
        return gathered.losses

    @property
    def _digests(self) -> PassingDigests | None:
        """What takes the bytes that rank 0 writes, where a fingerprint is asked for."""
        digests = self._stage.digests if self._stage is not None else None
        return digests.passing if digests is not None else None

    def _files(self, share: Share) -> WholeFiles:
        """Where this rank's files go."""
        if not isinstance(share.directory, RemotePath):
            return OnDisk(share.directory, self._digests)
        uploads = self._stage.uploads if self._stage is not None else None
        if uploads is None:
            from dcpconv.engine.uploading import Uploads  # noqa: PLC0415 - most targets are paths

            # What is one file comes from rank 0, and so does what is shown at the end only.
            uploads = Uploads(share.directory, is_file=False, is_held=False)
        return InStore(uploads)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0 makes the result visible once every rank has written its part."""
        del metadata
        if self._stage is None:
            raise AssertionError("there is no result to publish")
        losses = [loss for rank in results for one in rank for loss in one.storage_data]
        try:
            seconds = time.perf_counter() - self._started
            self.report = self._stage.publish(losses, seconds=seconds)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Remove what was written and not published."""
        if self._stage is not None:
            self._stage.stack.close()
            self._stage = None


def _held(item: WriteItem, planner: SavePlanner) -> Tensor:
    held = planner.resolve_data(item)
    if not isinstance(held, Tensor):
        raise TypeError(f"{item.index.fqn} was planned as a tensor and is a {type(held).__name__}")
    return held
