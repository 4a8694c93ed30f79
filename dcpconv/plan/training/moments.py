"""Optimizer state relabelled exactly like its parameters, by the very pieces that fill them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from dcpconv.core.catalog import TensorEntry
from dcpconv.core.dtypes import BY_NAME
from dcpconv.plan.coverage import Coverage, Target
from dcpconv.plan.training.state import Group, OptimizerError, TrainingState, read_scalar


def moment_targets(state: TrainingState, coverage: Coverage) -> Iterator[tuple[str, str, Target]]:
    """``(parameter's key, name, tensor)`` for all optimizer state of the result.

    A tensor of the parameter's shape goes through the parameter's pieces; one of a single element,
    such as ``step``, must be the same in all of them.  Nothing is cast.

    Raises:
        OptimizerError: State is lacking for a part of a target, is of another shape than its
            parameter, or differs between parts that become one tensor; all are listed.
    """
    sources = sources_of(state, coverage)
    refused: list[tuple[str, object]] = []
    made: list[tuple[str, str, Target]] = []
    for target in coverage.targets:
        names = sources.get(target.key, ())
        found = [_moments_of(state, coverage, name) for name in names]
        if not any(found):
            continue
        kinds = list(dict.fromkeys(kind for moments in found for kind in moments))
        for kind in kinds:
            entries = [moments[kind] for moments in found if kind in moments]
            if len(entries) < len(names):
                refused.append(("lacking", f"{kind} of a part of {target.key}"))
                continue
            made_target, why = _target(state, target, entries)
            if made_target is None:
                refused.append(("refused", f"{kind} of {target.key}: {why}"))
            else:
                made.append((target.key, kind, made_target))
    if refused:
        raise OptimizerError("optimizer state cannot follow its parameters", refused)
    yield from made


def require_adamw(group: Group, found: Sequence[tuple[str, str, Target]]) -> None:
    """Raises where the state is not that of ``torch.optim.AdamW``, which alone can resume from it.

    Raises:
        OptimizerError: A parameter that has state lacks some, or has state of another kind.
    """
    kinds: dict[str, list[str]] = {}
    for key, kind, _ in found:
        kinds.setdefault(key, []).append(kind)
    refused: list[tuple[str, object]] = []
    for key, own in kinds.items():
        lacking = [kind for kind in _ADAMW if kind not in own]
        strange = [kind for kind in own if kind not in {*_ADAMW, "max_exp_avg_sq"}]
        if lacking or strange:
            refused.append(("parameter", f"{key}: {_difference(lacking, strange)}"))
    if not kinds and group.values and "betas" not in group.values:
        refused.append(("missing", f"{', '.join(_ADAMW)}; the group has {', '.join(group.values)}"))
    if refused:
        more = [("parameter", f"and {len(refused) - 8} more")] if len(refused) > 8 else []
        raise OptimizerError(
            "the optimizer is not AdamW, and AdamW cannot resume from its state",
            [*refused[:8], *more],
            hint="carry the run --to dcp, or start from its weights with `dcpconv convert`",
        )


_ADAMW: Final = ("step", "exp_avg", "exp_avg_sq")


def _difference(lacking: Sequence[str], strange: Sequence[str]) -> str:
    words = [f"lacks {', '.join(lacking)}"] if lacking else []
    return " and ".join([*words, *([f"has {', '.join(strange)}"] if strange else [])])


def sources_of(state: TrainingState, coverage: Coverage) -> dict[str, tuple[str, ...]]:
    """The source's bare keys behind every target that is a parameter: neither a second name nor
    computed, and one name per piece."""
    bare = {entry.key: key for key, entry in state.weights.entries.items()}
    return {
        target.key: tuple(bare[piece.entry.key] for piece in target.pieces)
        for target in coverage.targets
        if target.tied_to is None and target.values is None
    }


def regrouped(state: TrainingState, coverage: Coverage) -> tuple[Group, ...]:
    """The source's parameter groups with the target's keys in them, in the source's order.

    Raises:
        OptimizerError: Parts of one target are in groups with different numbers.
    """
    group_of = {name: n for n, group in enumerate(state.groups) for name in group.params}
    place_of = {name: n for group in state.groups for n, name in enumerate(group.params)}
    members: list[list[tuple[int, str]]] = [[] for _ in state.groups]
    refused: list[tuple[str, object]] = []
    for key, names in sources_of(state, coverage).items():
        owners = [_owner(state, coverage, name, group_of) for name in names]
        known = [owner for owner in owners if owner is not None]
        if not known:
            continue
        values = [state.groups[group_of[owner]].values for owner in known]
        if len(known) < len(owners) or any(value != values[0] for value in values):
            refused.append(("group", f"parts of {key} are trained differently"))
        members[group_of[known[0]]].append((place_of[known[0]], key))
    if refused:
        raise OptimizerError("parameters of different groups would become one", refused)
    return tuple(
        Group(group.values, tuple(key for _, key in sorted(found, key=lambda item: item[0])))
        for group, found in zip(state.groups, members, strict=True)
    )


def _owner(
    state: TrainingState, coverage: Coverage, name: str, known: Mapping[str, object]
) -> str | None:
    """The name under which the optimizer knows a parameter: a tied one may have another."""
    if name in known:
        return name
    for one, other in (*coverage.tied, *state.weights.tied.items(), *_ties(state)):
        if name in {one, other}:
            second = other if name == one else one
            # A second name that is there as well has no state of its own.
            if second in known and second not in state.weights.entries:
                return second
    return None


def _ties(state: TrainingState) -> Iterator[tuple[str, str]]:
    keymap = state.weights.keymap
    for tie in keymap.ties if keymap else ():
        yield tie.key, tie.owner


def _moments_of(
    state: TrainingState, coverage: Coverage, name: str
) -> Mapping[str, TensorEntry | float]:
    owner = _owner(state, coverage, name, state.moments)
    return state.moments[owner] if owner is not None else {}


def _target(
    state: TrainingState, target: Target, found: list[TensorEntry | float]
) -> tuple[Target | None, str]:
    numbers = {value for value in found if not isinstance(value, TensorEntry)}
    if len(numbers) == 1 and numbers == {*found}:
        value = float(*numbers)
        return Target(
            target.key, (), BY_NAME["float32"], (), slots=target.slots, values=(value,)
        ), ""
    entries = [entry for entry in found if isinstance(entry, TensorEntry)]
    if numbers:
        return None, f"its parts have different values: {sorted(map(str, numbers))}"
    dtypes = {entry.dtype for entry in entries}
    if len(dtypes) > 1:
        return None, "made of tensors of different types"
    shapes = [piece.entry.shape for piece in target.pieces]
    if [entry.shape for entry in entries] == shapes:
        pieces = tuple(
            replace(piece, entry=entry) for piece, entry in zip(target.pieces, entries, strict=True)
        )
        return replace(target, dtype=entries[0].dtype, pieces=pieces), ""
    if all(entry.shape == () for entry in entries):
        values = {read_scalar(state.root, entry) for entry in entries} if len(entries) > 1 else {}
        if len(values) > 1:
            return None, f"its parts have different values: {sorted(map(str, values))}"
        piece = replace(target.pieces[0], entry=entries[0], placed=None, wanted=None, limit={})
        return (
            Target(target.key, (), entries[0].dtype, (piece,), slots=target.slots),
            "",
        )
    shape = next(e.shape for e, s in zip(entries, shapes, strict=True) if e.shape != s)
    return None, f"shape {list(shape)} is not the parameter's"
