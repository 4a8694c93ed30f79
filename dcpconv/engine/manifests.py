"""Where the manifest of a fingerprint stands: inside a directory of weights, or beside one file.

Nothing but its place is known here.  A directory takes its manifest along when it is put in place
of another; a file does not, so that the two are exchanged one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

_Path = TypeVar("_Path", bound=Path)

MANIFEST = "dcpconv_fingerprint.json"
"""What a manifest in a directory of weights is called."""


def manifest_of_file(file: _Path) -> _Path:
    """Where the manifest of one file stands.

    >>> manifest_of_file(Path("out/model.pth")).name
    'model.pth.dcpconv_fingerprint.json'
    """
    return file.with_name(f"{file.name}.{MANIFEST}")


def manifest_beside(weights: Path) -> Path:
    """Where the manifest of weights is kept: in their directory, or beside their file."""
    return weights / MANIFEST if weights.is_dir() else manifest_of_file(weights)


def put_file(file: Path, target: Path) -> None:
    """Rename a file into place, and the manifest beside it after that.

    The manifest of what was there goes first: at no moment does one stand beside other weights.

    Raises:
        OSError: They cannot be renamed.
    """
    made, old = manifest_of_file(file), manifest_of_file(target)
    if made.exists() or target.exists():
        old.unlink(missing_ok=True)
    file.replace(target)
    if made.exists():
        made.replace(old)
