"""GitHub Actions: annotations in the log, a table in the job's summary.

Source: docs.github.com "Workflow commands for GitHub Actions" (grammar, escaping; ten annotations
of a level per step are shown).
"""

from __future__ import annotations

from collections.abc import Iterator

from dcpconv.checking.reports.folding import fold
from dcpconv.checking.reports.matrix import picture
from dcpconv.checking.reports.text import verdict
from dcpconv.core.printing import printable
from dcpconv.plan.coverage import FAULTS, Coverage

_SHOWN = 10
"""Annotations of one level that GitHub shows per step."""


def commands(coverage: Coverage) -> Iterator[str]:
    """Workflow commands, one line each: an error per reason, the last one counting the rest."""
    if coverage:
        yield _command("notice", "dcpconv check", verdict(coverage))
        return
    reasons = list(_reasons(coverage))
    shown = reasons if len(reasons) <= _SHOWN else reasons[: _SHOWN - 1]
    for label, subject, why in shown:
        yield _command("error", f"dcpconv: {label}", f"{subject}  {why}".rstrip())
    if len(reasons) > len(shown):
        more = f"and {len(reasons) - len(shown):,} more reasons; the job summary lists them"
        yield _command("error", "dcpconv check", more)
    for text in coverage.suggestions:
        yield _command("notice", "dcpconv: hint", text)


def render(coverage: Coverage) -> str:
    """Markdown for the job summary: the answer, the picture, a row per reason."""
    source, target = coverage.read.path or coverage.source, coverage.asked.path or coverage.target
    answer = "fits" if coverage else f"does not fit: {coverage.counts()}"
    lines = [
        f"### dcpconv check: {answer}",
        "",
        f"{_code(source)} ({coverage.source}) against {_code(target)} ({coverage.target})",
        "",
    ]
    drawn = list(picture(coverage))
    if drawn:
        lines += ["```text", *(printable(line).replace("```", "'''") for line in drawn), "```", ""]
    rows = [*_reasons(coverage), *(("ignored", f.key, f.why) for f in fold(coverage.ignored))]
    if rows:
        lines += ["| | key | why |", "| --- | --- | --- |"]
        lines += [f"| {label} | {_code(key)} | {_cell(why)} |" for label, key, why in rows]
        lines.append("")
    lines += [f"- {_cell(text)}" for text in (*coverage.suggestions, *coverage.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _reasons(coverage: Coverage) -> Iterator[tuple[str, str, str]]:
    for text in coverage.problems:
        yield "problem", printable(text), ""
    for label in FAULTS:
        for folded in fold(getattr(coverage, label)):
            count = f"{folded.count:,} keys; " if folded.count > 1 else ""
            yield label, folded.key, f"{count}{folded.why}"


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return printable(text).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _code(text: str) -> str:
    """Inline code that no content can close; a bar would end the table's cell."""
    return f"`{_cell(text).replace('`', chr(39))}`"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
