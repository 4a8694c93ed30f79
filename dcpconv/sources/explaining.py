"""What a parameter file says of the shapes and layers of a checkpoint, in the words of a table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations

from dcpconv.core.declared import Measured, size_of
from dcpconv.core.layout import Axis, Layout, Node, Summed
from dcpconv.core.spec import Declared, ModelSpec
from dcpconv.families.keymaps import keymaps
from dcpconv.families.keymaps.words import AXES

_SMALLEST = 2
"""A dim of length 1 is written as the number."""

_LATENT = frozenset({"a", "c", "n", "v"})
"""Axes that only low-rank attention has."""


@dataclass
class Explanations:
    """Declarations that explain what was asked about.

    Args:
        fields: The parameter file.
        spec: The model's numbers, as far as a class of ours would read them.

    Attributes:
        axes: Axis -> rule, of the axes that a layout has used.
        kinds: Kind -> rule, of the kinds that a row has used.
    """

    fields: Mapping[str, object]
    spec: ModelSpec | None
    axes: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def layout(self, shape: Sequence[int]) -> str:
        """Axes that have the lengths of a shape, or nothing where one is not explained."""
        used: set[str] = set()
        parts = []
        for length in shape:
            part = self._dim(length, used)
            if not part:
                return ""
            used.update(re.findall(r"[A-Za-z]\w*", part))
            parts.append(part)
        return " ".join(parts)

    def can_say(self, layout: str) -> bool:
        """Whether every axis is one of all tables, or one that a table of ours takes from a field
        which is there."""
        return all(
            size_of(_rules_of_ours().get(axis, ""), self.fields) is not None
            for axis in _own_axes(layout)
        )

    def fits(self, layout: Layout, shape: Sequence[int]) -> bool:
        """Whether a layout has this shape, as far as the file says how long its axes are."""
        if len(layout.nodes) != len(shape):
            return False
        is_latent = self.spec is None or self.spec.latent is not None
        if not is_latent and _LATENT & frozenset().union(*map(_axes_of, layout.nodes)):
            return False
        sizes = dict(self.spec.axes()) if self.spec is not None else {}
        for axis in _own_axes(layout.text):
            size = size_of(_rules_of_ours().get(axis, ""), self.fields)
            sizes |= {} if size is None else {axis: size}
        return all(
            node.length(sizes) == length
            for node, length in zip(layout.nodes, shape, strict=True)
            if _axes_of(node) <= sizes.keys()
        )

    def declare(self, layout: str) -> None:
        """Takes over the rules for the axes that only some tables have."""
        self.axes |= {axis: _rules_of_ours()[axis] for axis in _own_axes(layout)}

    def condition(self, layers: frozenset[int], count: int, name: str) -> str | None:
        """When a row exists that only some layers have; ``""`` for all, ``None`` for no reason.

        Args:
            layers: Layers that have it.
            count: How many layers there are.
            name: What a kind that has no word of its own may be called.
        """
        if layers == frozenset(range(count)):
            return ""
        for word in ("dense", "moe"):
            if self.spec is not None and self.spec.experts is not None:
                has = frozenset(n for n in range(count) if self.spec.has(word, n))
                if has == layers:
                    return word
        for kind, rule in self.kinds.items():
            if self._layers({**self.kinds, kind: rule}, kind, count) == layers:
                return kind
        for kind, rule in self._rules(name, count):
            if self._layers({kind: rule}, kind, count) == layers:
                self.kinds[kind] = rule
                return kind
        for kind in list(self.kinds):
            rest = {**self.kinds, name: f"not {kind}"}
            if self._layers(rest, name, count) == layers:
                self.kinds[name] = f"not {kind}"
                return name
        return None

    def _layers(self, kinds: Mapping[str, str], kind: str, count: int) -> frozenset[int] | None:
        sizes = ("hidden_size", "n_heads", "n_kv_heads", "head_dim", "ffn_size", "max_seq_len")
        fields = {"vocab_size": None, "n_layers": count, "stated": dict(self.fields)}
        spec = ModelSpec.model_validate({**dict.fromkeys(sizes, 1), **fields})
        declared = Declared(kinds={name: (rule,) for name, rule in kinds.items()})
        model = Measured(spec, [declared])
        return frozenset(n for n in range(count) if model.has(kind, n)) if kind else None

    def _rules(self, name: str, count: int) -> Iterator[tuple[str, str]]:
        """Every rule that the fields allow, the plainest first."""
        numbers = [path for path, value in _flat(self.fields) if isinstance(value, int)]
        for path, value in _flat(self.fields):
            if isinstance(value, list | str) and len(value) == count and _is_words(value):
                words = list(dict.fromkeys(value))
                for many in range(1, len(words)):
                    for some in combinations(words, many):
                        kind = _kind(some[0]) if many == 1 else ""
                        yield kind or name, f"{path}: {', '.join(some)}"
            elif isinstance(value, list) and all(isinstance(number, int) for number in value):
                yield name, path
                yield name, f"{path} from 1"
        for path in numbers:
            yield name, f"first {path}"
            yield name, f"every {path} from {path} - 1"
        for step in numbers:
            for start in numbers:
                if "period" in step and "offset" in start:
                    yield name, f"every {step} from {start}"

    def _dim(self, length: int, used: set[str]) -> str:
        if length < _SMALLEST:
            return str(length)
        known = self.spec.axes() if self.spec is not None else {}
        for axis in ("d", "V", "f", "E", "h", "g", "e", "m"):
            if known.get(axis) == length and axis not in used:
                return axis
        for whole in ("(h e)", "(g e)"):
            parts = whole.strip("()").split()
            if {*parts} <= known.keys() and known[parts[0]] * known[parts[1]] == length:
                return whole if not used & {*parts} else ""
        sizes = [(p, v) for p, v in _flat(self.fields) if isinstance(v, int) and v >= _SMALLEST]
        for path, value in sizes:
            if value == length and (axis := self._axis(path, used)):
                return axis
        for (one, a), (other, b) in combinations(sizes, 2):
            if a * b == length and _belong(one, other):
                first, second = self._axis(one, used), self._axis(other, {*used, _letters(one)})
                if first and second:
                    return f"({first} {second})"
        return ""

    def _axis(self, path: str, used: set[str]) -> str:
        axis = _letters(path)
        if axis in used or self.axes.get(axis, path) != path:
            return ""
        self.axes[axis] = path
        return axis


@lru_cache(maxsize=1)
def _rules_of_ours() -> Mapping[str, str]:
    return {a: rule for table in keymaps().values() for a, rule in table.declared.axes.items()}


def _own_axes(layout: str) -> frozenset[str]:
    return frozenset(re.findall(r"[A-Za-z]\w*", layout)) - AXES.keys()


def _axes_of(node: Node) -> frozenset[str]:
    if isinstance(node, Axis):
        return frozenset() if node.name.isdigit() else frozenset({node.name})
    inner = node.alternatives if isinstance(node, Summed) else node.nodes
    return frozenset[str]().union(*map(_axes_of, inner))


def _belong(one: str, other: str) -> bool:
    """Whether two fields are of one block: they begin with the same word."""
    return one.partition("_")[0] == other.partition("_")[0]


def _is_words(value: Sequence[object]) -> bool:
    """Whether these are words, or the letters of a text that is no word itself."""
    is_word = isinstance(value, str) and any(letter.islower() for letter in value)
    return not is_word and all(isinstance(word, str) for word in value)


def _letters(path: str) -> str:
    """A short name for the axis of a field: ``linear_num_key_heads`` is ``lnkh``."""
    letters = "".join(word[0] for word in re.split(r"[._]", path) if word)
    return f"{letters}x" if len(letters) == 1 else letters.lower()


def _kind(word: str) -> str:
    found = re.sub(r"[^a-z]+", "_", word.lower()).strip("_")
    return found if len(found) > 1 else ""


def _flat(fields: Mapping[str, object], before: str = "") -> Iterator[tuple[str, object]]:
    """Fields with the path to each; what is said of the language model counts as said outside."""
    for name, value in fields.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or isinstance(value, bool):
            continue
        if isinstance(value, Mapping):
            inner = "" if name == "text_config" else f"{before}{name}."
            yield from _flat(value, inner)
        else:
            yield before + name, value
