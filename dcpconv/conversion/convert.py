"""Converts a checkpoint of any form and naming into any other: catalog, plan, engine, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dcpconv.conversion.deciding import Decided, decide, require_model_in
from dcpconv.conversion.report import ConversionReport
from dcpconv.conversion.request import Request, Wanted, float_dtype, guarded
from dcpconv.conversion.summary import labels, lossy_casts
from dcpconv.core.catalog import Catalog, Form
from dcpconv.core.errors import DcpconvError, FormatError, LossyCastError
from dcpconv.engine.execute import Moved, execute
from dcpconv.engine.publish import check_space, staging
from dcpconv.engine.space import spared
from dcpconv.families.side_files import disk_nbytes
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.adapters.spotting import adapter_in
from dcpconv.sources.opening import parameters_of
from dcpconv.sources.said import Said
from dcpconv.stores.hub import locate

if TYPE_CHECKING:
    from dcpconv.sources.adapters.naming import Weighed

_MOVED = ("reflinked", "copied", "buffered", "relabelled", "cast", "merged", "holes")

Engine = Literal["stream", "torch"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is; both numbers count payload bytes of the result."""

    done: int
    total: int


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    form: Form | None = None,
    to: str | None = None,
    from_: str | None = None,
    keymap: str | os.PathLike[str] | None = None,
    root: str | None = None,
    only: str | None = None,
    dtype: str | None = None,
    cast_all: bool = False,
    dequantize: bool = False,
    allow: Sequence[str] = (),
    assets: str | os.PathLike[str] | None = None,
    spec: str | Sequence[str] = (),
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    chunks: int = 1,
    model_parallel: int = 1,
    max_file_size: int | None = None,
    jobs: int | None = None,
    engine: Engine = "stream",
    trust: bool = False,
    fingerprint: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ConversionReport:
    """Converts a checkpoint; memory does not grow with it, and the result is whole or absent.

    Args:
        source: A safetensors directory or file, a ``torch.save`` file, a DCP directory, or a hub id
            (``org/name[@revision]``, ``hf://...``), which is downloaded into the hub's cache.
        target: Where the result goes.
        form: ``hf``, ``torch`` or ``dcp``; by default from the target's name (``*.pth``, ``*.pt``
            and ``*.bin`` are torch files), else ``hf`` for a DCP source and ``dcp`` otherwise.
        to: Naming of the result; by default ``hf`` for the hf form, else the source's own.
        from_: Naming of the source, where keys leave a choice.
        keymap: A table of your own, which ``to`` and ``from_`` may then name.
        root: Key that the weights sit under in a dcp or torch result; ``""`` for none.
        only: Take only what sits under this key (``model``), or keys that match this pattern.
        dtype: Cast floating-point tensors of two or more dims (``bf16``, ``fp16``, ``fp32``).
            Vectors, such as norm weights and biases, and integers keep their type.
        cast_all: Cast floating-point vectors and scalars too.
        dequantize: Multiply fp8, MXFP8, MXFP4 and int8 weights by their scales, into bf16 or
            ``dtype``.
        allow: Features to leave out although the target cannot express them, by name;
            ``overflow`` allows a cast to produce infinities.
        assets: Directory with the config and tokenizer, where the source has none.
        spec: Numbers of the model that no file states, or states wrongly: ``heads=8,kv_heads=2``.
        adapter: Adapters to merge into the source, in this order: PEFT directories, hub ids, files
            of MiniMind, or DCP directories; ``DIR:0.5`` adds half of one.
        chunks: Row chunks per tensor in a dcp result, as FSDP2 over as many ranks stores them.
        model_parallel: Files of a torch result ``to="meta"``, which is then a directory: every
            rank's share of each tensor, as Meta releases its larger models.
        max_file_size: Bytes of tensors per file at most, for hf and dcp results.
        jobs: Threads.
        engine: ``torch`` reads and writes with torch's own functions, the whole model in memory;
            for files that ours declines, and for comparison.
        trust: With ``engine="torch"``: unpickle without restrictions what the restricted unpickler
            refuses, which runs code that the file names.
        fingerprint: Read the result once it is written and report its fingerprint; a directory
            gets its manifest.  No way of copying has all bytes pass by: most are shared with the
            source, or copied by the kernel.
        overwrite: Replace an existing target, in one step once the result is complete.
        dry_run: Do everything but write.
        progress: Called with the bytes done, from worker threads.

    Raises:
        CoverageError: Keys are missing, unknown or misshapen; all are listed.
        NotExpressibleError: The target naming cannot hold the model; all reasons are listed.
        FormatError: A file is truncated, malformed or unsafe.
        TargetExistsError: The target exists, or is being written.
        NoSpaceError: The disk cannot hold the result.
    """
    started = time.perf_counter()
    said = Said.parse(
        from_=from_, keymap=keymap, assets=assets, spec=spec, allow=allow, dequantize=dequantize
    )
    wanted = Wanted(
        path=Path(target),
        form=form,
        to=to,
        root=root,
        dtype=float_dtype(dtype),
        cast_all=cast_all,
        chunks=chunks,
        model_parallel=model_parallel,
        max_file_size=max_file_size,
        overwrite=overwrite,
    )
    request = Request(locate(source), said, only, wanted, trust, _adapters(adapter))
    is_by_torch = _is_by_torch(engine, trust=trust)
    if fingerprint and is_by_torch:
        raise DcpconvError(
            "torch's engine takes no fingerprint",
            hint="`dcpconv fingerprint DST` takes one of the result",
        )
    if not dry_run:
        request.check_target()
        if is_by_torch and (form := request.plain_form()) is not None:
            from dcpconv.conversion import torch_engine  # noqa: PLC0415 - imports torch

            return torch_engine.convert_plain(
                request.source,
                wanted.path,
                form=form,
                overwrite=overwrite,
                trust=trust,
                require=lambda catalog: require_model_in(catalog, request),
            )
    alone = _alone(request)
    if alone is not None:
        opened: AbstractContextManager[Catalog] = nullcontext(alone.job.catalog)
    else:
        opened = _opened(request, by_torch=is_by_torch, dry_run=dry_run)
    with opened as everything:
        decided = alone or decide(everything, request)
        if dry_run:
            return decided.report
        moved = _write(decided, jobs=jobs, overwrite=overwrite, progress=progress)
        printed: dict[str, Any] = {}
        if fingerprint:
            from dcpconv.conversion.printing import printed_result  # noqa: PLC0415 - few ask

            printed = printed_result(decided.job, jobs=jobs)
        return replace(
            decided.report,
            **printed,
            moved={name: nbytes for name in _MOVED if (nbytes := getattr(moved, name))},
            lossy=lossy_casts(moved.losses, decided.tensors, decided.outline),
            seconds=time.perf_counter() - started,
            is_dry_run=False,
        )


