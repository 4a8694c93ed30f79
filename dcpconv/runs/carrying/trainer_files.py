"""Lays out what Hugging Face Trainer resumes from.

Memory: names and headers, never a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from dcpconv.core.catalog import KeyPath
from dcpconv.core.errors import FormatError
from dcpconv.core.outline import Outline, OutTensor
from dcpconv.families.keymaps import Keymap
from dcpconv.formats import safetensors, torchfile
from dcpconv.plan.fills import make_plan
from dcpconv.plan.training.adapters import adapter_in_order
from dcpconv.plan.training.moments import regrouped
from dcpconv.plan.training.order import by_decay, parameters_in_order
from dcpconv.plan.training.state import Group, TrainingState, split_for_file
from dcpconv.runs.carrying import progress
from dcpconv.runs.carrying.writing import Carried, Written, optimizer_file, split
from dcpconv.sources.adapters.spotting import WEIGHTS

_TRAINER_FILES: Final = ("scheduler", "scaler", "rng_state")
"""Entries that Trainer keeps in a ``torch.save`` file each; RNG states may have a rank."""


def write_trainer(carried: Carried, keymap: Keymap | None) -> Written:
    """A ``checkpoint-N`` directory that Hugging Face Trainer resumes from.

    Args:
        carried: The source.
        keymap: The naming of the weights; ``None`` for an adapter, which PEFT names.

    Source: transformers 5.23 ``trainer.py``, ``_save_checkpoint``.
    """
    state = carried.state
    groups, notes = _as_trainer_groups(state, regrouped(state, carried.coverage), keymap)
    weights = make_plan(carried.coverage, path_of=lambda key: (key,))
    if keymap is None:
        parts = [Outline((safetensors.one_file(WEIGHTS[0], weights, modulus=carried.modulus),))]
    else:
        limit = safetensors.MAX_FILE_SIZE
        parts = [safetensors.outline(weights, modulus=carried.modulus, max_file_size=limit)]
    tensors: list[OutTensor] = []
    objects: dict[KeyPath, object] = {}
    found = optimizer_file(carried, groups, (), tensors, objects)
    parts.append(_file("optimizer.pt", tensors, objects, carried.modulus))

    beside = dict(carried.beside)
    texts: list[tuple[str, bytes]] = []
    held = []
    if "scheduler" not in beside:
        step = progress.optimizer_step(state)
        beside["scheduler"] = progress.scheduler(groups, step)
        notes.append(f"the source has no scheduler; scheduler.pt stands at step {step}")
    counted = beside.pop("trainer_state", None)
    if counted is None:
        counted = progress.trainer_state(state)
        notes.append(f"trainer_state.json was made for {counted['global_step']} updates")
    left = []
    for name, value in beside.items():
        if name == "training_args" and isinstance(value, bytes):
            texts.append(("training_args.bin", value))
        elif name.startswith(_TRAINER_FILES) and isinstance(value, Mapping) and value:
            tensors, objects = [], {}
            for key, item in value.items():
                split(split_for_file((str(key),), item), tensors, objects)
            suffix = "pth" if name.startswith("rng_state") else "pt"
            parts.append(_file(f"{name}.{suffix}", tensors, objects, carried.modulus))
        else:
            left += [(name, "Trainer has no file for it")] if value != {} else []
            continue
        held.append(name)
    # Written last: Trainer and `dcpconv runs` take it for the end of the save.
    texts.append(
        ("trainer_state.json", (json.dumps(counted, indent=2, sort_keys=True) + "\n").encode())
    )
    return Written(
        outline=Outline(
            tuple(file for part in parts for file in part.files),
            tuple(item for part in parts for item in part.commit),
        ),
        texts=tuple(texts),
        groups=tuple(groups),
        moments=tuple((key, kind) for key, kind, _ in found),
        beside=(*held, "trainer_state"),
        left=tuple(left),
        notes=tuple(notes),
    )


def _as_trainer_groups(
    state: TrainingState, groups: tuple[Group, ...], keymap: Keymap | None
) -> tuple[list[Group], list[str]]:
    """Parameters that decay and those that do not, in Trainer's order."""
    params = [key for group in groups for key in group.params]
    if keymap is not None:
        every = parameters_in_order(keymap, params)
    else:
        trained = set(params)
        every = [key for key in adapter_in_order(state) if key in trained]
    value_of = {key: group.values for group in groups for key in group.params}
    made = []
    notes = []
    for keys, what in zip(by_decay(every), ("decays", "does not decay"), strict=True):
        values = [value_of[key] for key in keys]
        if any(value != values[0] for value in values):
            raise FormatError(
                "parameters that Trainer puts into one group are trained differently",
                [("group", f"what {what}"), ("found", f"{len(groups)} groups in the source")],
            )
        made.append(Group(values[0] if values else groups[-1].values, tuple(keys)))
    if len({id(values) for values in value_of.values()}) == 1 and every:
        decay = made[1].values.get("weight_decay")
        notes.append(f"one group became Trainer's two; norms keep their weight decay of {decay}")
    return made, notes


def _file(
    name: str, tensors: Sequence[OutTensor], objects: Mapping[KeyPath, object], modulus: int
) -> Outline:
    return torchfile.outline(tensors, objects, filename=name, modulus=modulus)
