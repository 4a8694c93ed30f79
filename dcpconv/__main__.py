"""``python -m dcpconv``: the same as the ``dcpconv`` command."""

from dcpconv.cli import main

main()
