"""Which keys of a checkpoint are its weights, and in which naming they are spelled.

Everything is decided from keys (and the config, where there is one); the evidence is kept, so that
``inspect`` can show why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.errors import AmbiguousFamilyError
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps import Keymap, is_known, split_key, tables_for
from dcpconv.sources.containers import candidate_roots, nested_root
from dcpconv.sources.fitting import (
    RULED_OUT,
    WRAPPERS,
    Fit,
    bare,
    clues,
    containers_of,
    fit_of,
    misfit,
    rows_used,
    under,
)


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
        rivals: Tables of rarer classes that have the same keys and compute otherwise, where no
            parameter file and no one says that it is another.
        is_hinted: Whether sizes or config speak for the family before those.
        idle: Keys that can be left out without a difference -> why.
        architecture: What the parameter file names; empty where nothing is named.
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
    rivals: tuple[Keymap, ...] = ()
    is_hinted: bool = False
    idle: Mapping[str, str] = field(default_factory=dict)
    architecture: str = ""

    @property
    def doubts(self) -> tuple[str, ...]:
        """Which rarer classes the keys may be of, in a sentence; empty where none has them."""
        if self.keymap is None or not self.rivals:
            return ()
        names = " and ".join(", ".join(table.name for table in self.rivals).rsplit(", ", 1))
        verb = "has" if len(self.rivals) == 1 else "have"
        taken = f"taken for {self.keymap.name}, since no file says which model this is"
        return (f"{taken}; {names} {verb} the same keys: --from NAME chooses",)

    def require_keymap(self) -> Keymap:
        """The naming, for work that needs one.

        Raises:
            AmbiguousFamilyError: No table fits, or several do and they lead to other bytes.
        """
        if self.keymap is None:
            is_new = self.architecture and not is_known(self.architecture)
            source = self.catalog.source
            raise AmbiguousFamilyError(
                f"no naming table is for {self.architecture}"
                if is_new
                else "no naming table knows these keys",
                [
                    ("source", source),
                    *(("model", name) for name in [self.architecture] if name),
                    *(("because", text) for text in self.evidence),
                    *(("key", key) for key in list(self.entries)[:5]),
                    ("works", "any form under these keys: leave --to out, or --to stored"),
                ],
                hint=f"`dcpconv families new {source} > my.toml` drafts a table for --keymap"
                " my.toml; --from NAME says that one of ours is right",
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


def recognise(
    catalog: Catalog,
    *,
    spec: ModelSpec | None = None,
    architecture: str | None = None,
    keymap: Keymap | None = None,
    root: str | None = None,
    tables: Iterable[Keymap] | None = None,
    own: Keymap | None = None,
    may_have_more: bool = False,
) -> Weights:
    """Finds the weights of a checkpoint and their naming.

    A table is used because the parameter file names an architecture that it lists, or because the
    user says so; without any parameter file all keys must match and none may be missing.  Never
    because most keys look alike: what no table is for keeps its own names.

    The ambiguity of ``model.`` (a wrapper, or the first component of a Hugging Face key) is decided
    by which of both readings a table knows: ``model.lm_head.weight`` has a wrapper,
    ``lm_head.weight`` has none.  Where no table fits as it is, one may with something else before
    the keys of the base model, or nothing.

    Args:
        catalog: The checkpoint.
        spec: The model's numbers, if they are known.
        architecture: What the parameter file names, ``""`` where it names nothing; ``None`` where
            there is no such file.  By default what ``spec`` says.
        keymap: The naming, where the user has said it.
        root: What stands before every key, where the user has said it; ``""`` for nothing.
        tables: Candidates; by default the tables that come with the package.
        own: A table of the user's: a candidate where it lists a model that none of ours is for.
        may_have_more: Whether keys of its own do not count against a naming of which it has every
            key: a live model may have a head or an adapter beside.
    """
    if architecture is None and spec is not None:
        architecture = spec.architecture
    templates = Counter(split_key(key)[0] for key in catalog.tensors)
    counts = {tuple(template.split(".")): count for template, count in templates.items()}
    roots = [_dotted(root)] if root is not None else candidate_roots(counts, wrappers=WRAPPERS)
    containers = containers_of(catalog)
    readings = [_bare_keys(at, counts) for at in roots]
    candidates = _candidates(architecture, spec, keymap, tables, readings)
    if own is not None and architecture in own.architectures and not is_known(architecture):
        candidates = [*candidates, own]

    def fits_of(tables_at: Callable[[str], Iterable[Keymap]]) -> list[Fit]:
        return [
            fit
            for at in roots
            for table in tables_at(at)
            if (fit := fit_of(at, table, counts, catalog, spec, containers)).matched
        ]

    fits = fits_of(lambda _: candidates)
    if not any(fit.unmatched == fit.absent == 0 for fit in fits):
        fits += fits_of(lambda at: _variants(candidates, at, catalog, spec))
    is_told = architecture is not None or keymap is not None
    fits.sort(key=lambda fit: (misfit(fit), not is_told and fit.keymap.by_name))
    sure = [
        fit
        for fit in fits
        if keymap is not None
        or (may_have_more and not fit.absent)
        or _is_sure(fit, architecture, spec)
    ]
    if not sure:
        chosen = _dotted(root) if root is not None else _nested_root(catalog)
        found = (
            (f"what is under {chosen!r} is taken for the weights",)
            if chosen and root is None
            else ()
        )
        evidence = (*_why_not(architecture, fits), *found)
        weights = _weights(catalog, chosen, keymap, (), evidence)
        return replace(weights, architecture=architecture or "")
    alike = [fit for fit in sure if _misses(fit) == _misses(sure[0])]
    if len(alike) > 1 and not is_told:
        from dcpconv.sources.contradictions import (  # noqa: PLC0415 - most have a config
            possible,
        )

        alike = possible(alike, catalog)
    best, *rest = alike
    equal, others, rivals = _told_apart(best, rest, counts, is_told=is_told)
    under = f" under {best.root!r}" if best.root else ""
    reasons = [
        f"{best.matched} of {best.matched + best.unmatched} keys{under} match {best.keymap.name}"
    ]
    reasons.extend(clues(best, spec))
    if equal:
        reasons.append(f"the same bytes as {', '.join(table.name for table in equal)}")
    if rivals:
        reasons.append(f"the same keys as {', '.join(table.name for table in rivals)}")
    if others and spec is not None and spec.architecture in best.keymap.architectures:
        others = tuple(table for table in others if spec.architecture in table.architectures)
    if others and spec is not None and spec.origin == best.keymap.config:
        others = ()
    weights = _weights(catalog, best.root, best.keymap, others, tuple(reasons), beside=best.beside)
    return replace(
        weights,
        same=equal,
        rivals=rivals,
        is_hinted=best.hinted > 0,
        architecture=architecture or "",
    )


def _told_apart(
    best: Fit, rest: Iterable[Fit], counts: Mapping[tuple[str, ...], int], *, is_told: bool
) -> tuple[tuple[Keymap, ...], tuple[Keymap, ...], tuple[Keymap, ...]]:
    """Tables that make the same bytes, tables that make others, and those of rarer classes."""
    equal, others, rivals = [], [], []
    rows = rows_used(best, counts)
    for fit in rest:
        is_equal = rows_used(fit, counts) == rows
        is_rarer = not is_told and fit.keymap.by_name
        if is_rarer and (fit.hinted < best.hinted or (is_equal and not best.keymap.by_name)):
            rivals.append(fit.keymap)
        elif is_equal and not (is_rarer and best.keymap.by_name):
            equal.append(fit.keymap)
        elif fit.hinted > RULED_OUT or best.hinted < 0:
            others.append(fit.keymap)
    return tuple(equal), tuple(others), tuple(rivals)


def _misses(fit: Fit) -> tuple[str, int, int]:
    return fit.root, fit.unmatched, fit.absent


def _is_sure(fit: Fit, architecture: str | None, spec: ModelSpec | None) -> bool:
    """Whether a table may be used: see ``recognise``.

    Of a known architecture, keys may be lost or added in the naming of its own parameter file; any
    other naming has to know every key.
    """
    if not fit.unmatched and not fit.absent:
        return True
    if architecture is None or architecture not in fit.keymap.architectures:
        return False
    return not fit.unmatched or (spec is not None and spec.origin == fit.keymap.config)


def _why_not(architecture: str | None, fits: Sequence[Fit]) -> tuple[str, ...]:
    """Why no table is used, and how near the nearest comes."""
    if architecture is not None and not any(fit.matched for fit in fits):
        named = f"the parameter file names {architecture}" if architecture else ""
        why = f"{named}, which no table lists" if named else "the parameter file names no model"
        return (why,)
    if not fits:
        return ("no table knows these keys",)
    best = fits[0]
    lacks = f", and {best.absent} of its rows have no key" if best.absent else ""
    near = f"{best.matched} of {best.matched + best.unmatched} keys match {best.keymap.name}{lacks}"
    return ("no table knows exactly these keys", f"nearest: {near}")


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
    architecture: str | None,
    spec: ModelSpec | None,
    keymap: Keymap | None,
    tables: Iterable[Keymap] | None,
    readings: list[frozenset[str]],
) -> list[Keymap]:
    """The tables that may be used; others are not even read."""
    if keymap is not None:
        return [keymap]
    if tables is not None:
        return list(tables)
    return tables_for(architecture, readings, config=spec.origin if spec is not None else "")


def _variants(
    candidates: Iterable[Keymap], root: str, catalog: Catalog, spec: ModelSpec | None
) -> list[Keymap]:
    """The tables with something else before the keys of the base model.

    A class that a config names decides whether there is a head.  A container that was saved around
    the keys is no prefix of theirs.
    """
    from dcpconv.families.keymaps.bases import variants  # noqa: PLC0415 - few models need them

    is_named = spec is not None and bool(spec.stated.get("architectures"))
    has_head = spec is not None and is_named and spec.head != "none"
    containers = {path[:-1] for path in catalog.paths.values()}
    inside = "" if tuple(root.split(".")[:-1]) in containers else root
    return [one for table in candidates for one in variants(table, inside, has_head=has_head)]


def _bare_keys(root: str, counts: Mapping[tuple[str, ...], int]) -> frozenset[str]:
    return frozenset(key for key, _ in under(root, counts) if key is not None)


def _nested_root(catalog: Catalog) -> str:
    """The container that holds the weights, for keys that no table knows."""
    is_lightning = catalog.form == "dcp" and (catalog.path / "meta.pt").is_file()
    beside = [*catalog.objects, *(["lightning_version"] if is_lightning else [])]
    return nested_root(catalog.tensors, list(catalog.paths.values()), beside)


def _dotted(root: str) -> str:
    return f"{root}." if root and not root.endswith(".") else root
