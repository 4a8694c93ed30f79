"""The report that people read: who, the picture, every reason folded, the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dcpconv.checking.reports.folding import fold
from dcpconv.checking.reports.matrix import picture
from dcpconv.core.printing import printable
from dcpconv.plan.coverage import FAULTS, Coverage
from dcpconv.sources.opening import End

_LISTED = 200
"""Lines of one kind before the rest is only counted; JSON has them all."""


def render(coverage: Coverage) -> str:
    """The whole report, of which a terminal acts on nothing but line ends."""
    return "\n".join(map(printable, lines(coverage))) + "\n"


def lines(coverage: Coverage, *, pictured: bool = True) -> Iterator[str]:
    """The report line by line.

    Args:
        coverage: What there is to say.
        pictured: With the picture of characters.
    """
    yield _end("source", coverage.source, coverage.read)
    yield _end("target", coverage.target, coverage.asked, len(coverage.targets))
    for text in coverage.evidence:
        yield _line("because", text)
    drawn = list(picture(coverage)) if pictured else []
    if drawn:
        yield ""
        yield from drawn
    yield ""
    yield from _listed("problem", coverage.problems)
    for label in (*FAULTS, "ignored"):
        yield from _listed(label, map(str, fold(getattr(coverage, label))))
    yield from _listed("tied", (f"{key} = {owner}" for key, owner in coverage.tied))
    if coverage.left:
        tops = sorted({key.split(".")[0] for key in coverage.left})
        yield _line("left", f"{len(coverage.left):,} entries beside the weights: {_few(tops)}")
    yield from _listed("note", coverage.notes)
    yield from _listed("hint", coverage.suggestions)
    yield verdict(coverage)


def verdict(coverage: Coverage) -> str:
    """The answer in one line."""
    if not coverage:
        return _line("no", f"it does not fit: {coverage.counts()}")
    return _line("yes", f"it fits: {_made(coverage)}")


def _made(coverage: Coverage) -> str:
    counts: dict[str, int] = {}
    for target in coverage.targets:
        counts[target.how] = counts.get(target.how, 0) + 1
    total = f"{len(coverage.targets):,} keys"
    return f"{total} ({', '.join(f'{n:,} {how}' for how, n in counts.items())})"


def _end(label: str, family: str, end: End, keys: int = 0) -> str:
    files = f"{end.files:,} file{'s' if end.files != 1 else ''}" if end.files else ""
    counts = f"{end.keys or keys:>6,} keys {files:>10}"
    return f"{label:<9} {end.form or '-':<7} {family:<12} {counts}  {end.path}".rstrip()


def _listed(label: str, texts: Iterable[str]) -> Iterator[str]:
    texts = list(texts)
    for text in texts[:_LISTED]:
        yield _line(label, text)
    if len(texts) > _LISTED:
        yield _line(label, f"and {len(texts) - _LISTED:,} more; --report json lists them all")


def _line(label: str, text: str) -> str:
    return f"{label:<9} {text}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
