"""Every complaint has one shape: what, where, what was expected, what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from typing_extensions import Self

from dcpconv.core.printing import printable


class DcpconvError(Exception):
    """A headline, facts that callers can read without parsing text, and a hint.

    Args:
        headline: What is wrong, in one line.
        facts: ``(label, value)`` lines below the headline, in order; labels may repeat, so that
            one error lists every missing key.
        hint: The next step for the user, if one is known.

    >>> print(DcpconvError("file is too short", [("file", "a.safetensors")], hint="fetch it again"))
    file is too short
      file      a.safetensors
      hint      fetch it again
    """

    exit_code: ClassVar[int] = 2
    """What the command line exits with: 2 could not tell, 1 the answer is no."""

    def __init__(
        self,
        headline: str,
        facts: Iterable[tuple[str, object]] = (),
        *,
        hint: str | None = None,
    ) -> None:
        self.headline = headline
        self.facts: tuple[tuple[str, object], ...] = tuple(facts)
        self.hint = hint
        super().__init__(headline)

    def __str__(self) -> str:
        rows = [*self.facts, *([("hint", self.hint)] if self.hint else [])]
        lines = [self.headline, *(f"  {label:<9} {value}" for label, value in rows)]
        return "\n".join(map(printable, lines))

    @property
    def in_one_line(self) -> str:
        """What is wrong and where, for a list of such lines."""
        facts = ", ".join(f"{label} {value}" for label, value in self.facts)
        return f"{self.headline} ({facts})" if facts else self.headline

    def with_facts(self, facts: Iterable[tuple[str, object]]) -> Self:
        """The same error with other facts."""
        made = copy(self)
        made.facts = tuple(facts)
        return made

    def __reduce__(self) -> tuple[object, ...]:
        # Process groups send errors between ranks; the default would drop the keyword argument.
        return (_rebuild, (type(self), self.headline, self.facts, self.hint))


def _rebuild(
    kind: type[DcpconvError],
    headline: str,
    facts: tuple[tuple[str, object], ...],
    hint: str | None,
) -> DcpconvError:
    return kind(headline, facts, hint=hint)


FormatKind = Literal["damaged", "untrusted", "transformed"]
"""A file that is not what its form promises; that names code; whose items an extension changed."""


class FormatError(DcpconvError, ValueError):
    """A file does not hold what its form promises: truncated, overlapping, absurd, or unsafe."""

    def __init__(
        self,
        headline: str,
        facts: Iterable[tuple[str, object]] = (),
        *,
        hint: str | None = None,
        kind: FormatKind = "damaged",
    ) -> None:
        super().__init__(headline, facts, hint=hint)
        self.kind: FormatKind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_format, (self.headline, self.facts, self.hint, self.kind))


def _rebuild_format(
    headline: str, facts: tuple[tuple[str, object], ...], hint: str | None, kind: FormatKind
) -> FormatError:
    return FormatError(headline, facts, hint=hint, kind=kind)


class SourceChangedError(DcpconvError, OSError):
    """A source file is not what it was when its headers were read; facts name each."""


class NotACheckpointError(DcpconvError, FileNotFoundError):
    """The path is absent, or nothing in it is a checkpoint of a form we know."""


class SpecError(DcpconvError, ValueError):
    """A config cannot be read, lacks a field, or contradicts the tensors."""


class LayoutError(DcpconvError, ValueError):
    """A layout string is malformed, or two of them do not name the same axes."""


class KeymapError(DcpconvError, ValueError):
    """A naming table is malformed; facts point into the file."""


class CoverageError(DcpconvError, KeyError):
    """Keys are missing, unknown or misshapen; facts list all of them."""

    exit_code = 1
    __str__ = DcpconvError.__str__  # KeyError would print a repr


class NotExpressibleError(DcpconvError, ValueError):
    """The target family cannot hold this model; facts list every reason."""

    exit_code = 1


class AmbiguousFamilyError(DcpconvError, ValueError):
    """Several families fit and the choice changes the bytes; facts list the candidates."""


class LossyCastError(DcpconvError, ValueError):
    """A cast would overflow; facts list the tensors."""

    exit_code = 1


class TargetExistsError(DcpconvError, FileExistsError):
    """The target exists, or another conversion is writing it."""


class NoSpaceError(DcpconvError, OSError):
    """The disk cannot hold the result."""
