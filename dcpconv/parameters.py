"""Parameter files by themselves: ``config.json`` into ``params.json`` and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dcpconv import configs
from dcpconv.errors import NotExpressibleError
from dcpconv.keymaps import resolve_family


@dataclass(frozen=True, slots=True)
class Parameters:
    """A parameter file and what it leaves out.

    Attributes:
        name: What the family calls the file.
        text: Its content.
        notes: Features that were left out because the user said so.
    """

    name: str
    text: str
    notes: tuple[str, ...]


def parameters(source: Path, *, to: str, allow: Sequence[str] = ()) -> Parameters:
    """The parameter file of a family for the model at ``source``.

    Args:
        source: A checkpoint, or its parameter file.
        to: The family whose file to write.
        allow: Features to leave out although the family cannot express them.

    Raises:
        SpecError: There is no config, or it cannot be read.
        NotExpressibleError: The family cannot hold the model; all reasons are listed.
    """
    spec = configs.read_spec(source)
    keymap = resolve_family(to, spec.architecture)
    family = keymap.name if keymap.family == "hf" else keymap.config
    refusals = configs.refusals(family, spec)
    refused = [item for item in refusals if item.name not in allow]
    if refused:
        raise NotExpressibleError(
            f"{keymap.name} cannot express this model",
            [("source", source), *(("refused", f"{item.name}: {item.reason}") for item in refused)],
            hint="--allow NAME leaves a feature out; the logits will then differ",
        )
    notes = tuple(
        f"{item.name} is not expressible in {keymap.name} and was left out ({item.reason})"
        for item in refusals
    )
    text = configs.to_text(configs.write_config(family, spec))
    return Parameters(configs.config_name(family) or "", text, notes)
