"""The parameter file beside a checkpoint: which model it names, before anyone reads its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dcpconv.core.errors import SpecError
from dcpconv.core.spec import ModelSpec
from dcpconv.families import configs
from dcpconv.families.configs.parameters import read_fields


@dataclass(frozen=True, slots=True)
class ParameterFile:
    """A config.json or params.json.

    Attributes:
        file: Where it lies.
        fields: What it says.
        architecture: The model that it names: ``model_type`` in config.json, ``llama`` for Lingua
            and Meta; empty where it names none.
        classes: What ``architectures`` lists.
        trouble: Why its numbers cannot be read; empty where they can, or nobody asked for them.
        spec: Its numbers, where they can be read.
    """

    file: Path
    fields: Mapping[str, object]
    architecture: str
    classes: tuple[str, ...] = ()
    trouble: str = ""
    spec: ModelSpec | None = None

    @property
    def quantized_by(self) -> str:
        """What packed the weights (``fp8``, ``gptq``, ``bitsandbytes``); empty for plain ones."""
        stated = self.fields.get("quantization_config")
        if not isinstance(stated, Mapping):
            return ""
        return str(stated.get("quant_method") or "a tool that it does not name")


def read_parameter_file(place: Path) -> ParameterFile | None:
    """The parameter file of ``place``: that file, or the one in or beside it.

    Raises:
        SpecError: It is no JSON object.
    """
    file = configs.find_config(place) or (place if place.suffix == ".json" else None)
    if file is None or not file.is_file():
        return None
    fields = read_fields(file)
    listed = fields.get("architectures")
    classes = tuple(map(str, listed)) if isinstance(listed, list) else ()
    named = fields.get("model_type")
    try:
        spec = configs.read_spec(file)
    except SpecError as error:
        return ParameterFile(file, fields, str(named or ""), classes, error.in_one_line)
    return ParameterFile(file, fields, spec.architecture, classes, "", spec)
