"""Which keys of a checkpoint are its weights, and in which naming they are spelled.

Everything is decided from keys (and the config, where there is one); the evidence is kept, so that
``inspect`` can show why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dcpconv.catalog import Catalog, TensorEntry
from dcpconv.errors import AmbiguousFamilyError
from dcpconv.keymaps import Keymap, Row, keymaps, split_key
from dcpconv.spec import ModelSpec

_ROOTS = frozenset({"model", "module", "state_dict", "model_state_dict"})
"""Containers and wrappers that stand before the first component of a model's own keys: training
scripts (``model``, ``state_dict``), ``DistributedDataParallel`` (``module``)."""

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Components that ``torch.compile``, FSDP1 and activation checkpointing put anywhere in a key."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a checkpoint under the keys that its naming spells.

    Attributes:
        catalog: The whole checkpoint.
        entries: By bare key, without root and wrappers; an entry's own ``key`` is as stored.
        tied: Bare key -> bare key of a tensor that shares its storage.
        keymap: The naming, or ``None`` where no table knows the keys.
        root: What stood before every key: ``model.``, or empty.
        rest: Stored keys that are not weights: optimizer state, counters.
        alternatives: Other tables that fit every key and lead to other bytes.
        evidence: Why, one sentence each.
    """

    catalog: Catalog
    entries: Mapping[str, TensorEntry]
    tied: Mapping[str, str]
    keymap: Keymap | None
    root: str
    rest: tuple[str, ...]
    alternatives: tuple[Keymap, ...] = ()
    evidence: tuple[str, ...] = ()

    def require_keymap(self) -> Keymap:
        """The naming, for work that needs one.

        Raises:
            AmbiguousFamilyError: No table fits, or several do and they lead to other bytes.
        """
        if self.keymap is None:
            raise AmbiguousFamilyError(
                "no naming table knows these keys",
                [
                    ("source", self.catalog.source),
                    *(("key", key) for key in list(self.entries)[:5]),
                ],
                hint="describe the naming with --keymap FILE, or leave --to out to keep the keys",
            )
        if self.alternatives:
            raise AmbiguousFamilyError(
                "several namings fit these keys, and they lead to different bytes",
                [
                    ("source", self.catalog.source),
                    *(("fits", table.name) for table in (self.keymap, *self.alternatives)),
                ],
                hint="choose one with --from NAME",
            )
        return self.keymap


@dataclass(frozen=True, slots=True)
class _Fit:
    root: str
    keymap: Keymap
    matched: int
    unmatched: int
    foreign: int


def recognise(
    catalog: Catalog,
    *,
    spec: ModelSpec | None = None,
    keymap: Keymap | None = None,
    root: str | None = None,
    tables: Iterable[Keymap] | None = None,
) -> Weights:
    """Finds the weights of a checkpoint and their naming.

    The ambiguity of ``model.`` (a wrapper, or the first component of a Hugging Face key) is decided
    by which of both readings a table knows: ``model.lm_head.weight`` has a wrapper,
    ``lm_head.weight`` has none.

    Args:
        catalog: The checkpoint.
        spec: The model's numbers, if a config was found; its architecture narrows the tables down.
        keymap: The naming, where the user has said it.
        root: What stands before every key, where the user has said it; ``""`` for nothing.
        tables: Candidates; by default the tables that come with the package.
    """
    counts: dict[tuple[str, ...], int] = {}
    for key in catalog.tensors:
        template = tuple(split_key(key)[0].split("."))
        counts[template] = counts.get(template, 0) + 1
    roots = [_dotted(root)] if root is not None else _roots(counts)
    candidates = [keymap] if keymap else list(tables if tables is not None else _ordered(spec))
    fits = sorted(
        (fit for at in roots for table in candidates if (fit := _fit(at, table, counts)).matched),
        key=lambda fit: (fit.unmatched > 0, fit.unmatched / fit.matched, -fit.matched, fit.foreign),
    )
    if not fits or (keymap is None and fits[0].unmatched > fits[0].matched):
        chosen = _dotted(root) if root is not None else _nested_root(catalog)
        return _weights(catalog, chosen, keymap, (), ("no table knows these keys",))
    best = fits[0]
    same_root = [f for f in fits if (f.root, f.unmatched) == (best.root, best.unmatched)]
    rows = _rows_used(best, counts)
    others = tuple(fit.keymap for fit in same_root[1:] if _rows_used(fit, counts) != rows)
    equal = [fit.keymap.name for fit in same_root[1:] if _rows_used(fit, counts) == rows]
    under = f" under {best.root!r}" if best.root else ""
    evidence = [
        f"{best.matched} of {best.matched + best.unmatched} keys{under} match {best.keymap.name}"
    ]
    if equal:
        evidence.append(f"the same bytes as {', '.join(equal)}")
    if others and spec is not None and spec.architecture in best.keymap.architectures:
        others = tuple(table for table in others if spec.architecture in table.architectures)
    return _weights(catalog, best.root, best.keymap, others, tuple(evidence))


