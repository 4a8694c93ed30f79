"""Converts a checkpoint of any form and naming into any other: catalog, plan, engine, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dcpconv.conversion.alone import write_alone
from dcpconv.conversion.deciding import Decided, decide, require_model_in
from dcpconv.conversion.report import ConversionReport
from dcpconv.conversion.request import Request, Wanted, float_dtype, told
from dcpconv.conversion.summary import lossy_casts
from dcpconv.core.catalog import Catalog, Form
from dcpconv.core.errors import DcpconvError, FormatError, LossyCastError
from dcpconv.engine.execute import MOVED
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.adapters.spotting import adapter_in
from dcpconv.sources.opening import parameters_of
from dcpconv.sources.said import Said
from dcpconv.stores.remote import RemotePath
from dcpconv.stores.schemes import is_remote, path_of, target_of

if TYPE_CHECKING:
    from dcpconv.conversion.printing import ResultDigests
    from dcpconv.conversion.worlds.afar import Afar
    from dcpconv.engine.worlds.seats import Seat
    from dcpconv.sources.adapters.naming import Weighed

Engine = Literal["stream", "torch"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is; both numbers count payload bytes of the result."""

    done: int
    total: int


@told
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
    cache: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
    rank: int = 0,
    of: int = 1,
    run: str = "",
) -> ConversionReport:
    """Converts a checkpoint; memory does not grow with it, and the result is whole or absent.

    Args:
        source: A safetensors directory or file, a ``torch.save`` file, a DCP directory, here or in
            a store (``s3://``, ``gs://``, ``az://``, ``https://``, ``hf://``), or a hub id
            (``org/name[@revision]``); what is in a store is read by ranges of bytes.
        target: Where the result goes: a path, or a URL of ``s3``, ``gs``, ``az`` or ``hf``.
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
        model_parallel: Files of a torch result ``to="meta"`` or ``"meta-llama4"``, which is then a
            directory: every rank's share of each tensor, as Meta releases its larger models.
        max_file_size: Bytes of tensors per file at most, for hf and dcp results.
        jobs: Threads.
        engine: ``torch`` reads and writes with torch's own functions, the whole model in memory;
            for files that ours declines, and for comparison.
        trust: With ``engine="torch"``: unpickle without restrictions what the restricted unpickler
            refuses, which runs code that the file names.
        fingerprint: Report the fingerprint of the result, and leave its manifest in the directory,
            or beside the file as ``NAME.dcpconv_fingerprint.json``.  Bytes are
            hashed on their way through our buffers, by which all but blocks shared with the source
            then go; those are read for it.  Several processes read their result back
            instead, to compare it with what they wrote.
        overwrite: Replace an existing target, in one step once the result is complete.
        cache: Download a hub id into the hub's own cache first, and read it from there.
        dry_run: Do everything but write.
        progress: Called with the bytes done, from worker threads; on rank 0 those of all ranks.
        rank: Which of several processes this is that write one result together; each calls this
            with the same arguments, and all see the directory of the target.  Into a store only
            processes write together that torchrun has started, with the ranks that it gave them.
        of: How many they are; they return, or raise, together.
        run: What tells this start of them from another, where something does.

    Raises:
        RankError: The processes do not agree, or one of them is gone.
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
        path=target_of(target),
        form=form,
        to=to,
        root=root,
        dtype=float_dtype(dtype),
        cast_all=cast_all,
        chunks=chunks,
        model_parallel=model_parallel,
        max_file_size=max_file_size,
        overwrite=overwrite,
        fingerprint=fingerprint,
    )
    here = _downloaded(os.fspath(source)) if cache else path_of(source)
    is_by_torch = _is_by_torch(engine, trust=trust)
    if is_by_torch and (is_remote(here) or isinstance(wanted.path, RemotePath)):
        raise DcpconvError(
            "torch's own functions read and write files of this machine only",
            [("source", here), ("target", wanted.path)],
            hint="leave --engine torch out, or copy the checkpoint to a disk first",
        )
    if fingerprint and is_by_torch:
        raise DcpconvError(
            "torch's engine takes no fingerprint",
            hint="`dcpconv fingerprint DST` takes one of the result",
        )
    seat, afar = None, None
    if of != 1 or rank:
        from dcpconv.engine.worlds.seats import Seat  # noqa: PLC0415 - most are alone

        seat = Seat(rank, of, run)
        seat.require_streaming(by_torch=is_by_torch)
        wanted.require_disk_for_manifest()
        if isinstance(wanted.path, RemotePath) and not dry_run:
            from dcpconv.conversion.worlds.afar import met  # noqa: PLC0415 - likewise

            afar = met(seat, wanted.path)
    request = Request(here, said, only, wanted, trust, _adapters(adapter))
    with nullcontext() if afar is None else afar.telling():
        report = _converted(
            request,
            seat,
            afar,
            by_torch=is_by_torch,
            jobs=jobs,
            dry_run=dry_run,
            progress=progress,
        )
    return replace(report, seconds=0.0 if dry_run else time.perf_counter() - started)


def _converted(
    request: Request,
    seat: Seat | None,
    afar: Afar | None,
    *,
    by_torch: bool,
    jobs: int | None,
    dry_run: bool,
    progress: Callable[[Progress], None] | None,
) -> ConversionReport:
    """Looks, decides and moves; ``seat`` and ``afar`` are of one of several processes."""
    ground, fingerprint = None, request.wanted.fingerprint

    def advance(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress(done, total))

    if not dry_run:
        ground = request.check_target() if afar is None else afar.look(request.check_target)
        if ground is not None:
            request = replace(request, wanted=replace(request.wanted, stem=ground.stem))
        if by_torch and (form := request.plain_form()) is not None:
            from dcpconv.conversion import torch_engine  # noqa: PLC0415 - imports torch

            return torch_engine.convert_plain(
                request.source,
                request.wanted.path,
                form=form,
                overwrite=request.wanted.overwrite,
                trust=request.trust,
                require=lambda catalog: require_model_in(catalog, request),
            )
    alone = _alone(request)
    if alone is not None:
        opened: AbstractContextManager[Catalog] = nullcontext(alone.job.catalog)
    else:
        opened = _opened(request, by_torch=by_torch, dry_run=dry_run)
    with opened as everything:
        decided = alone or decide(everything, request)
        if dry_run:
            return decided.report
        report = decided.report
        digests: ResultDigests | None = None
        if fingerprint:
            from dcpconv.conversion import printing  # noqa: PLC0415 - few ask

            digests = printing.planned_digests(decided.job, decided.tensors, decided.outline)
        with _overflow_refused():
            if seat is None:
                moved = write_alone(decided, ground, jobs=jobs, progress=advance, digests=digests)
            else:
                from dcpconv.conversion.worlds import working  # noqa: PLC0415 - most are alone

                write = (
                    afar.write
                    if afar
                    else partial(working.write_shared, seat=seat, digests=digests)
                )
                written = write(decided, jobs=jobs, progress=advance)
                moved = written.moved
                report = replace(
                    report,
                    shares=written.shares,
                    resumed=written.resumed,
                    published_by=written.published_by,
                    notes=(*report.notes, *written.notes),
                )
        if fingerprint and (0 if seat is None else seat.rank) == report.published_by:
            report = printing.with_print(report, decided.job, digests, jobs=jobs)
        return replace(
            report,
            moved={name: nbytes for name in MOVED if (nbytes := getattr(moved, name))},
            lossy=lossy_casts(moved.losses, decided.tensors, decided.outline),
            is_dry_run=False,
        )


def _downloaded(name: str) -> Path:
    from dcpconv.stores.hub import download  # noqa: PLC0415 - few ask for it

    return download(name)


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


@contextmanager
def _overflow_refused() -> Iterator[None]:
    try:
        yield
    except LossyCastError as error:
        raise LossyCastError(
            "values are too large for the target type; nothing was written",
            error.facts,
            hint="choose bf16 or fp32; --allow overflow writes infinities instead",
        ) from error
