"""Text from outside becomes checked values, and every bad field is named at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from dcpconv.core.errors import FormatError, SpecError
from dcpconv.core.record import Record, ValidationError
from dcpconv.core.spec import ModelSpec
from dcpconv.stores.local import read_regular

R = TypeVar("R", bound=Record)

LARGEST_FILE = 16 * 2**20
"""Bytes.  Published parameter files are below 100 kB; anything near this is not one."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing a family cannot hold.

    Attributes:
        name: What ``--allow`` takes: a name from ``ModelSpec.features`` or of a family's own rule.
        reason: The value, and why it does not fit.
        kind: Whether the model has something that the family has nothing for, lacks something that
            every model of the family has, or breaks a rule of the family's own.
    """

    name: str
    reason: str
    kind: Literal["unexpressed", "absent", "rule"] = "rule"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a parameter file should say beside the model.

    Attributes:
        dtype: Label or torch name of the written tensors, by default what the model says.
        tokenizer: Lingua's name for its kind (``sp``, ``tiktoken``, ``bytes``) and its path.  By
            default ``bytes``, as in Lingua, which loads anywhere and fits a vocabulary of 258.
        name: Of the run, in Lingua's file.
    """

    dtype: str | None = None
    tokenizer: tuple[str, str] | None = None
    name: str = "lingua"


def unexpressed(
    spec: ModelSpec,
    expresses: frozenset[str],
    *,
    name: str,
    requires: frozenset[str] = frozenset(),
) -> list[Refusal]:
    """Features of ``spec`` that a family lacks, and features of the family that ``spec`` lacks.

    Args:
        spec: The model.
        expresses: Features that the family can hold.
        name: Of the family, for the reasons.
        requires: Features that every model of the family has.
    """
    features = spec.features()
    return [
        *(
            Refusal(feature, f"{value}: {name} has nothing for it", "unexpressed")
            for feature, value in features.items()
            if feature not in expresses
        ),
        *(
            Refusal(feature, f"absent: every {name} has it", "absent")
            for feature in sorted(requires - features.keys())
        ),
    ]


_TURNED = {
    **dict.fromkeys(("glm", "glm4"), "neighbouring channels"),
    **dict.fromkeys(("glm4_moe", "minimax_m2", "phi3"), "halves"),
    **dict.fromkeys(("gpt_neox", "phi", "stablelm"), "halves"),
}
"""What RoPE pairs within the share of a head that it turns, by class."""


def turned_otherwise(spec: ModelSpec, model_type: str, *, name: str) -> list[Refusal]:
    """That RoPE pairs other channels in a class than in the model's own.

    Whole heads are relabelled from one way into the other.  Of heads that are turned in part,
    layouts do not say which channels these are.

    Args:
        spec: The model.
        model_type: Class of transformers to reach, or the one that the target is the same as.
        name: Of the family, for the reason.

    Source: ``rotate_half`` and ``apply_rotary_pos_emb`` of transformers 5.23.0 ``modeling_glm.py``
    and ``modeling_phi3.py``.
    """
    here, there = _TURNED.get(spec.architecture), _TURNED.get(model_type)
    if spec.partial_rotary_factor == 1.0 or None in {here, there} or here == there:
        return []
    share = f"{spec.partial_rotary_factor} of each head"
    reason = f"{share}: pairs {here} in {spec.architecture}, {there} in {name}"
    return [Refusal("partial_rotary", reason)]


def read_fields(path: Path) -> dict[str, object]:
    """The JSON object in ``path``.

    Raises:
        SpecError: The file cannot be read, is absurdly large, or holds anything else.
    """
    try:
        value = json.loads(read_regular(path, most=LARGEST_FILE).decode("utf-8"))
    except FormatError as error:
        raise SpecError(error.headline, error.facts) from None
    except OSError as error:
        raise SpecError("parameter file cannot be read", [("file", path), ("why", error)]) from None
    except (ValueError, RecursionError) as error:
        raise SpecError(
            "parameter file is not JSON", [("file", path), ("why", error or "nested too deeply")]
        ) from None
    if not isinstance(value, dict):
        raise SpecError(
            "parameter file is not a JSON object",
            [("file", path), ("found", type(value).__name__)],
        )
    return value


def checked(record: type[R], fields: Mapping[str, object], file: Path) -> R:
    """``fields`` as a ``record``.

    Raises:
        SpecError: Facts list every field that does not fit, with what was expected and found.
    """
    try:
        return record.model_validate(fields)
    except ValidationError as error:
        problems = _problems(error)
    count = f"{len(problems)} field{'s' if len(problems) > 1 else ''}"
    raise SpecError(
        f"parameter file has {count} that cannot be used",
        [("file", file), *(("field", problem) for problem in problems)],
    )


def _problems(error: ValidationError) -> list[str]:
    # A union complains once per member, so complaints are gathered by the field that was read.
    expected: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for item in error.problems:
        field = str(item.loc[0]) if item.loc else ""
        if item.is_missing:
            want, have = "a value", "nothing"
        else:
            want = item.msg.removeprefix("Input should be ")
            have = _short(item.input)
        if want not in expected.setdefault(field, []):
            expected[field].append(want)
        found.setdefault(field, have)
    return [
        f"{field}: expected {' or '.join(wants)}, found {found[field]}"
        if field
        else "; ".join(wants)
        for field, wants in expected.items()
    ]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
