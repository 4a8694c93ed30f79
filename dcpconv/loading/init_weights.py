"""Load the weights a training run starts from into a live model, sharded in any way.

``load_init_weights`` is called on every rank once the model is parallelised.  The direct engine
does not go through ``get_model_state_dict`` and ``set_model_state_dict``: the tensors of a sharded
state dict alias the parameters anyway, so bytes are read into the parameters' own memory, and
FSDP1, whose state dict gathers whole units, needs no exception.  What remains of the stock path is
its naming: FQNs are those of ``get_model_state_dict``.  Models that register hooks for their state
dict, or override it, take the stock path itself, which runs them.  ``CheckpointReader`` is the same
reading as a storage reader for ``dcp.load``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dcpconv.core.errors import DcpconvError
from dcpconv.loading.agreement import agree
from dcpconv.loading.hooks import own_state_dict
from dcpconv.loading.model import places
from dcpconv.loading.moving import move
from dcpconv.loading.report import LoadReport
from dcpconv.loading.reporting import report_of
from dcpconv.loading.stock_path import load_by_state_dict
from dcpconv.loading.supply import Options
from dcpconv.loading.terms import (
    LoadEngine,
    LoadRequest,
    ReadMode,
    require_module,
    require_one_of,
)
from dcpconv.loading.world import World
from dcpconv.sources.adapters.naming import adapter_names
from dcpconv.sources.said import parse_allowed

__all__ = ["LoadReport", "load_init_weights"]


@torch.no_grad()
def load_init_weights(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    to: str | None = None,
    from_: str | None = None,
    keymap: str | os.PathLike[str] | None = None,
    assets: str | os.PathLike[str] | None = None,
    spec: str | Sequence[str] = (),
    allow: Sequence[str] = (),
    dequantize: bool = False,
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    strict: bool = True,
    dtype: Literal["model", "source"] = "model",
    ignore: Sequence[str] = (),
    init_missing: Callable[[str, Tensor], object] | None = None,
    process_group: Any = None,
    progress: Callable[[int, int], None] | None = None,
    read: ReadMode = "auto",
    engine: LoadEngine = "auto",
    device: torch.device | str | None = None,
    jobs: int | None = None,
    huge_pages: bool = False,
) -> LoadReport:
    """Loads weights from a checkpoint of any form and naming into a live model.

    Call it on every rank, after the model is wrapped, sharded or parallelised, before the
    optimizer is built.  Each rank reads the bytes of its own shards and nothing else; beside them
    it needs a constant: 12 MiB of buffers per thread at most, and 24 MiB where ranks send to
    each other.

    All ranks decide together before any tensor changes: either all load, or all raise the same
    error with the same text.  Parameters and buffers on the meta device get memory, tied ones stay
    tied and frozen ones frozen.  Non-persistent buffers are computed by their modules
    (``reset_parameters()``, or ``_init_weights`` of the Hugging Face model around them).

    Args:
        model: Plain, or under DDP, FSDP1, FSDP2, tensor parallelism, ``torch.compile``, activation
            checkpointing, in any combination.
        source: A safetensors directory or file, a ``torch.save`` file, a DCP directory, a URL of a
            bucket or a server, or a hub id.
        to: Naming of the model.  By default that of the source if it spells the model's FQNs,
            else the one whose table does; where no table knows them, keys must be equal.
        from_: Naming of the source, where its keys leave a choice.
        keymap: File with a table of your own.
        assets: Directory with the config, where the source has none.
        spec: Numbers of the model that no file states: ``heads=8,kv_heads=2``.
        allow: Features to leave out although the model's naming cannot express them, by name.
        dequantize: Multiply fp8, MXFP8, MXFP4 and int8 weights by their scales, in fp32, and round
            once to the parameter's dtype: the bits of ``convert`` with the same option.
        adapter: Adapters to merge into the source on the way, ``DIR`` or ``DIR:0.5`` each: every
            rank multiplies the rows of its own shards, in fp32, and rounds once.
        strict: Raise where a tensor of the model is missing, a stored one is unexpected, or a
            buffer is left uninitialised.  Otherwise these are only reported; misshapen tensors, and
            one-byte weights that a model of another dtype would get without their factors
            (``X.weight_scale_inv``, ``X.weight_scale``), are an error in any case.
        dtype: ``model`` casts to each parameter's dtype, ``source`` gives parameters the dtype
            they are stored in, or fp32 where they are multiplied out.
        ignore: Shell patterns of FQNs to leave alone and of stored keys to pass over.
        init_missing: With ``strict=False``, called as ``init_missing(fqn, parameter)`` for every
            missing parameter, on all ranks in the same order; without it they keep their values.
        process_group: The ranks that load together; all by default.
        progress: Called with ``(bytes done, bytes in all)`` of this rank, from worker threads.
        read: ``all``: every rank reads its shards.  ``once``: of what several ranks hold (DDP,
            HSDP, norms beside tensor parallelism) each reads a part and sends it to the others;
            what nobody else holds is read directly.  ``host``: the same within every host.
            ``rank0``: rank 0 reads everything, for sources that other nodes cannot see.  ``auto``:
            ``all`` on one host, whose page cache is faster than any process group, and ``host``
            for a URL; on several hosts ``once`` if storage would otherwise have to deliver what is
            wanted more than twice, and the report's notes say so.
        engine: ``direct`` reads into the parameters' own memory.  ``torch`` goes through
            ``get_model_state_dict``, ``dcp.load`` and ``set_model_state_dict``, every rank reading
            its own shards.  ``auto`` takes ``torch`` where a module of any rank has hooks for its
            state dict or overrides it, which the direct engine would not run, and says so in the
            report's notes.
        device: Where tensors on the meta device go that are no DTensors; by default where the
            model's DTensors are, else its tensors with memory, else the CPU.
        jobs: Threads; as many as there are CPUs, 4 at most, by default.
        huge_pages: Ask the system for huge pages where tensors on the meta device get memory on the
            CPU.  It halves the work of the first write where memory is free in large pieces, and
            doubles it where the kernel has to make room: off by default.

    Raises:
        CoverageError: The model and the checkpoint do not fit; lists everything, the same on
            every rank.
        FormatError: A file is truncated, malformed or unsafe, on this rank or another.
        NotExpressibleError: The naming cannot hold this model; all reasons are listed.
        LostRankError: A rank has died or hangs; raised within the timeout of the process group.
    """
    started = time.perf_counter()
    options = Options(
        to=to,
        from_=from_,
        keymap=Path(keymap) if keymap else None,
        assets=Path(assets) if assets else None,
        spec=(spec,) if isinstance(spec, str) else tuple(spec),
        allow=parse_allowed(allow),
        dequantize=dequantize,
        adapters=adapter_names(adapter),
    )
    require_module(model)
    require_one_of("dtype", dtype, "model", "source")
    require_one_of("read", read, *get_args(ReadMode))
    require_one_of("engine", engine, *get_args(LoadEngine))
    world = World.of(process_group, load=os.fspath(source))
    world.require_same(
        {
            "to": to,
            "from_": from_,
            "spec": options.spec,
            "allow": sorted(options.allow),
            "dequantize": dequantize,
            "strict": strict,
            "dtype": dtype,
            "read": read,
            "engine": engine,
        }
    )
    reason = own_state_dict(model)
    if engine == "auto":
        reason = next((told for _, told in world.distinct(reason)), "")
        engine = "torch" if reason else "direct"
    if engine == "torch":
        _require_plain(dtype, read, reason)
    request = LoadRequest(
        source=source,
        options=options,
        strict=strict,
        keeps_dtype=dtype == "model",
        ignore=tuple(ignore),
        initialises=init_missing is not None and not strict,
        read=read,
        device=torch.device(device) if device is not None else None,
        by_state_dict=engine == "torch",
        huge_pages=huge_pages,
    )
    agreement = agree(model, request, world)
    initialised: list[str] = []
    if engine == "torch":
        arrived = load_by_state_dict(
            model, agreement, request, world, jobs=jobs, init_missing=init_missing
        )
        if request.initialises:
            initialised = [place.fqn for place in agreement.missing()]
    else:
        arrived = move(model, agreement, request, world, jobs=jobs, progress=progress)
        if init_missing is not None and request.initialises:
            for place in agreement.missing():
                init_missing(place.fqn, place.local if place.flat is not None else place.tensor)
                initialised.append(place.fqn)
    report = report_of(agreement, arrived, tuple(initialised))
    ran = "are run: engine='torch'" if engine == "torch" else "are not run: engine='direct'"
    notes = (*report.notes, *([f"{reason}; state dict hooks {ran}"] if reason else []))
    return replace(
        report,
        nbytes=report.nbytes if engine == "direct" else arrived.read,
        engine=engine,
        on_meta=tuple(
            place.fqn
            for place in places(model)
            if place.is_meta and (place.is_parameter or place.is_persistent)
        ),
        notes=notes,
        seconds=time.perf_counter() - started,
    )


def _require_plain(dtype: str, read: str, reason: str) -> None:
    """What the stock path cannot do is an error, and never done in another way in silence."""
    facts = [("because", reason)] if reason else []
    if dtype == "source":
        raise DcpconvError(
            "dtype='source' has no effect on a state dict that is set",
            facts,
            hint="build the model in that dtype, or pass engine='direct'",
        )
    if read == "rank0":
        raise DcpconvError(
            "with engine='torch' every rank reads its own shards",
            facts,
            hint="read='all', or engine='direct' with read='rank0'",
        )
