"""An adapter by itself: carried as the PEFT directory that it is, since it is no model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dcpconv.conversion.deciding import Decided
from dcpconv.conversion.job import Job
from dcpconv.conversion.request import Request
from dcpconv.conversion.summary import summarise
from dcpconv.core.errors import NotExpressibleError
from dcpconv.core.outline import Outline
from dcpconv.engine.space import block_size
from dcpconv.families.side_files import SideFile, SideFiles, carried
from dcpconv.formats import safetensors
from dcpconv.plan.account import aim_at
from dcpconv.plan.coverage import cover_as_stored
from dcpconv.plan.fills import make_plan
from dcpconv.sources.adapters.fields import CONFIG
from dcpconv.sources.adapters.reading import open_adapter, require_whole
from dcpconv.sources.adapters.spotting import WEIGHTS, adapter_in, weights_of
from dcpconv.sources.opening import End
from dcpconv.sources.recognition import Weights
from dcpconv.sources.said import STORED
from dcpconv.sources.understanding import Source


def decide_adapter(request: Request) -> Decided | None:
    """The conversion of an adapter without its base; ``None`` where the source is none.

    Raises:
        NotExpressibleError: What was asked for is no PEFT directory.
        FormatError: Tensors hold nothing.
    """
    source, wanted = request.source, request.wanted
    directory = adapter_in(source)
    if request.adapters or directory is None:
        return None
    asked = [
        f"--{name} {value}"
        for name, value in (
            ("form", wanted.form if wanted.form != "hf" else None),
            ("to", wanted.to if wanted.to not in {"hf", STORED} else None),
            ("root", wanted.root),
            ("only", request.only),
            ("keymap", request.said.keymap.name if request.said.keymap else None),
        )
        if value is not None
    ]
    if wanted.path.suffix in {".pth", ".pt", ".bin"}:
        asked.append(f"a file, {wanted.path.name}")
    if asked:
        raise NotExpressibleError(
            "this is an adapter without its base: it stays a PEFT directory; nothing was written",
            [("source", source), *(("asked", what) for what in asked)],
            hint=f"merge it: dcpconv convert BASE {wanted.path} --adapter {source}",
        )
    weights_file = weights_of(directory)
    assert weights_file is not None  # noqa: S101  adapter_in has seen it
    catalog = open_adapter(directory)
    require_whole(directory, catalog)
    weights = Weights(catalog, catalog.tensors, {}, None, "", ())
    end = End(str(source), "hf", len(catalog.tensors), len(catalog.files))
    understood = Source(catalog, weights, None, None, request.said, end)
    job = Job(aim_at(understood, None, form="hf"), wanted, "hf")
    coverage = cover_as_stored(weights)
    tensors = make_plan(coverage, path_of=job.path_of, dtype_of=job.dtype_of)
    modulus = block_size(wanted.path)
    file = safetensors.one_file(WEIGHTS[0], tensors, modulus=modulus, metadata=catalog.metadata)
    outline = Outline((file,))
    side = _beside(
        carried(weights_file.parent, dtype=None, tied=None), weights_file.parent / CONFIG
    )
    told = f"an adapter, no model: it stays a PEFT directory; --adapter {source} merges it"
    notes = (*catalog.notes, told, *side.notes)
    report = summarise(job, coverage, tensors, outline, side, notes)
    return Decided(job, tensors, tensors, outline, side, report)


def _beside(side: SideFiles, config: Path) -> SideFiles:
    """What goes along: the adapter's config, and the tokenizer, but no config of a model."""
    kept = [one for one in side.files if one.name not in {"config.json", "params.json"}]
    if not config.is_file():
        note = f"no {CONFIG} lies beside the adapter: PEFT cannot load it without"
        return replace(side, files=tuple(kept), notes=(*side.notes, note))
    return replace(side, files=(SideFile(CONFIG, origin=config), *kept))
