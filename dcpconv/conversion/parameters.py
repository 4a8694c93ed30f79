"""Parameter files by themselves: ``config.json`` into ``params.json`` and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dcpconv.core.errors import SpecError
from dcpconv.core.spec import ModelSpec
from dcpconv.families import configs
from dcpconv.families.configs.patching import parse_pairs, patched_spec
from dcpconv.families.keymaps import resolve_family
from dcpconv.formats.opening import open_checkpoint
from dcpconv.plan.refusals import parse_allowed, refused_features, require_expressible
from dcpconv.sources.numbers import require_said
from dcpconv.sources.settling import settle


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
    source: Path,
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
    model, notes = _model(source, from_, parse_pairs(spec))
    keymap = resolve_family(to, model.architecture)
    family = keymap.parameter_family
    features = refused_features(keymap, model)
    require_expressible(
        keymap,
        features,
        parse_allowed(allow),
        source=source,
        undone="nothing was written",
        allow_by="--allow NAME",
    )
    left_out = (
        f"{item.key} is not expressible in {keymap.name} and was left out ({item.why})"
        for item in features
    )
    text = configs.to_text(configs.write_config(family, model))
    return Parameters(configs.config_name(family) or "", text, (*notes, *left_out))


def _model(
    source: Path, from_: str | None, sizes: dict[str, str]
) -> tuple[ModelSpec, tuple[str, ...]]:
    is_file = source.is_file() and source.suffix == ".json"
    if is_file or configs.find_config(source) is not None:
        spec = configs.read_spec(source)
        return (patched_spec(spec, sizes) if sizes else spec), ()
    catalog = open_checkpoint(source)
    weights, model, notes = settle(catalog, None, from_=from_, sizes=sizes)
    table = weights.require_keymap()
    if model is None:
        raise SpecError(
            "no parameter file, and shapes do not say how many heads there are",
            [("source", source), ("family", table.name)],
            hint="--spec heads=N,kv_heads=M says it",
        )
    require_said(model, weights)
    floats = {entry.dtype.label: 0 for entry in weights.entries.values()}
    for entry in weights.entries.values():
        floats[entry.dtype.label] += entry.nbytes if entry.dtype.is_floating_point else 0
    return model.model_copy(update={"dtype": max(floats, key=lambda label: floats[label])}), notes
