"""Which keys of a checkpoint are its weights, and in which naming they are spelled.

Everything is decided from keys (and the config, where there is one); the evidence is kept, so that
``inspect`` can show why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.errors import AmbiguousFamilyError
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps import Keymap, Row, keymaps, split_key, tables_for
from dcpconv.sources.containers import candidate_roots, nested_root

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Components that ``torch.compile``, FSDP1 and activation checkpointing put anywhere in a key."""


_STATED = 2
"""Hints of a table whose family's parameter file lies beside the tensors."""

_RULED_OUT = -9
"""Hints of a table that contradicts the parameter file; a shape that is unusual for a family only
makes it less likely."""


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
        same: Other tables that make the same bytes of every key, and may differ in what no file
            says, such as the RoPE theta.
        is_hinted: Whether sizes or config speak for the family before those.
        idle: Keys that can be left out without a difference -> why.
    """

    catalog: Catalog
    entries: Mapping[str, TensorEntry]
    tied: Mapping[str, str]
    keymap: Keymap | None
    root: str
    rest: tuple[str, ...]
    alternatives: tuple[Keymap, ...] = ()
    evidence: tuple[str, ...] = ()
    same: tuple[Keymap, ...] = ()
    is_hinted: bool = False
    idle: Mapping[str, str] = field(default_factory=dict)

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
    """How well a table explains the keys under a root.

    Attributes:
        matched: Keys that it knows.
        unmatched: Keys that it does not.
        foreign: Keys outside the root.
        beside: Containers next to the weights where these have none of their own, as torchtitan
            saves them: ``optimizer``, ``train_state``.
        absent: Rows that it always has and no key is for.
        hinted: How far config and shapes speak for the family: above 0 for it, below against it.
    """

    root: str
    keymap: Keymap
    matched: int
    unmatched: int
    foreign: int
    absent: int
    hinted: int
    beside: frozenset[str] = frozenset()

    @property
    def is_certain(self) -> bool:
        """Whether no other table can be a better one: nothing is left over and config agrees."""
        return not self.unmatched and not self.absent and self.hinted >= _STATED


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
    templates = Counter(split_key(key)[0] for key in catalog.tensors)
    counts = {tuple(template.split(".")): count for template, count in templates.items()}
    roots = [_dotted(root)] if root is not None else candidate_roots(counts, wrappers=_WRAPPERS)
    containers = _containers(catalog)
    fits: list[_Fit] = []
    for candidates in _candidates(spec, keymap, tables):
        fits += (
            fit
            for at in roots
            for table in candidates
            if (fit := _fit(at, table, counts, catalog, spec, containers)).matched
        )
        fits.sort(key=_misfit)
        if fits and fits[0].is_certain:
            break
    if not fits or (keymap is None and fits[0].unmatched > fits[0].matched):
        chosen = _dotted(root) if root is not None else _nested_root(catalog)
        evidence = ["no table knows these keys"]
        if chosen and root is None:
            evidence.append(f"what is under {chosen!r} is taken for the weights")
        return _weights(catalog, chosen, keymap, (), tuple(evidence))
    best = fits[0]
    same_root = [
        fit
        for fit in fits
        if (fit.root, fit.unmatched, fit.absent) == (best.root, best.unmatched, best.absent)
    ]
    rows = _rows_used(best, counts)
    others = tuple(
        fit.keymap
        for fit in same_root[1:]
        if _rows_used(fit, counts) != rows and (fit.hinted > _RULED_OUT or best.hinted < 0)
    )
    equal = tuple(fit.keymap for fit in same_root[1:] if _rows_used(fit, counts) == rows)
    under = f" under {best.root!r}" if best.root else ""
    evidence = [
        f"{best.matched} of {best.matched + best.unmatched} keys{under} match {best.keymap.name}"
    ]
    evidence.extend(_clues(best, spec))
    if equal:
        evidence.append(f"the same bytes as {', '.join(table.name for table in equal)}")
    if others and spec is not None and spec.architecture in best.keymap.architectures:
        others = tuple(table for table in others if spec.architecture in table.architectures)
    if others and spec is not None and spec.origin == best.keymap.config:
        others = ()
    weights = _weights(catalog, best.root, best.keymap, others, tuple(evidence), beside=best.beside)
    return replace(weights, same=equal, is_hinted=best.hinted > 0)


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
    *,
    beside: frozenset[str] = frozenset(),
) -> Weights:
    entries: dict[str, TensorEntry] = {}
    rest = []
    for key, entry in catalog.tensors.items():
        if key.startswith(root) and not (beside and key.partition(".")[0] in beside):
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


def _candidates(
    spec: ModelSpec | None, keymap: Keymap | None, tables: Iterable[Keymap] | None
) -> Iterator[list[Keymap]]:
    """The tables to try: those for the config's architecture, and then the others.

    Few are read where the first already explain everything.
    """
    if keymap is not None or tables is not None:
        yield [keymap] if keymap is not None else list(tables or ())
        return
    first = tables_for(spec.architecture) if spec is not None else []
    yield first
    names = {table.name for table in first}
    yield [table for table in keymaps().values() if table.name not in names]


def _misfit(fit: _Fit) -> tuple[float, ...]:
    """The better a table fits, the less; in a tie the order of the candidates decides."""
    return (
        fit.hinted < _STATED or fit.unmatched > fit.matched,
        fit.unmatched > 0,
        fit.unmatched / fit.matched,
        fit.absent,
        -fit.hinted,
        -fit.matched,
        fit.foreign,
    )


def _nested_root(catalog: Catalog) -> str:
    """The container that holds the weights, for keys that no table knows."""
    is_lightning = catalog.form == "dcp" and (catalog.path / "meta.pt").is_file()
    beside = [*catalog.objects, *(["lightning_version"] if is_lightning else [])]
    return nested_root(catalog.tensors, list(catalog.paths.values()), beside)


def _fit(
    root: str,
    table: Keymap,
    counts: Mapping[tuple[str, ...], int],
    catalog: Catalog,
    spec: ModelSpec | None,
    containers: frozenset[str],
) -> _Fit:
    matched = unmatched = foreign = 0
    known = set()
    strange: Counter[str] = Counter()
    for key, count in _under(root, counts):
        if key is None:
            foreign += count
        elif table.knows(key):
            matched += count
            known.add(key)
        else:
            unmatched += count
            strange[key.partition(".")[0]] += count
    beside = frozenset[str]()
    if root == "" and strange:
        inside = {key.partition(".")[0] for key in known}
        beside = containers & strange.keys() - inside
        apart = sum(strange[name] for name in beside)
        unmatched, foreign = unmatched - apart, foreign + apart
    needed = [row for row in table.rows if not row.when or set(row.slots) & set(table.always)]
    absent = sum(row.pattern.template not in known for row in needed)
    # Shapes are looked up only where every key is known: elsewhere they decide nothing.
    is_worth = matched and not (unmatched and spec is None)
    hinted = _hinted(root, table, catalog, spec) if is_worth else 0
    return _Fit(root, table, matched, unmatched, foreign, absent, hinted, beside)


def _containers(catalog: Catalog) -> frozenset[str]:
    """Outermost containers of what was saved."""
    return frozenset(str(path[0]) for path in catalog.paths.values() if len(path) > 1)


def _hinted(root: str, table: Keymap, catalog: Catalog, spec: ModelSpec | None) -> int:
    if spec is not None and spec.origin:
        said = _STATED if spec.origin == table.config else 0
        for name, value in table.hints.items():
            if hasattr(spec, name) and name != "vocab_size":
                said += 1 if getattr(spec, name) == value else _RULED_OUT
        return said
    found = _shape_facts(root, table, catalog) if table.hints else {}
    if not table.hints.keys() & found.keys():
        return 0
    return 1 if all(found.get(name) == value for name, value in table.hints.items()) else -1


def _shape_facts(root: str, table: Keymap, catalog: Catalog) -> dict[str, int]:
    """What the shapes of a checkpoint say in the terms of ``Keymap.hints``."""
    rows = {}
    for slot in ("embed", "layer.q", "layer.k"):
        for row, _ in table.holders(slot):
            entry = catalog.tensors.get(root + row.pattern.key({"L": 0}))
            if entry is not None and entry.shape and row.layout.terms == 1:
                rows[slot] = entry.shape[0]
    facts = {"vocab_size": rows["embed"]} if "embed" in rows else {}
    if rows.get("layer.k"):
        facts["q_per_kv"] = rows.get("layer.q", 0) // rows["layer.k"]
    return facts


def _clues(fit: _Fit, spec: ModelSpec | None) -> list[str]:
    """What beside the keys speaks for the best table."""
    if spec is not None and spec.origin == fit.keymap.config:
        return [f"the parameter file beside it is of {fit.keymap.config}"]
    if fit.hinted <= 0 or not fit.keymap.hints:
        return []
    words = {"vocab_size": "{} tokens", "q_per_kv": "{} query heads per kv head"}
    found = [words[name].format(value) for name, value in fit.keymap.hints.items() if name in words]
    return [f"{' and '.join(found)}, as {fit.keymap.title} has"] if found else []


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
