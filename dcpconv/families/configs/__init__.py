"""Parameter files: each family's own, read into a ``ModelSpec`` and written from one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dcpconv.core.errors import SpecError
from dcpconv.core.spec import ModelSpec
from dcpconv.families.configs.parameters import Refusal, Wishes, read_fields
from dcpconv.families.family import CONFIG, PARAMS, family_of, family_of_fields

__all__ = [
    "Refusal",
    "config_name",
    "find_config",
    "home",
    "read_spec",
    "refusals",
    "to_text",
    "write_config",
]

_NAMES = (CONFIG, PARAMS)
"""In order of preference: Mistral publishes both, and its params.json says less."""


def find_config(path: Path) -> Path | None:
    """The parameter file of the checkpoint at ``path``, or ``None`` where there is none.

    It is ``path`` itself, or lies in the directory ``path``, or beside the file ``path``; or in
    the folder ``huggingface`` there.
    """
    if path.is_file() and path.suffix == ".json" and path.name in _NAMES:
        return path
    directory = home(path if path.is_dir() else path.parent)
    return next((file for name in _NAMES if (file := directory / name).is_file()), None)


def home(directory: Path) -> Path:
    """Where config and tokenizer of a checkpoint are: its directory, or ``huggingface`` in it.

    Source: verl 0.4 to 0.7 ``verl/utils/checkpoint/fsdp_checkpoint_manager.py``.
    """
    if any((directory / name).is_file() for name in _NAMES):
        return directory
    inner = directory / "huggingface"
    return inner if any((inner / name).is_file() for name in _NAMES) else directory


def read_spec(path: Path) -> ModelSpec:
    """What the parameter file of ``path`` says; ``path`` is that file or a checkpoint.

    Raises:
        SpecError: There is no such file, no family recognises it, or fields do not fit; facts list
            every one of them.
    """
    file = path if path.is_file() and path.suffix == ".json" else find_config(path)
    if file is None:
        raise SpecError(
            "no parameter file",
            [("looked in", path), *(("for", name) for name in _NAMES)],
        )
    fields = read_fields(file)
    family = family_of_fields(fields)
    if family is not None:
        spec: ModelSpec = family.reading.read(fields, file)
        return spec
    raise SpecError(
        "parameter file is of no known family",
        [
            ("file", file),
            ("expected", "model_type (Hugging Face), model (Lingua) or dim and n_layers (Meta)"),
            ("found", ", ".join(list(fields)[:8]) or "no fields"),
        ],
    )


def config_name(family: str) -> str | None:
    """Name of the parameter file we write for ``family``, or ``None`` where we write none."""
    known = family_of(family)
    return None if known is None else known.file


def refusals(family: str, spec: ModelSpec) -> tuple[Refusal, ...]:
    """What ``family`` cannot hold of ``spec``, in the order of ``ModelSpec.features``.

    Empty for a family without a parameter file, which promises nothing.  A model that already is
    in ``family`` need not be asked about.
    """
    known = family_of(family)
    found: tuple[Refusal, ...] = () if known is None else known.configs.refusals(family, spec)
    return found


def write_config(
    family: str,
    spec: ModelSpec,
    *,
    dtype: str | None = None,
    tokenizer: tuple[str, str] | None = None,
    name: str = "lingua",
) -> dict[str, object]:
    """The parameter file of ``family`` for ``spec``, as ``to_text`` should print it.

    Args:
        family: ``config`` of a table: ``lingua``, ``minimind2``, ``hf`` (the class that ``spec``
            names) or ``hf-<model_type>``, which
            leaves ``spec`` its own class where both name their tensors alike.
        spec: What to describe.
        dtype: Label or torch name of the written tensors, by default what ``spec`` says.
        tokenizer: Lingua's name for its kind, and its path; only Lingua's file has it.
        name: Of the run; only Lingua's file has it.

    Raises:
        SpecError: The family has no parameter file, or a field it needs is not known.
        NotExpressibleError: No config.json is written for this class.
    """
    if spec.vocab_size is None:
        raise SpecError("vocab_size is not known", hint="take it from the embedding's shape")
    known = family_of(family)
    if known is None or known.file is None:
        raise SpecError("family has no parameter file", [("family", family)])
    wishes = Wishes(dtype, tokenizer, name)
    fields: dict[str, object] = known.configs.write(family, spec, wishes)
    return fields


def to_text(fields: Mapping[str, object]) -> str:
    """``fields`` as the text of a JSON file."""
    # Not escaped: Lingua reads YAML, in which an escaped surrogate pair is no character.
    return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
