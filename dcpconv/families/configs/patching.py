"""Numbers of a model that a person states: ``--spec heads=8,kv_heads=2``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dcpconv.core.errors import SpecError
from dcpconv.core.record import ValidationError
from dcpconv.core.spec import ModelSpec

_NAMES = {
    "heads": "n_heads",
    "kv_heads": "n_kv_heads",
    "layers": "n_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_size",
    "vocab": "vocab_size",
    "eps": "norm_eps",
    "theta": "rope_theta",
    "top_k": "experts.per_token",
}
"""What ``--spec`` takes, beside the fields themselves."""


def parse_pairs(texts: str | Iterable[str]) -> dict[str, str]:
    """Fields and values of ``heads=8,kv_heads=2``, as text; of one such text or several.

    Raises:
        SpecError: Lists what is no pair or no field.

    >>> parse_pairs(["heads=8,kv_heads=2"])
    {'n_heads': '8', 'n_kv_heads': '2'}
    """
    found: dict[str, str] = {}
    wrong: list[str] = []
    said = [texts] if isinstance(texts, str) else texts
    for item in (item.strip() for text in said for item in text.split(",")):
        name, equals, value = (part.strip() for part in item.partition("="))
        field = _NAMES.get(name, name)
        top = field.split(".")[0]
        if not equals or not value or top not in ModelSpec.model_fields:
            wrong.append(item)
        else:
            found[field] = value
    if wrong:
        raise SpecError(
            "not a size of a model",
            [*(("found", item) for item in wrong), ("expected", f"{', '.join(_NAMES)}, ...")],
            hint="write --spec heads=8,kv_heads=2",
        )
    return found


def patched_spec(spec: ModelSpec, pairs: Mapping[str, str]) -> ModelSpec:
    """``spec`` with the fields in ``pairs`` replaced.

    Args:
        spec: What files say.
        pairs: From ``parse_pairs``.

    Raises:
        SpecError: A value does not fit its field, or contradicts another.
    """
    return built_spec(spec.model_dump(), pairs)


def built_spec(fields: Mapping[str, Any], pairs: Mapping[str, str]) -> ModelSpec:
    """The spec of ``fields`` with those in ``pairs`` replaced.

    Raises:
        SpecError: A value does not fit its field, or contradicts another.
    """
    return _validated(_merged(dict(fields), pairs), pairs)


def _merged(fields: dict[str, Any], pairs: Mapping[str, str]) -> dict[str, Any]:
    for path, text in pairs.items():
        *outer, name = path.split(".")
        holder = fields
        for part in outer:
            held = holder.get(part)
            holder[part] = holder = dict(held) if isinstance(held, dict) else {}
        holder[name] = _value(text)
    return fields


def _value(text: str) -> object:
    words: dict[str, object] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if text.lstrip("-").isdigit():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _validated(fields: Mapping[str, Any], pairs: Mapping[str, str]) -> ModelSpec:
    try:
        return ModelSpec.model_validate(dict(fields))
    except ValidationError as error:
        facts = [
            ("field", f"{'.'.join(map(str, item.loc)) or 'spec'}: {item.msg}")
            for item in error.problems
        ]
        raise SpecError(
            "these numbers do not describe a model",
            [*facts, *(("said", f"{name}={value}") for name, value in pairs.items())],
        ) from None
