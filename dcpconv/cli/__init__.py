"""The command line: the library's verbs with words around them.

Results go to stdout, progress and notes to stderr.  Exit codes: 0 yes, 1 no (the checkpoint does
not fit), 2 could not tell or could not do it.
"""

from __future__ import annotations

from dcpconv.cli.app import main

__all__ = ["main"]
