"""What the user says of a source: parsed once, passed whole."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dcpconv.core.errors import DcpconvError, NotACheckpointError
from dcpconv.core.spec import FEATURES, ModelSpec
from dcpconv.families.configs.patching import parse_pairs
from dcpconv.families.keymaps import Keymap, read_keymap, resolve_family
from dcpconv.stores.schemes import path_of

SELECTION_BIAS = "selection_bias"
"""What ``--allow`` calls the load-balancing bias of experts."""

STORED = "stored"
"""What ``--to`` calls the source's own keys and layout, whatever its naming."""

FIELD = "config."
"""What stands before a field of the parameter file in ``--allow``: ``config.attn_temperature``."""

CHOICES = FEATURES | {SELECTION_BIAS, "rope_theta", "overflow"}
"""What ``--allow`` takes: features, and what else may be lost without another shape coming out."""

_SHAPES = frozenset({"n_heads", "n_kv_heads", "head_dim", "untied", "architecture"})
"""Refusals that cannot be overruled: the tensors themselves would not fit the target's code."""


@dataclass(frozen=True, slots=True)
class Said:
    """How a source is to be understood.

    Attributes:
        from_: Its naming, where keys leave a choice or no parameter file names it.
        keymap: A table of the user's own, which ``from_`` and a target may name.
        assets: Directory with its parameter file and tokenizer, where it has none.
        sizes: Numbers of the model that no file states, or states wrongly, by field.
        allow: Features to leave out although a target cannot express them.
        dequantize: Whether weights in scaled blocks are multiplied out.
    """

    from_: str | None = None
    keymap: Keymap | None = None
    assets: Path | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    dequantize: bool = False

    @classmethod
    def parse(
        cls,
        *,
        from_: str | None = None,
        keymap: str | os.PathLike[str] | None = None,
        assets: str | os.PathLike[str] | None = None,
        spec: str | Sequence[str] = (),
        allow: str | Sequence[str] = (),
        dequantize: bool = False,
    ) -> Said:
        """What the user typed, checked.

        Args:
            from_: Name of a family or table.
            keymap: File with a table.
            assets: Directory, or the parameter file in it.
            spec: Numbers, as ``heads=8,kv_heads=2``.
            allow: Names of features, several of which may stand in one text, after commas.
            dequantize: Whether weights in scaled blocks are multiplied out.

        Raises:
            KeymapError: The table cannot be read; lists every bad row.
            SpecError: ``spec`` names no field, or its value does not fit.
            DcpconvError: ``allow`` names what cannot be left out.
            NotACheckpointError: ``assets`` is not there.
        """
        place = path_of(assets) if assets is not None else None
        if place is not None and not place.exists():
            raise NotACheckpointError(
                "there is no such directory",
                [("assets", place)],
                hint="--assets names the directory with config.json and tokenizer",
            )
        return cls(
            from_=from_,
            keymap=read_keymap(Path(keymap)) if keymap is not None else None,
            assets=place,
            sizes=parse_pairs(spec),
            allow=parse_allowed(allow),
            dequantize=dequantize,
        )

    def table(self, name: str | None, architecture: str | None) -> Keymap | None:
        """The table that ``name`` means: the user's own or one of ours; ``None`` for no name.

        Raises:
            KeymapError: No such family, or none of its tables is for this architecture.
        """
        if name is None:
            return None
        if self.keymap is not None and name == self.keymap.name:
            return self.keymap
        return resolve_family(name, architecture)

    def source_table(self, spec: ModelSpec | None) -> Keymap | None:
        """The source's own naming, where the user names it."""
        return self.table(self.from_, spec.architecture if spec is not None else None)


def parse_allowed(names: str | Sequence[str]) -> tuple[str, ...]:
    """The names in ``allow``, several of which may stand in one text, after commas.

    Raises:
        DcpconvError: A name is of nothing that can be left out; lists them all.

    >>> parse_allowed(["rope_scaling,qkv_bias", "config.attn_temperature"])
    ('rope_scaling', 'qkv_bias', 'config.attn_temperature')
    """
    texts = [names] if isinstance(names, str) else names
    found = tuple(name.strip() for text in texts for name in text.split(",") if name.strip())
    fixed = [name for name in found if name in _SHAPES]
    unknown = [n for n in found if n not in CHOICES | _SHAPES and not n.startswith(FIELD)]
    if fixed or unknown:
        raise DcpconvError(
            "not everything can be left out",
            [
                *(
                    ("fixed", f"{name}: the tensors would not fit the target's code")
                    for name in fixed
                ),
                *(("unknown", name) for name in unknown),
                ("expected", f"{', '.join(sorted(CHOICES))}, {FIELD}FIELD"),
            ],
        )
    return found