def bare(key: str) -> str:
    """A key without the components that wrappers put into it.

    >>> bare("layers.0._orig_mod.attention.wq.weight")
    'layers.0.attention.wq.weight'
    """
    if "_orig_mod" not in key and "_wrapped_module" not in key:
        return key
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _weights(
    catalog: Catalog,
    root: str,
    keymap: Keymap | None,
    alternatives: tuple[Keymap, ...],
    evidence: tuple[str, ...],
) -> Weights:
    entries: dict[str, TensorEntry] = {}
    rest = []
    for key, entry in catalog.tensors.items():
        if key.startswith(root):
            entries[bare(key[len(root) :])] = entry
        else:
            rest.append(key)
    tied = {
        bare(key[len(root) :]): bare(owner[len(root) :])
        for key, owner in catalog.tied.items()
        if key.startswith(root) and owner.startswith(root)
    }
    rest.extend(key for key in catalog.objects if not key.startswith(root) or root == "")
    return Weights(catalog, entries, tied, keymap, root, tuple(rest), alternatives, evidence)


def _ordered(spec: ModelSpec | None) -> Sequence[Keymap]:
    """The tables, those for the config's architecture first."""
    tables = list(keymaps().values())
    if spec is not None:
        tables.sort(key=lambda table: spec.architecture not in table.architectures)
    return tables


def _roots(counts: Mapping[tuple[str, ...], int]) -> list[str]:
    roots = {""}
    for template in counts:
        root = ""
        for part in template:
            if part not in _ROOTS and part not in _WRAPPERS:
                break
            root += f"{part}."
            roots.add(root)
    return sorted(roots, key=len)


def _nested_root(catalog: Catalog) -> str:
    """The container that holds the weights, for keys that no table knows."""
    outer = {str(path[0]) for path in catalog.paths.values() if len(path) > 1}
    for name in ("model", "state_dict", "model_state_dict", "module"):
        if name in outer:
            return f"{name}."
    return ""


def _fit(root: str, table: Keymap, counts: Mapping[tuple[str, ...], int]) -> _Fit:
    matched = unmatched = foreign = 0
    for key, count in _under(root, counts):
        if key is None:
            foreign += count
        elif table.knows(key):
            matched += count
        else:
            unmatched += count
    return _Fit(root, table, matched, unmatched, foreign)


def _under(root: str, counts: Mapping[tuple[str, ...], int]) -> Iterable[tuple[str | None, int]]:
    for template, count in counts.items():
        key = ".".join(template)
        yield (bare(key[len(root) :]) if key.startswith(root) else None), count


def _rows_used(fit: _Fit, counts: Mapping[tuple[str, ...], int]) -> list[object]:
    """What the table makes of every key, without its name."""

    def storage(row: Row | None) -> object:
        return row and (row.slots, row.layout.text)

    keys = (key for key, _ in _under(fit.root, counts) if key is not None)
    return [[storage(row) for row in fit.keymap.rows_like(key)] for key in keys]


def _dotted(root: str) -> str:
    return f"{root}." if root and not root.endswith(".") else root
