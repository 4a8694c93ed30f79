"""Carries a training run from one trainer's checkpoint to another's: read, cover, lay out, move."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from dcpconv.core.catalog import Form
from dcpconv.core.errors import DcpconvError, FormatError
from dcpconv.engine.execute import execute
from dcpconv.engine.publish import staging
from dcpconv.engine.space import block_size, check_space
from dcpconv.engine.targets import check_target
from dcpconv.families import configs
from dcpconv.families.keymaps import Keymap, keymaps, resolve_family
from dcpconv.families.side_files import SideFile, SideFiles, carried, disk_nbytes, generated
from dcpconv.plan.account import aim_at
from dcpconv.plan.coverage import Coverage
from dcpconv.plan.training.adapters import is_adapters
from dcpconv.plan.training.reading import read_training_state
from dcpconv.plan.training.state import KINDS, Kind, OptimizerError, TrainingState
from dcpconv.runs.carrying.progress import rescaled
from dcpconv.runs.carrying.report import CarryReport
from dcpconv.runs.carrying.trainer_files import write_trainer
from dcpconv.runs.carrying.writing import (
    Carried,
    Written,
    write_dcp,
    write_minimind,
    write_torchtitan,
)
from dcpconv.sources.adapters.fields import CONFIG
from dcpconv.sources.recognition import Weights

_FORMS: Final[Mapping[Kind, Form]] = {"hf-trainer": "hf", "minimind": "torch"}
"""Form of the weights; every other kind is a DCP."""


def convert_run(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Kind,
    family: str | None = None,
    from_: str | None = None,
    assets: str | os.PathLike[str] | None = None,
    sizes: Mapping[str, str] | None = None,
    world_size: int | None = None,
    chunks: int = 1,
    jobs: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> CarryReport:
    """Writes the training state of one trainer as another trainer resumes it.

    Weights and optimizer state are copied or relabelled, never cast, in constant memory; the result
    is whole or absent.

    Args:
        source: MiniMind's ``*_resume.pth``, Hugging Face's ``checkpoint-N``, a DCP training
            checkpoint, or a Lingua step directory.
        target: A file for ``minimind``, else a directory.
        to: Whose checkpoint to write: ``minimind``, ``hf-trainer``, ``dcp``, ``lingua`` or
            ``torchtitan``.
        family: Naming of the result's weights; by default that of the target's kind, and the
            source's own for ``dcp``.
        from_: Naming of the source's weights, where keys leave a choice.
        assets: Directory with the model's config and tokenizer, where the source has none.
        sizes: Numbers of the model (``n_heads``), where no config says.
        world_size: Ranks that will go on: MiniMind's ``step`` is rescaled for them.  By default it
            is left as it is.
        chunks: Row chunks per tensor in a DCP, as FSDP2 over as many ranks stores them.
        jobs: Threads.
        overwrite: Replace an existing target, in one step once the result is complete.
        dry_run: Do everything but write.

    Raises:
        OptimizerError: Optimizer state cannot be told apart or cannot follow its parameters.
        CoverageError: Keys are missing, unknown or misshapen; all are listed.
        NotExpressibleError: The target's naming cannot hold the model.
        FormatError: A file is damaged or unsafe.
        TargetExistsError: The target exists.
    """
    if to not in KINDS:
        raise DcpconvError(f"there is no trainer {to!r}", [("expected", ", ".join(KINDS))])
    source, target = Path(source), Path(target)
    is_file = to == "minimind"
    if not dry_run:
        check_target(target, overwrite=overwrite, is_file=is_file, source=source)
    try:
        state = read_training_state(source, from_=from_, assets=assets, sizes=sizes)
    except FormatError as error:
        if error.kind != "untrusted":
            raise
        hint = "no code is run for a run; load the file where it was written, save plain values"
        raise FormatError(error.headline, error.facts, hint=hint, kind=error.kind) from error
    wanted = _wanted(state, to, family)
    coverage = _cover(state, wanted, to)
    beside, notes = rescaled(state.beside, world_size)
    on_its_way = Carried(state, coverage, beside, block_size(target), chunks)
    written = _lay_out(on_its_way, to, wanted, target)
    side = _side_files(state, coverage, wanted, to, target, assets)
    report = _report(state, coverage, wanted, to, target, written, side, notes)
    if dry_run:
        return report
    with staging(target, overwrite=overwrite, is_file=is_file, source=source) as stage:
        needed = sum(len(data) for _, data in written.texts)
        check_space(target, disk_nbytes(written.outline, side) + needed)
        execute(
            written.outline,
            source=state.root,
            target=stage.path,
            identities=state.identities,
            jobs=jobs,
        )
        files = [(file.name, file.read()) for file in side.files]
        named = {name for name, _ in (*written.texts, *written.outline.commit)}
        files = [(name, data) for name, data in files if name not in named]
        stage.publish([*files, *written.outline.commit, *written.texts])
    return replace(report, is_dry_run=False)


def _wanted(state: TrainingState, to: Kind, family: str | None) -> Keymap | None:
    """The naming of the result; ``None`` keeps the source's keys."""
    if family is not None:
        return resolve_family(family, state.model.architecture)
    if to == "dcp":
        return None
    if to == "minimind":
        return _minimind_table(state.weights)
    if to == "hf-trainer" and is_adapters(state.weights.entries):
        return None
    if to == "torchtitan":
        return _torchtitan_table(state)
    name = "hf" if to == "hf-trainer" else to
    if to == "hf-trainer" and state.weights.keymap and state.weights.keymap.family == "hf":
        return state.weights.keymap
    return resolve_family(name, state.model.architecture)


