"""Parameter files by themselves: ``config.json`` into ``params.json`` and back."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dcpconv.core.errors import SpecError
from dcpconv.core.spec import ModelSpec
from dcpconv.families import configs
from dcpconv.plan.account import aim_at
from dcpconv.sources.numbers import require_said
from dcpconv.sources.said import Said
from dcpconv.sources.understanding import Source, understand_described


@dataclass(frozen=True, slots=True)
class Parameters:
    """A parameter file and what it leaves out.

    Attributes:
        name: What the family calls the file.
        text: Its content.
        notes: What its numbers rest on, and features that were left out because the user said so.
    """

    name: str
    text: str
    notes: tuple[str, ...]


def parameters(
    source: str | os.PathLike[str],
    *,
    to: str,
    from_: str | None = None,
    spec: str | Sequence[str] = (),
    allow: Sequence[str] = (),
) -> Parameters:
    """The parameter file of a family for the model at ``source``.

    Args:
        source: A checkpoint, or its parameter file.  Of a checkpoint without one, shapes and
            ``spec`` together have to say every number.
        to: The family whose file to write.
        from_: Naming of a checkpoint without a parameter file, where its keys leave a choice.
        spec: Numbers of the model that no file states, or states wrongly: ``heads=8,kv_heads=2``.
        allow: Features to leave out although the family cannot express them.

    Raises:
        SpecError: There is no config and shapes do not say enough, or it cannot be read.
        NotExpressibleError: The family cannot hold the model; all reasons are listed.
    """
    described = understand_described(source, Said.parse(from_=from_, spec=spec, allow=allow))
    model = _numbers(described)
    table = described.target_table(to)
    going = aim_at(described, table)
    going.require_expressible(undone="nothing was written", allow_by="--allow NAME")
    family = table.parameter_family
    left_out = (
        f"{name} is not expressible in {table.name} and was left out ({why})"
        for name, why in going.allowed
    )
    text = configs.to_text(configs.write_config(family, model))
    return Parameters(configs.config_name(family) or "", text, (*described.notes, *left_out))


def _numbers(source: Source) -> ModelSpec:
    """The model's numbers, all of them.

    Raises:
        SpecError: Some are not known; says how to state them.
    """
    if source.parameters is not None and source.spec is not None:
        return source.spec
    table = source.weights.require_keymap()
    if source.spec is None:
        raise SpecError(
            "no parameter file, and shapes do not say how many heads there are",
            [("source", source.end.path), ("family", table.name)],
            hint="--spec heads=N,kv_heads=M says it",
        )
    require_said(source.spec, source.weights)
    nbytes: Counter[str] = Counter()
    for entry in source.weights.entries.values():
        nbytes[entry.dtype.label] += entry.nbytes if entry.dtype.is_floating_point else 0
    return source.spec.model_copy(update={"dtype": max(nbytes, key=lambda label: nbytes[label])})
