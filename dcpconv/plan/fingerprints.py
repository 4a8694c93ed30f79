"""The fingerprint of a model's weights, and the manifest of all tensors that it is made of.

docs/fingerprints.md defines it, so that others can compute the same.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dcpconv.core.dtypes import BY_LABEL
from dcpconv.core.errors import FormatError
from dcpconv.core.outline import Fill
from dcpconv.core.printing import printable
from dcpconv.plan.canonical import IDLE_AS_ZEROS, Canonical, canonical
from dcpconv.plan.coverage import Target
from dcpconv.plan.fills import fill_of
from dcpconv.sources.understanding import Source
from dcpconv.stores.json_files import read_json
from dcpconv.stores.local import Sources

if TYPE_CHECKING:
    from dcpconv.plan.readers import Readers

SCHEME = "dcpconv1"
"""Version of the definition; a digest of another version says nothing about one of this."""

_LARGEST = 1 << 28
"""Bytes of a manifest that is read: a million tensors have 150 MB."""

Names = Literal["slots", "stored"]


@dataclass(frozen=True, slots=True)
class TensorPrint:
    """One tensor of a fingerprint.

    Attributes:
        name: Its canonical name, or its key where the model is not known.
        dtype: Label of its element type.
        shape: In its canonical axes.
        digest: 32 bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * BY_LABEL[self.dtype].itemsize

    @property
    def line(self) -> str:
        """What the digest of the model is made of."""
        shape = "x".join(map(str, self.shape))
        return f"{json.dumps(self.name)} {self.dtype} {shape} {self.digest.hex()}\n"

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "digest": self.digest.hex(),
        }


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What the weights of a model are, whatever form and naming they are in.

    Attributes:
        names: ``slots`` where tensors have canonical names, ``stored`` where they have their keys.
        tensors: Each once, by name.
        family: Naming of the source; empty where no table was used.
        path: What the user named.
        left_out: ``(key, reason)`` of what is computed and takes no part.
        notes: What else a user should know, one sentence each.
    """

    names: Names
    tensors: tuple[TensorPrint, ...]
    family: str = ""
    path: str = ""
    left_out: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """The fingerprint itself: ``dcpconv1:`` and 64 hexadecimal digits; ``dcpconv1-stored:``
        where it is over keys as they are stored."""
        from dcpconv.engine.chunks import digest_of_text  # noqa: PLC0415 - records need none

        return f"{self.scheme}:{digest_of_text(tensor.line for tensor in self.tensors)}"

    @property
    def scheme(self) -> str:
        """Version of the definition, and what the names are."""
        return SCHEME if self.names == "slots" else f"{SCHEME}-stored"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            **self._head(),
            "tensors": {tensor.name: tensor.to_json() for tensor in self.tensors},
        }

    def manifest(self) -> Iterator[str]:
        """``to_json`` as lines, a tensor a line, so that versions can be compared; what a line is
        made of is in memory one by one."""
        yield "{"
        for name, value in self._head().items():
            yield f' "{name}": {json.dumps(value)},'
        yield ' "tensors": {'
        last = len(self.tensors) - 1
        for at, tensor in enumerate(self.tensors):
            comma = "" if at == last else ","
            yield f"  {json.dumps(tensor.name)}: {json.dumps(tensor.to_json())}{comma}"
        yield " }"
        yield "}"

    def _head(self) -> dict[str, Any]:
        return {
            "fingerprint": self.digest,
            "names": self.names,
            "family": self.family or None,
            "left_out": [{"key": key, "why": why} for key, why in self.left_out],
            "notes": list(self.notes),
        }

    def write(self, path: Path) -> None:
        """Write the manifest, which ``check --against`` and ``runs verify --deep`` read."""
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in self.manifest())


def fingerprint_of(
    source: Source,
    known: Canonical | None = None,
    *,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
    total: Callable[[int], None] | None = None,
    ranks: Readers | None = None,
) -> Fingerprint:
    """Reads every tensor of a source once and digests it; memory does not grow with the model.

    Args:
        source: As it was understood.
        known: Its tensors without their naming, where that is known already.
        jobs: Threads; as many as there are CPUs, 4 at most, by default.
        progress: Called from the threads with bytes read since its last call.
        total: Called with the bytes that will be read, before the first is.
        ranks: The processes that read this together, each a share; all get the same.

    Raises:
        AmbiguousFamilyError: Several namings fit and lead to different bytes.
        LayoutError: Elements change places, and neither config nor shapes say where to.
        RankError: The ranks do not read the same, or one of them is gone.
        FormatError: A file is missing, unreadable or too short.
        SourceChangedError: A file changed meanwhile.
    """
    from dcpconv.engine.hashing import digests  # noqa: PLC0415 - records need none

    known = known or canonical(source)
    if total is not None:
        total(sum(target.nbytes for target in known.targets))
    if ranks is not None:
        targets = known.targets
        found = ranks.digests(
            len(targets),
            lambda number: _fill_of(targets[number]),
            catalog=source.catalog,
            jobs=jobs,
            progress=progress,
        )
    else:
        with Sources.of(source.catalog) as sources:
            found = digests(fills_of(known), sources=sources, jobs=jobs, progress=progress)
    return made_of(source, known, found)


def fills_of(known: Canonical) -> Iterator[Fill]:
    """What every tensor consists of, in order."""
    yield from map(_fill_of, known.targets)


def _fill_of(target: Target) -> Fill:
    return fill_of(target, (0,) * len(target.shape), target.shape)


def made_of(source: Source, known: Canonical, digests: Iterable[bytes]) -> Fingerprint:
    """The fingerprint of a source whose digests are known.

    Args:
        source: As it was understood.
        known: Its tensors without their naming.
        digests: Of every one of them, in order.
    """
    from dcpconv.engine.chunks import digest_of  # noqa: PLC0415 - records need none

    tensors, left_out = [], list(known.left_out)
    for target, digest in zip(known.targets, digests, strict=True):
        made = TensorPrint(target.key, target.dtype.label, target.shape, digest)
        if IDLE_AS_ZEROS.intersection(target.slots) and digest == digest_of(bytes(made.nbytes)):
            left_out.append((target.key, "all zeros, so that it does nothing"))
        else:
            tensors.append(made)
    return Fingerprint(
        names="stored" if known.is_stored else "slots",
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.name)),
        family=known.family,
        path=source.end.path,
        left_out=tuple(left_out),
        notes=known.notes,
    )


def is_manifest(path: Path) -> bool:
    """Whether a file looks like a manifest, by its first bytes."""
    with path.open("rb") as file:
        return file.read(64).split(b":", 1)[0].strip(b"{ \r\n\t") == b'"fingerprint"'


def read_manifest(path: Path) -> Fingerprint:
    """The fingerprint that a manifest states; its tensors must make up its digest.

    Raises:
        FormatError: It is no manifest, of another version, or was edited.
    """
    stated = read_json(path, most=_LARGEST, hook=_as_print)
    if not isinstance(stated, dict) or not isinstance(stated.get("tensors"), dict):
        raise FormatError("this is no manifest of a fingerprint", [("file", path)])
    text, names = str(stated.get("fingerprint")), str(stated.get("names"))
    scheme = text.partition(":")[0]
    if scheme not in {SCHEME, f"{SCHEME}-stored"} or names not in {"slots", "stored"}:
        raise FormatError(
            "the manifest is of another version than this program knows",
            [("file", path), ("expected", f"{SCHEME}, found {printable(scheme)}")],
            hint="`dcpconv fingerprint SRC -o FILE` writes one of this version",
        )
    tensors = []
    for name, value in sorted(stated["tensors"].items()):
        if not isinstance(value, tuple):
            raise FormatError(
                "the manifest does not say what a tensor is", [("file", path), ("tensor", name)]
            )
        tensors.append(TensorPrint(name, *value))
    kind: Names = "slots" if names == "slots" else "stored"
    found = Fingerprint(kind, tuple(tensors), str(stated.get("family") or ""), str(path))
    if found.digest != text:
        raise FormatError(
            "the tensors of the manifest do not make up its fingerprint",
            [("file", path), ("expected", text), ("found", found.digest)],
            hint="it was edited or cut short; take it from where it was committed",
        )
    return found


def _as_print(value: dict[str, Any]) -> object:
    """What a tensor's object says, as soon as it is read: a manifest may have a million."""
    if value.keys() != {"dtype", "shape", "digest"}:
        return value
    dtype, shape, digest = value["dtype"], value["shape"], value["digest"]
    is_shape = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not isinstance(dtype, str) or dtype not in BY_LABEL or not is_shape:
        return value
    try:
        found = bytes.fromhex(digest)
    except (TypeError, ValueError):
        return value
    return (sys.intern(dtype), tuple(shape), found) if len(found) == 32 else value