def _torchtitan_table(state: TrainingState) -> Keymap:
    """The table of torchtitan for the architecture, as its newest release spells it."""
    tables = {name: t for name, t in keymaps().items() if name.startswith("torchtitan-")}
    own = state.weights.keymap
    if own is not None and own.name in tables:
        return own
    architecture = state.model.architecture
    fitting = [name for name, table in tables.items() if architecture in table.architectures]
    if not fitting:
        raise OptimizerError(
            "torchtitan has no model of this architecture that we know",
            [
                ("source", state.source),
                ("architecture", architecture or "not known"),
                *(("family", name) for name in tables),
            ],
            hint="name a family: --family torchtitan-llama3",
        )
    return tables[min(fitting, key=len)]


def _minimind_table(weights: Weights) -> Keymap:
    """MiniMind's table for keys that are spelled its way already."""
    for name, table in keymaps().items():
        if name.startswith("minimind") and all(table.match(key) for key in weights.entries):
            return table
    raise OptimizerError(
        "which generation of MiniMind should the result be for?",
        [
            ("source", weights.catalog.source),
            *(("family", name) for name in keymaps() if name.startswith("minimind")),
        ],
        hint="name it: --family minimind3",
    )


def _cover(state: TrainingState, wanted: Keymap | None, to: Kind) -> Coverage:
    model = state.model
    if wanted is not None and _spelled_alike(model.weights, wanted):
        weights = replace(model.weights, keymap=wanted, alternatives=())
        model = replace(model, weights=weights)
    aim = aim_at(model, wanted, form=_FORMS.get(to, "dcp"))
    aim.require_expressible(undone="nothing was written", allow_by=None)
    coverage = aim.cover()
    coverage.require(state.source)
    return coverage


def _spelled_alike(weights: Weights, wanted: Keymap) -> bool:
    """Whether the keys could as well be the target's own: then nothing need be known of them."""
    own = weights.keymap
    if own is None or weights.alternatives:
        return all(wanted.match(key) for key in weights.entries)
    return False


def _lay_out(on_its_way: Carried, to: Kind, wanted: Keymap | None, target: Path) -> Written:
    if to == "torchtitan":
        return write_torchtitan(on_its_way)
    if to == "hf-trainer":
        return write_trainer(on_its_way, wanted)
    if to == "minimind" and wanted is not None:
        return write_minimind(on_its_way, wanted, filename=target.name)
    return write_dcp(on_its_way, lingua=to == "lingua")


def _side_files(
    state: TrainingState,
    coverage: Coverage,
    wanted: Keymap | None,
    to: Kind,
    target: Path,
    assets: str | os.PathLike[str] | None,
) -> SideFiles:
    """Config and tokenizer, where the target is a directory."""
    if to == "minimind":
        return SideFiles()
    beside = state.source if state.source.is_dir() else state.source.parent
    own = state.source.is_dir() and configs.find_config(beside) is not None
    if wanted is None and is_adapters(state.weights.entries):
        config = beside / CONFIG
        return SideFiles((SideFile(CONFIG, text=None, origin=config),) if config.is_file() else ())
    if wanted is None or (wanted is state.weights.keymap and own):
        return carried(beside, dtype=None, tied=None) if own else SideFiles()
    dtype = next((target.dtype for target in coverage.targets), None)
    return generated(
        wanted,
        state.model.spec,
        form=_FORMS.get(to, "dcp"),
        target=target,
        source=beside,
        assets=Path(assets) if assets else None,
        dtype=dtype,
        left_out={},
    )


def _report(
    state: TrainingState,
    coverage: Coverage,
    wanted: Keymap | None,
    to: Kind,
    target: Path,
    written: Written,
    side: SideFiles,
    notes: tuple[str, ...],
) -> CarryReport:
    own = state.weights.keymap.name if state.weights.keymap else "as stored"
    payloads = [fill for file in written.outline.files for _, fill in file.payloads]
    return CarryReport(
        source=str(state.source),
        source_kind=state.kind,
        source_family=own,
        target=str(target),
        target_kind=to,
        target_family=wanted.name if wanted else own,
        weights=len(coverage.targets),
        parameters=len({key for key, _ in written.moments}),
        moments=tuple(dict.fromkeys(kind for _, kind in written.moments)),
        relabelled=sum(t.relabelled is not None for t in coverage.targets if t.tied_to is None),
        groups=tuple(len(group.params) for group in written.groups),
        beside=written.beside,
        left=written.left,
        notes=(*state.notes, *notes, *written.notes, *side.notes),
        nbytes=sum(fill.nbytes for fill in payloads),
        is_dry_run=True,
    )
