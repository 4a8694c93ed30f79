"""Parameter files: each family's own, read into a ``ModelSpec`` and written from one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from dcpconv.core.errors import SpecError
from dcpconv.core.spec import ModelSpec
from dcpconv.families.configs import chatglm, hf, hf_writing, lingua, meta, minimind, torchtitan
from dcpconv.families.configs.parameters import Refusal, read_fields

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

_NAMES = (hf.FILE, lingua.FILE)
"""In order of preference: Mistral publishes both, and its params.json says less."""

_Recognises = Callable[[Mapping[str, object]], bool]
_Reads = Callable[[Mapping[str, object], Path], ModelSpec]
_READERS: tuple[tuple[_Recognises, _Reads], ...] = (
    (lingua.is_params, lingua.read),
    (minimind.is_config, minimind.read),
    (chatglm.is_config, chatglm.read),
    (meta.is_params, meta.read),
    (hf.is_config, hf.read),
)


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
    for recognises, read in _READERS:
        if recognises(fields):
            return read(fields, file)
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
    if family in {"lingua", "meta"}:
        return lingua.FILE
    if family in {*minimind.FAMILIES, *chatglm.FAMILIES} or _is_hf(family):
        return hf.FILE
    return None


def refusals(family: str, spec: ModelSpec) -> tuple[Refusal, ...]:
    """What ``family`` cannot hold of ``spec``, in the order of ``ModelSpec.features``.

    Empty for a family without a parameter file, which promises nothing.  A model that already is
    in ``family`` need not be asked about.
    """
    if family == "lingua":
        return lingua.refusals(spec)
    if family == "meta":
        return meta.refusals(spec)
    if family in minimind.FAMILIES:
        return minimind.refusals(family, spec)
    if family in chatglm.FAMILIES:
        return chatglm.refusals(family, spec)
    if family in torchtitan.FAMILIES:
        return torchtitan.refusals(family, spec)
    return hf_writing.refusals(_model_type(family, spec), spec) if _is_hf(family) else ()


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
    if family == "lingua":
        return lingua.write(spec, tokenizer=tokenizer, dtype=dtype, name=name)
    if family == "meta":
        return meta.write(spec)
    if family in minimind.FAMILIES:
        return minimind.write(family, spec, dtype=dtype)
    if family in chatglm.FAMILIES:
        return chatglm.write(family, spec, dtype=dtype)
    if _is_hf(family):
        return hf_writing.write(spec, model_type=_model_type(family, spec), dtype=dtype)
    raise SpecError("family has no parameter file", [("family", family)])


def to_text(fields: Mapping[str, object]) -> str:
    """``fields`` as the text of a JSON file."""
    # Not escaped: Lingua reads YAML, in which an escaped surrogate pair is no character.
    return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _is_hf(family: str) -> bool:
    return family == "hf" or family.startswith("hf-")


def _model_type(family: str, spec: ModelSpec) -> str:
    if not family.startswith("hf-"):
        return spec.architecture
    named = family.removeprefix("hf-")
    return spec.architecture if hf.SAME_KEYS.get(spec.architecture) == named else named
