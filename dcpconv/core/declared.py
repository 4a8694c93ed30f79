"""What a table declares of its models: axes of its own, and which layers are of which kind.

Both follow from fields of the parameter file, by rules of one line each::

    axis = "linear_num_key_heads"                     a field; a dot leads into a mapping
    axis = "mamba_num_heads * mamba_head_dim"         a product; / must leave no rest
    axis = "num_layers - 1"                           with a number or field more or less at its end
    axis = "head_dim or hidden_size / heads"          the first whose fields are there
    kind = "layer_types: full_attention"              a field with a word, or letter, per layer
    kind = "attn_layer_indices"                       a field that lists layers, counted from 0
    kind = "linear_attn_config.kda_layers from 1"     the same, counted from 1
    kind = "every attn_layer_period from attn_layer_offset"
    kind = "first first_k_dense_replace"              as many layers from the first
    kind = "last num_kv_shared_layers"                as many at the end
    kind = "use_bias"                                 all layers, if the field is true or above 0
    kind = "not attention"                            the layers that another kind leaves over
    kind = "attention if attention_k_eq_v"            those of another kind, or none of them
    kind = "attention if gating: per-element"         the same, by a word

A field that is a list gives every layer a size of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from dcpconv.core.errors import LayoutError
from dcpconv.core.spec import Declared, ModelSpec

Fields = Mapping[str, object]
"""A parameter file, as ``json.load`` gives it."""

_FIELD = (
    r"(?!(?:not|every|first|last|from|if|or)\b)[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*"
)
_NUMBER_OR_FIELD = rf"(?:\d+|{_FIELD})"
_SIZE = re.compile(rf"{_NUMBER_OR_FIELD}(?: [*/] {_NUMBER_OR_FIELD})*(?: [+-] {_NUMBER_OR_FIELD})?")
_SIZES = re.compile(rf"{_SIZE.pattern}(?: or {_SIZE.pattern})*")
_KINDS: Mapping[str, re.Pattern[str]] = {
    "not": re.compile(r"not (?P<kind>[a-z_]+)"),
    "every": re.compile(rf"every (?P<step>{_NUMBER_OR_FIELD}) from (?P<start>{_SIZE.pattern})"),
    "first": re.compile(rf"first (?P<count>{_FIELD})"),
    "last": re.compile(rf"last (?P<count>{_FIELD})"),
    "if": re.compile(rf"(?P<kind>[a-z_]+) if (?P<field>{_FIELD})(?:: (?P<words>[^,\s]+))?"),
    "words": re.compile(rf"(?P<field>{_FIELD}): (?P<words>[^,\s]+(?:, [^,\s]+)*)"),
    "listed": re.compile(rf"(?P<field>{_FIELD})(?: from (?P<start>\d+))?"),
}
"""Forms of a rule for a kind; the first that fits the whole line counts."""

AXIS = re.compile(r"[A-Za-z][A-Za-z0-9]*")
"""How an axis may be called."""

KIND = re.compile(r"[a-z][a-z_]*")
"""How a kind of layer may be called."""


class Measured:
    """A model layer by layer: the size of every axis, and which rows of a table exist.

    Args:
        spec: The model.
        declared: Of the tables on both sides; for an axis or kind of both the first counts.
    """

    def __init__(self, spec: ModelSpec, declared: Sequence[Declared]) -> None:
        self.spec = spec
        self._declared = [one for one in declared if one]
        self._usual = spec.axes()
        self._kinds: dict[str, frozenset[int] | None] = {}
        for one in self._declared:
            for kind in one.kinds:
                if self._kinds.get(kind) is None:
                    self._kinds[kind] = self._layers_of(kind, one)
        self._base = {**self._usual, **self._changed(None)}
        self._differing: dict[int, tuple[tuple[str, int], ...]] = {}

    def axes(self) -> dict[str, int]:
        """Size of every axis, as most layers have it; an axis nobody knows is absent."""
        return dict(self._base)

    def differing(self, layer: int | None) -> tuple[tuple[str, int], ...]:
        """Sizes that a layer has otherwise than ``axes`` says."""
        if layer is None or not self._declared:
            return ()
        if layer not in self._differing:
            changed = self._changed(layer).items()
            self._differing[layer] = tuple(
                (axis, size) for axis, size in changed if self._base.get(axis) != size
            )
        return self._differing[layer]

    def knows(self, condition: str) -> bool:
        """Whether the model's file says which layers are of the kinds in a condition."""
        return not self._kinds or all(
            self._kinds.get(word, frozenset()) is not None for word in _words(condition)
        )

    def has(self, condition: str, layer: int = 0) -> bool:
        """As ``ModelSpec.has``, for kinds of layers too."""
        if not self._kinds:
            return self.spec.has(condition, layer)
        return all(self._has(word, layer) for word in _words(condition))

    def _has(self, word: str, layer: int) -> bool:
        if word in self._kinds:
            return layer in (self._kinds[word] or ())
        return self.spec.has(word, layer)

    def _changed(self, layer: int | None) -> dict[str, int]:
        """Axes that tables declare, as they are in a layer."""
        changed: dict[str, int] = {}
        for one in reversed(self._declared):
            rules = dict(one.axes)
            for kind, axes in one.of_kind.items():
                if layer is not None and layer in (self._kinds.get(kind) or ()):
                    rules |= axes
            for axis, rule in rules.items():
                size = size_of(rule, self.spec.stated, layer)
                if size is not None:
                    changed[axis] = size
        both = {**self._usual, **changed}
        if "e" in changed and "p" not in changed and both["e"] % 2 == 0:
            changed |= {"two": 2, "p": both["e"] // 2}
        if {"h", "g"} & changed.keys() and both["h"] % both["g"] == 0:
            changed["r"] = both["h"] // both["g"]
        return changed

    def _layers_of(self, kind: str, declared: Declared) -> frozenset[int] | None:
        count = self.spec.n_layers
        for rule in declared.kinds[kind]:
            form, said = _parsed(rule)
            if form in {"not", "if"}:
                other = said["kind"] or ""
                found = self._layers_of(other, declared) if other in declared.kinds else None
                is_so = form == "not" or _switch(said, self.spec.stated)
                if found is not None and is_so is not None:
                    others = frozenset(range(count)) - found if form == "not" else found
                    return others if is_so else frozenset()
            else:
                listed = _listed(form, said, self.spec.stated, count)
                if listed is not None:
                    return frozenset(listed)
        return None


def fields_of(declared: Declared) -> frozenset[str]:
    """Fields of the parameter file that the rules look at, the outermost of each path."""
    sizes = [
        *declared.axes.values(),
        *(r for axes in declared.of_kind.values() for r in axes.values()),
    ]
    names = {name for rule in sizes for name in re.findall(_FIELD, rule)}
    for rule in (rule for rules in declared.kinds.values() for rule in rules):
        for part, found in _parsed(rule)[1].items():
            if part not in {"kind", "words"}:
                names.update(re.findall(_FIELD, found or ""))
    return frozenset(name.partition(".")[0] for name in names)


def size_of(rule: str, fields: Fields, layer: int | None = None) -> int | None:
    """What a rule makes of a parameter file; ``None`` where a field is not there or is no size.

    Args:
        rule: Of an axis.
        fields: The parameter file.
        layer: Whose size is asked for, where layers differ.

    >>> size_of("heads * ssm.head_dim", {"heads": 3, "ssm": {"head_dim": 8}})
    24
    >>> size_of("ffn", {"ffn": [8, 12]}, layer=1)
    12
    >>> size_of("head_dim or hidden / heads", {"head_dim": "auto", "hidden": 12, "heads": 3})
    4
    """
    sizes = (_product(product, fields, layer) for product in rule.split(" or "))
    return next((size for size in sizes if size is not None), None)


def _product(rule: str, fields: Fields, layer: int | None) -> int | None:
    total = 1
    first, *others = rule.split(" ")
    for sign, operand in (("*", first), *zip(others[::2], others[1::2], strict=True)):
        number = int(operand) if operand.isdigit() else _number(operand, fields, layer)
        if number is None or (sign == "/" and (not number or total % number)):
            return None
        if sign in "+-":
            total += number if sign == "+" else -number
        else:
            total = total * number if sign == "*" else total // number
    return total if total >= 0 else None


def check_size(rule: str) -> None:
    """Raises unless a rule for a size can be read.

    Raises:
        LayoutError: Says what is expected.
    """
    if not _SIZES.fullmatch(rule):
        raise LayoutError(
            f"cannot read the size {rule!r}: a field of the parameter file, a.b for one inside"
            " another, or a product such as heads * head_dim"
        )


def check_kind(rule: str, kinds: Iterable[str]) -> None:
    """Raises unless a rule for a kind of layer can be read.

    Raises:
        LayoutError: Says what is expected.
    """
    form, said = _parsed(rule)
    if form in {"not", "if"} and said["kind"] not in set(kinds):
        of = "the rest of" if form == "not" else "a part of"
        raise LayoutError(f"there is no kind {said['kind']!r} to be {of}")


def _words(condition: str) -> list[str]:
    return [word.strip() for word in condition.split("&")]


def _parsed(rule: str) -> tuple[str, Mapping[str, str | None]]:
    for form, pattern in _KINDS.items():
        found = pattern.fullmatch(rule)
        if found:
            return form, found.groupdict()
    raise LayoutError(
        f"cannot read the rule {rule!r}: 'FIELD: WORD', 'FIELD', 'FIELD from 1',"
        " 'every FIELD from FIELD', 'first FIELD', 'last FIELD', 'not KIND', 'KIND if FIELD' or"
        " 'KIND if FIELD: WORD'"
    )


def _listed(
    form: str, said: Mapping[str, str | None], fields: Fields, count: int
) -> list[int] | None:
    """Layers of a kind; ``None`` where the fields are not there or say something else."""
    if form == "every":
        step = size_of(said["step"] or "", fields)
        start = size_of(said["start"] or "", fields)
        return list(range(start, count, step)) if step and start is not None else None
    if form in {"first", "last"}:
        number = _number(said["count"] or "", fields, None)
        if number is None:
            return None
        many = min(number, count)
        return list(range(many) if form == "first" else range(count - many, count))
    value = _field(said["field"] or "", fields)
    if form == "listed" and isinstance(value, int) and said["start"] is None:
        return list(range(count)) if value > 0 else []
    if not isinstance(value, list | str):
        return None
    if form == "words":
        words = (said["words"] or "").split(", ")
        return [n for n, word in enumerate(value) if word in words] if len(value) >= count else None
    start = int(said["start"] or 0)
    if not all(isinstance(layer, int) for layer in value):
        return None
    return [int(layer) - start for layer in value]


def _switch(said: Mapping[str, str | None], fields: Fields) -> bool | None:
    """Whether a field says yes, or a word; ``None`` where it is not there."""
    value, word = _field(said["field"] or "", fields), said["words"]
    return None if value is None else bool(value) if word is None else value == word


def _number(path: str, fields: Fields, layer: int | None) -> int | None:
    value = _field(path, fields)
    if isinstance(value, list):
        value = value[layer or 0] if len(value) > (layer or 0) else None
    return value if isinstance(value, int) and value >= 0 else None


def _field(path: str, fields: Fields) -> object:
    """A field, of the whole file or of what it says of its language model."""
    inner = fields.get("text_config")
    for value in (fields, inner):
        found: object = value
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None