def _adapters(
    names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> tuple[Weighed, ...]:
    if not names:
        return ()
    from dcpconv.sources.adapters.naming import read_adapters  # noqa: PLC0415 - most have none

    return read_adapters(names)


def _alone(request: Request) -> Decided | None:
    """The conversion of an adapter that is not merged into anything, if the source is one."""
    if adapter_in(request.source) is None:
        return None
    from dcpconv.conversion.adapters import decide_adapter  # noqa: PLC0415 - most are models

    return decide_adapter(request)


def _opened(request: Request, *, by_torch: bool, dry_run: bool) -> AbstractContextManager[Catalog]:
    """The source; under torch's engine what torch makes of it, for as long as it is needed."""
    if by_torch and dry_run:
        return nullcontext(_open_without_torch(request))
    if by_torch:
        from dcpconv.conversion import torch_engine  # noqa: PLC0415 - imports torch

        return torch_engine.rewritten(request.source, request.wanted.path, trust=request.trust)
    return nullcontext(_open(request))


def _open(request: Request) -> Catalog:
    return open_checkpoint(request.source, parameters=parameters_of(request.source, request.said))


def _is_by_torch(engine: str, *, trust: bool) -> bool:
    if engine not in {"stream", "torch"}:
        raise DcpconvError(f"there is no engine {engine!r}", [("expected", "stream or torch")])
    if trust and engine != "torch":
        raise DcpconvError(
            "only torch itself can be told to trust a file; the streaming engine runs nothing",
            hint="pass --engine torch --trust, if you trust whoever wrote the file",
        )
    return engine == "torch"


def _open_without_torch(request: Request) -> Catalog:
    try:
        return _open(request)
    except FormatError as error:
        hint = "leave --dry-run out: only torch reads this, and it can tell by converting alone"
        raise FormatError(error.headline, error.facts, hint=hint) from error


def _write(
    decided: Decided,
    *,
    jobs: int | None,
    overwrite: bool,
    progress: Callable[[Progress], None] | None,
) -> Moved:
    """Carries the plan out beside the target, and makes the result visible once it is whole."""
    job, outline, side = decided.job, decided.outline, decided.side
    total = sum(fill.nbytes for file in outline.files for _, fill in file.payloads)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(Progress(done, total))

    with staging(
        job.target,
        overwrite=overwrite,
        is_file=job.is_one_file,
        source=guarded(job.catalog.source, job.target, job.catalog.files),
    ) as stage:
        check_space(
            job.target,
            disk_nbytes(outline, side),
            reflinkable=spared(outline, source=job.catalog.path, stage=stage.path),
        )
        try:
            moved = execute(
                outline,
                source=job.catalog.path,
                target=stage.path,
                identities=job.catalog.identities,
                jobs=jobs,
                progress=advance,
                labels=labels(decided.planned, outline),
                allow_overflow="overflow" in job.aim.source.said.allow,
            )
        except LossyCastError as error:
            raise LossyCastError(
                "values are too large for the target type; nothing was written",
                error.facts,
                hint="choose bf16 or fp32; --allow overflow writes infinities instead",
            ) from error
        beside = [(file.name, file.read()) for file in side.files]
        stage.publish([*beside, *outline.commit])
    return moved
