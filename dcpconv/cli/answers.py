"""How every command ends: a result and 0, or one message and 1 or 2."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer

from dcpconv.core.printing import printable_lines

P = ParamSpec("P")
T = TypeVar("T")

_COULD_NOT_TELL = 2

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count: 128 + SIGINT."""


def answers(command: Callable[P, T]) -> Callable[P, T]:
    """Turns every expected complaint of a command into one message on stderr and an exit code."""
    return _answers(command, frozenset())


def answers_of(*urls: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """The same for a command of which some parameters may be URLs of stores."""
    return lambda command: _answers(command, frozenset(urls))


def _answers(command: Callable[P, T], urls: frozenset[str]) -> Callable[P, T]:

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        from dcpconv.core.errors import DcpconvError

        signal.signal(signal.SIGTERM, _terminate)
        try:
            _refuse_schemes([*args, *(v for name, v in kwargs.items() if name not in urls)])
            return command(*args, **kwargs)
        except DcpconvError as error:
            _stop(f"{type(error).__name__}: {error}", error.exit_code)
        except KeyboardInterrupt:
            _stop("interrupted; nothing was left half-written", INTERRUPTED)
        except BrokenPipeError:
            # The reader of our stdout has gone (`| head`); Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(2) from None
        except typer.Exit:
            raise
        except OSError as error:
            _stop(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 2)
        except Exception:  # noqa: BLE001  exit code 1 means "no", and Python's own would be 1
            traceback.print_exc()
            _stop("this is a mistake in dcpconv, not in your files; please report it", 2)

    return run


def judges(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose exit code is an answer: 0 yes, 1 no, and 2 whatever else may happen."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit as end:
            raise typer.Exit(min(end.exit_code, _COULD_NOT_TELL)) from None

    return run


def _refuse_schemes(given: Iterable[object]) -> None:
    """What is no place for a URL is never given one, whatever the argument is."""
    from dcpconv.stores.schemes import refuse_scheme

    for value in given:
        for text in value if isinstance(value, list) else (value,):
            if isinstance(text, (str, os.PathLike)):
                refuse_scheme(text)


def say(text: str) -> None:
    """Lines of the result, with nothing in them that a terminal would act on."""
    sys.stdout.write(printable_lines(text) + "\n")


def say_json(value: Any) -> None:
    """The whole result as JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # Inside a string, where alone they can be, both spell the same.
    sys.stdout.write(printable_lines(text, spelled="\\u{:04x}") + "\n")


def note(text: str) -> None:
    """Something worth knowing beside the result."""
    sys.stderr.write(f"note: {printable_lines(text)}\n")


def is_watched() -> bool:
    """Whether a person is looking at stderr."""
    return sys.stderr.isatty()


def _stop(text: str, code: int) -> NoReturn:
    sys.stderr.write(f"{printable_lines(text)}\n")
    raise typer.Exit(code)


def _terminate(number: int, frame: object) -> NoReturn:
    del frame
    raise KeyboardInterrupt(number)  # a scheduler that ends a job may start it again
