"""The tensors of a live transformers model, made of what its published files hold.

The conversion that transformers would carry out on whole tensors is carried out on what is known
of them from headers, so that each becomes pieces that any shard can be filled from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from dcpconv.core.catalog import Shapes, TensorEntry
from dcpconv.core.errors import LayoutError
from dcpconv.families.keymaps import is_known
from dcpconv.plan.composed import Composed
from dcpconv.plan.coverage import Coverage, Fault, Target, as_stored
from dcpconv.plan.operations import UntranslatableError, carry_out, target_keys
from dcpconv.sources.live_models import ConversionGroup, LiveModel
from dcpconv.sources.recognition import Weights

_FAMILIES = frozenset({"hf", "hf-memory"})
"""Namings whose keys transformers itself can read."""


def spells_like_files(weights: Weights, model: LiveModel) -> bool:
    """Whether a source's keys are ones that the model's own conversion starts from.

    Those of another class are not, where a table knows what the model's class calls them.
    """
    table, kind = weights.keymap, model.model_type
    if table is None:
        return True
    return table.family in _FAMILIES and (kind in table.architectures or not is_known(kind))


def cover_in_memory(weights: Weights, model: LiveModel, wanted: Shapes) -> Coverage:
    """The account of a checkpoint under the keys that a model has in memory.

    What nothing makes is missing only where there is something to say about it; targets may be
    more than what is wanted.

    Args:
        weights: The source, as transformers publishes it or already as the model spells it.
        model: The model's names.
        wanted: Its tensors.
    """
    stored, groups = _spelled(weights, model, wanted)
    made: dict[str, Target] = {}
    lost: dict[str, str] = {}
    refused: list[Fault] = []
    unknown: list[Fault] = []
    ignored: list[Fault] = []
    for group in groups:
        keys = [key for some in group.sources.values() for key in some]
        if not group.operations:
            (key,) = keys
            if group.first in made:
                first = made[group.first].pieces[0].entry.key
                unknown.append(Fault(key, f"{first} is {group.first} already"))
            elif group.first not in wanted and model.passes_over(group.first):
                ignored.append(Fault(key, f"{model.name} has no use for it"))
            else:
                made[group.first] = as_stored(group.first, stored[key])
            continue
        why = _hindrance(group, stored, wanted)
        if not why:
            try:
                made |= _converted(group, stored, wanted)
                continue
            except UntranslatableError as error:
                refused.append(Fault(group.first, f"made of {keys[0]}: {error.headline}"))
                why = error.headline
            except LayoutError as error:
                facts = ", ".join(f"{label} {value}" for label, value in error.facts)
                why = f"{error.headline} ({facts})"
        lost |= dict.fromkeys(target_keys(group), why)
        ignored.extend(Fault(key, f"would be {group.first}") for key in keys)
    for name, owner in _second_names(model, wanted, made):
        made[name] = replace(made[owner], key=name, tied_to=owner)
    for key, name in model.published(wanted.keys() - made.keys() - lost.keys()).items():
        if name != key:
            lost[key] = f"needs {name}"
    return Coverage(
        weights.keymap.name if weights.keymap else "as stored",
        model.name,
        tuple(made.values()),
        missing=tuple(Fault(key, why) for key, why in lost.items() if key not in made),
        unknown=tuple(unknown),
        refused=tuple(refused),
        ignored=tuple(ignored),
        tied=tuple(weights.tied.items()),
        left=weights.rest,
        is_tied=bool(model.tied),
    )


def _spelled(
    weights: Weights, model: LiveModel, wanted: Shapes
) -> tuple[Mapping[str, TensorEntry], tuple[ConversionGroup, ...]]:
    """The source's tensors, with or without the container they were saved in, whichever the model
    has more use for."""
    bare, whole = weights.entries, weights.catalog.tensors
    found = model.groups(bare, wanted)
    if bare.keys() == whole.keys():
        return bare, found
    other = model.groups(whole, wanted)
    if _reached(other, wanted) > _reached(found, wanted):
        return whole, other
    return bare, found


def _reached(groups: Sequence[ConversionGroup], wanted: Shapes) -> int:
    return sum(group.first in wanted for group in groups)


def _converted(
    group: ConversionGroup, stored: Mapping[str, TensorEntry], wanted: Shapes
) -> dict[str, Target]:
    dtypes = {stored[key].dtype for some in group.sources.values() for key in some}
    if len(dtypes) > 1:
        names = ", ".join(sorted(dtype.label for dtype in dtypes))
        raise LayoutError("its sources have several element types", [("found", names)])
    parts = {
        pattern: [Composed.stored(stored[key]) for key in keys]
        for pattern, keys in group.sources.items()
    }
    results = carry_out(group, parts, wanted)
    (dtype,) = dtypes
    how = ("as published", ", ".join(operation.name for operation in group.operations))
    made = {}
    for key, composed in results.items():
        pieces = composed.pieces()
        is_moved = any(piece.wanted is not None for piece in pieces)
        made[key] = Target(key, composed.shape, dtype, pieces, relabelled=how if is_moved else None)
    return made


def _hindrance(group: ConversionGroup, stored: Mapping[str, TensorEntry], wanted: Shapes) -> str:
    """Which sources a group lacks, or which are unlike the others; empty if none."""
    needs: list[str] = []
    length = max(map(len, group.sources.values()))
    for pattern in group.source_patterns:
        keys = group.sources.get(pattern, ())
        if not keys:
            needs.append(f"a key with {pattern}")
        elif len(keys) > 1 or length > 1:
            needs.extend(_gaps(keys, max(length, _stacked(group, wanted))))
    if needs:
        return f"needs {', '.join(needs)}"
    for keys in group.sources.values():
        shapes = {stored[key].shape for key in keys}
        if len(shapes) > 1:
            odd = min(keys, key=lambda key: sum(stored[k].shape == stored[key].shape for k in keys))
            return f"{odd} {list(stored[odd].shape)} is unlike the others"
    return ""


def _stacked(group: ConversionGroup, wanted: Shapes) -> int:
    """How many tensors a stack should have, as the model says."""
    first = group.operations[0]
    shape = wanted.get(group.first, ())
    if first.name != "MergeModulelist" or not shape:
        return 0
    return shape[int(first.arguments["dim"])]


def _gaps(keys: Sequence[str], count: int) -> Iterator[str]:
    """Keys that a numbered list lacks."""
    split = [key.split(".") for key in keys]
    places = [at for at, some in enumerate(zip(*split, strict=False)) if len(set(some)) > 1]
    if len(places) != 1 or len({len(parts) for parts in split}) != 1:
        return
    (at,) = places
    numbers = {int(parts[at]) for parts in split if parts[at].isdigit()}
    count = max(count, max(numbers, default=-1) + 1)
    if len(numbers) != len(keys):
        return
    for number in range(count):
        if number not in numbers:
            yield ".".join((*split[0][:at], str(number), *split[0][at + 1 :]))


def _second_names(
    model: LiveModel, wanted: Shapes, made: Mapping[str, Target]
) -> list[tuple[str, str]]:
    """Wanted keys that nothing makes, and what they are tied to."""
    sets: dict[str, set[str]] = {}
    for name, owner in model.tied.items():
        joined = sets.get(name, {name}) | sets.get(owner, {owner})
        sets |= dict.fromkeys(joined, joined)
    found: list[tuple[str, str]] = []
    for name, names in sets.items():
        if name in wanted and name not in made:
            found.extend((name, one) for one in sorted(names & made.keys())[:1])
    return found
