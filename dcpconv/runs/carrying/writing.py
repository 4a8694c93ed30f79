"""Lays out a training checkpoint of any kind: which files, and what is in them.

Memory: names and headers, never a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dcpconv.core.catalog import KeyPath, TensorEntry
from dcpconv.core.errors import FormatError
from dcpconv.core.outline import OutChunk, Outline, OutTensor
from dcpconv.families.keymaps import Keymap
from dcpconv.formats import dcp, torchfile
from dcpconv.formats.torchfile.nesting import DictKey, key_of
from dcpconv.formats.torchfile.unpickling import Instance
from dcpconv.plan.coverage import Coverage, Target, as_stored
from dcpconv.plan.fills import fill_of, make_plan, row_chunks, whole
from dcpconv.plan.training.moments import moment_targets, regrouped, require_adamw
from dcpconv.plan.training.order import parameters_in_order
from dcpconv.plan.training.state import (
    Group,
    TrainingState,
    is_plain,
    split_for_dcp,
    split_for_file,
)
from dcpconv.runs.carrying import progress

_ADAMW: Final = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
"""What a group of torch's AdamW says besides, and other Adams leave out: loading misses it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A training checkpoint before any byte moves.

    Attributes:
        outline: Its files.
        texts: Small files that complete it, in order.
        groups: Its parameter groups.
        moments: ``(parameter's key, name)`` of all optimizer state.
        beside: Names of what travels beside the tensors.
        left: ``(name, why)`` of what this kind cannot hold.
        notes: What a user should know.
    """

    outline: Outline
    texts: tuple[tuple[str, bytes], ...]
    groups: tuple[Group, ...]
    moments: tuple[tuple[str, str], ...]
    beside: tuple[str, ...]
    left: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Carried:
    """A source on its way into a target.

    Attributes:
        state: The source.
        coverage: Which of its tensors become which.
        beside: What goes along, steps rescaled.
        modulus: Block size of the target's disk.
        chunks: Row chunks of a DCP tensor.
    """

    state: TrainingState
    coverage: Coverage
    beside: Mapping[str, object]
    modulus: int
    chunks: int


def write_dcp(carried: Carried, *, lingua: bool) -> Written:
    """``{"model", "optim"}`` and everything beside them, as ``dcp.save`` writes it.

    Source: torch 2.13 ``distributed/checkpoint/state_dict.py``, ``get_optimizer_state_dict``;
    facebookresearch/lingua@437d680 ``lingua/checkpoint.py``.
    """
    groups = regrouped(carried.state, carried.coverage)
    chunked = carried.chunks
    tensors = list(
        make_plan(
            carried.coverage,
            path_of=lambda key: ("model", key),
            regions=lambda shape: row_chunks(shape, chunked),
        )
    )
    found = [*moment_targets(carried.state, carried.coverage)]
    tensors += [
        _out(target, ("optim", "state", key, kind), chunks=chunked) for key, kind, target in found
    ]
    objects: dict[KeyPath, object] = {}
    for number, group in enumerate(groups):
        items = {**group.values, "params": list(group.params)}
        split(split_for_dcp(("optim", "param_groups", number), items), tensors, objects)
    beside = dict(carried.beside)
    texts: list[tuple[str, bytes]] = []
    left: list[tuple[str, str]] = []
    notes: list[str] = []
    if lingua:
        states = beside.pop("train_states", None)
        if isinstance(states, list):
            texts = [
                (f"train_state_{rank:05d}.json", json.dumps(values).encode())
                for rank, values in enumerate(states)
            ]
        else:
            why = "no train_state_*.json: a data loader's place cannot be invented"
            left.append(("train_state", f"{why}; Lingua then takes the weights as init_ckpt_path"))
        if beside:
            notes.append(f"Lingua does not read {', '.join(beside)}; they lie beside its own keys")
    for name, value in beside.items():
        split(split_for_dcp((name,), value), tensors, objects)
    _refuse_odd(objects)
    return Written(
        outline=dcp.outline(tensors, objects, modulus=carried.modulus),
        texts=tuple(texts),
        groups=groups,
        moments=tuple((key, kind) for key, kind, _ in found),
        beside=(*beside, *(["train_states"] if texts else [])),
        left=tuple(left),
        notes=tuple(notes),
    )


def write_torchtitan(carried: Carried) -> Written:
    """A step that torchtitan resumes from: weights at the top, optimizer state flat under its name.

    Source: torchtitan 0.3.0 ``components/checkpointer/dcp.py`` (``_flattened_model_states_sd``),
    ``components/optimizer/utils.py``, ``lr_scheduler.py``, ``trainer.py`` (``state_dict``).
    """
    groups = regrouped(carried.state, carried.coverage)
    chunked = carried.chunks
    tensors = list(
        make_plan(
            carried.coverage,
            path_of=lambda key: (key,),
            regions=lambda shape: row_chunks(shape, chunked),
        )
    )
    found = [*moment_targets(carried.state, carried.coverage)]
    tensors += [
        _out(target, ("optimizer", f"state.{key}.{kind}"), chunks=chunked)
        for key, kind, target in found
    ]
    objects: dict[KeyPath, object] = {}
    for group in groups:
        values = {**_ADAMW, "initial_lr": group.values.get("lr", 0.0), **group.values}
        for key in group.params:
            for name, value in values.items():
                path: KeyPath = ("optimizer", f"param_groups.{key}.{name}")
                if isinstance(value, TensorEntry):
                    tensors.append(_out(as_stored(value.key, value), path, chunks=1))
                else:
                    objects[path] = value
    unsaid = sorted({key for group in groups for key in _ADAMW if key not in group.values})
    notes = [f"{', '.join(unsaid)} of AdamW are as torch has them"] if unsaid else []
    step = progress.optimizer_step(carried.state)
    objects["train_state", "step"] = step
    objects["train_state", "ntokens_seen"] = 0
    objects["lr_scheduler", "last_epoch"] = step
    _refuse_odd(objects)
    return Written(
        outline=dcp.outline(tensors, objects, modulus=carried.modulus),
        texts=(),
        groups=groups,
        moments=tuple((key, kind) for key, kind, _ in found),
        beside=("train_state", "lr_scheduler"),
        left=(
            ("dataloader", "a data loader's place cannot be invented; exclude it from loading"),
            *((name, "torchtitan has no place for it") for name in carried.beside),
        ),
        notes=(
            *notes,
            f"train_state and lr_scheduler were made for {step} updates; tokens count from 0",
        ),
    )


def write_minimind(carried: Carried, keymap: Keymap, *, filename: str) -> Written:
    """One ``*_resume.pth`` that MiniMind's ``lm_checkpoint`` loads, ids by ``parameters()``."""
    group, left = _merged(regrouped(carried.state, carried.coverage))
    group = Group(group.values, tuple(parameters_in_order(keymap, group.params)))
    counted, notes = progress.minimind_progress(carried.state)
    beside = {**counted, "scaler": {}, **carried.beside}
    if "scaler" not in carried.beside:
        notes += ("the source has no scaler; the file has that of a disabled one",)
    for name, value in list(beside.items()):
        if isinstance(value, Instance) and str(value.cls) == "argparse.Namespace":
            beside[name] = value.state  # torch.load(weights_only=True) takes no Namespace
            notes += (f"{name} is stored as a dict",)
        elif not is_plain(value):
            del beside[name]
            left.append((name, "MiniMind loads with weights_only, which takes plain values alone"))
    tensors = list(make_plan(carried.coverage, path_of=lambda key: ("model", key)))
    objects: dict[KeyPath, object] = {}
    found = optimizer_file(carried, [group], ("optimizer",), tensors, objects)
    require_adamw(group, found)
    for name, value in beside.items():
        split(split_for_file((name,), value), tensors, objects)
    return Written(
        outline=torchfile.outline(tensors, objects, filename=filename, modulus=carried.modulus),
        texts=(),
        groups=(group,),
        moments=tuple((key, kind) for key, kind, _ in found),
        beside=tuple(beside),
        left=tuple(left),
        notes=notes,
    )


def _merged(groups: tuple[Group, ...]) -> tuple[Group, list[tuple[str, str]]]:
    """One group for MiniMind, with the numbers of the largest, and what that loses."""
    largest = max(groups, key=lambda group: len(group.params))
    left = [
        (f"{name} of group {number}", f"{value} becomes {largest.values.get(name)}")
        for number, group in enumerate(groups)
        for name, value in group.values.items()
        if group.params and value != largest.values.get(name)
    ]
    return Group(largest.values, tuple(k for group in groups for k in group.params)), left


def optimizer_file(
    carried: Carried,
    groups: Sequence[Group],
    prefix: KeyPath,
    tensors: list[OutTensor],
    objects: dict[KeyPath, object],
) -> list[tuple[str, str, Target]]:
    """Adds what ``optimizer.state_dict()`` holds: state by id, and groups of ids."""
    order = [key for group in groups for key in group.params]
    number = {key: DictKey(place) for place, key in enumerate(order)}
    found = sorted(
        moment_targets(carried.state, carried.coverage), key=lambda item: number[item[0]]
    )
    tensors += [
        _out(target, (*prefix, "state", number[key], kind), chunks=1) for key, kind, target in found
    ]
    if not found:
        nothing: KeyPath = (*prefix, "state")
        objects[nothing] = {}
    for place, group in enumerate(groups):
        items = {**group.values, "params": [int(number[key]) for key in group.params]}
        for name, value in items.items():
            path: KeyPath = (*prefix, "param_groups", place, name)
            split(split_for_file(path, value), tensors, objects)
    return found


def _out(target: Target, path: KeyPath, *, chunks: int) -> OutTensor:
    regions = row_chunks(target.shape, chunks) if chunks > 1 else whole(target.shape)
    return OutTensor(
        key=key_of(path),
        path=path,
        dtype=target.dtype,
        shape=target.shape,
        chunks=tuple(
            OutChunk(offsets, sizes, fill_of(target, offsets, sizes)) for offsets, sizes in regions
        ),
    )


def split(
    leaves: Iterable[tuple[KeyPath, object]],
    tensors: list[OutTensor],
    objects: dict[KeyPath, object],
) -> None:
    """Adds leaves to the tensors or to the objects of a file."""
    for path, value in leaves:
        if isinstance(value, TensorEntry):
            tensors.append(_out(as_stored(value.key, value), path, chunks=1))
        else:
            objects[path] = value


def _refuse_odd(objects: Mapping[KeyPath, object]) -> None:
    odd = [key_of(path) for path in objects if not all(str(part) for part in path)]
    if odd:
        raise FormatError("a key is empty", [("key", key) for key in odd])
