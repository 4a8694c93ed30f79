"""What the user asked of a conversion."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from dcpconv.core.catalog import Form
from dcpconv.core.dtypes import BY_LABEL, DType, dtype_named
from dcpconv.core.errors import DcpconvError, TargetExistsError
from dcpconv.engine.publish import clear
from dcpconv.engine.targets import check_target
from dcpconv.formats.dcp.names import METADATA_FILE
from dcpconv.sources.said import STORED, Said
from dcpconv.stores.remote import RemotePath
from dcpconv.stores.schemes import is_remote

if TYPE_CHECKING:
    from dcpconv.engine.placing import Ground
    from dcpconv.sources.adapters.naming import Weighed

_IN_RANKS = frozenset({"meta", "meta-llama4", "meta-memory-llama4"})
"""Namings that Meta's own code reads from one file per rank."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


_EFFECT: Final = {
    "chunks": "only a dcp result is cut into row chunks",
    "model_parallel": "only a torch result in the naming meta has a file per rank",
    "max_file_size": "a torch result is one file",
    "root": "an hf result has no container",
    "cast_all": "without a dtype nothing is cast",
}
"""Which results an option is for."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the result should be; see ``convert``.

    Attributes:
        path: Where it goes.
        form: How its bytes are stored, where the user says.
        to: Its naming, where the user says.
        root: Container of the weights.
        dtype: Element type to cast to.
        cast_all: Whether vectors and scalars are cast too.
        chunks: Row chunks of every tensor in a DCP.
        model_parallel: Files of a result in Meta's naming.
        max_file_size: Bytes of tensors per file at most.
        overwrite: Whether an existing target is replaced.
        stem: Goes into the names of data files, where objects of other names have to stay.
        fingerprint: Whether its manifest stands beside it.
    """

    path: Path
    form: Form | None
    to: str | None
    root: str | None
    dtype: DType | None
    cast_all: bool
    chunks: int
    model_parallel: int
    max_file_size: int | None
    overwrite: bool
    fingerprint: bool = False
    stem: str = ""

    def form_from(self, source: Form) -> Form:
        """The form of the result: the one asked for, or what its name and the source suggest."""
        if self.form is not None:
            return self.form
        if self.path.suffix in {".pth", ".pt", ".bin"}:
            return "torch"
        is_hf = self.to in {None, "hf", STORED} or str(self.to).startswith("hf-")
        return "hf" if source == "dcp" and is_hf else "dcp"

    def ranks(self, form: Form) -> int:
        """Files of a model-parallel result; 1 for every other."""
        return self.model_parallel if form == "torch" and self.to in _IN_RANKS else 1

    def require_disk_for_manifest(self) -> None:
        """Refuses a fingerprint of what several processes write into a store: they read it back.

        Raises:
            DcpconvError: One is asked for.
        """
        if self.fingerprint and isinstance(self.path, RemotePath):
            raise DcpconvError(
                "several processes take the fingerprint of a result on a disk only",
                [("target", self.path)],
                hint=f"leave it out: `dcpconv fingerprint {self.path}` takes one of the result",
            )

    def without_effect(self, form: Form) -> list[str]:
        """What was asked for and means nothing for a result of this form, one sentence each."""
        asked = {
            "chunks": self.chunks > 1 and form != "dcp",
            "model_parallel": self.model_parallel > 1 and self.ranks(form) == 1,
            "max_file_size": self.max_file_size is not None and form == "torch",
            "root": bool(self.root) and form == "hf",
            "cast_all": self.cast_all and self.dtype is None,
        }
        return [
            f"{name} has no effect: {_EFFECT[name]}" for name, is_idle in asked.items() if is_idle
        ]

    def is_one_file(self, form: Form) -> bool:
        """Whether the result is a file and not a directory."""
        return form == "torch" and self.ranks(form) == 1


@dataclass(frozen=True, slots=True)
class Request:
    """A conversion as the user asked for it.

    Attributes:
        source: Where it is, here or in a store.
        said: How to understand it.
        only: The part of it to take.
        wanted: What the result should be.
        trust: Whether torch may unpickle without restrictions.
        adapters: What is merged into it, in this order.
    """

    source: Path
    said: Said
    only: str | None
    wanted: Wanted
    trust: bool
    adapters: tuple[Weighed, ...] = ()

    def check_target(self) -> Ground | None:
        """Raises early, before anything is read, where the target cannot be written; of a target in
        a store, what is there."""
        form = self.wanted.form_from("hf")  # no source makes a directory a file, or back
        if isinstance(self.wanted.path, RemotePath):
            from dcpconv.engine.placing import survey  # noqa: PLC0415 - most targets are paths

            return survey(
                self.wanted.path,
                overwrite=self.wanted.overwrite,
                is_file=self.wanted.is_one_file(form),
                source=self.source,
            )
        try:
            check_target(
                self.wanted.path,
                overwrite=self.wanted.overwrite,
                is_file=self.wanted.is_one_file(form),
                source=guarded(self.source, self.wanted.path),
            )
        except TargetExistsError:
            from dcpconv.engine.worlds.leftovers import is_over  # noqa: PLC0415 - rarely needed

            clear(self.wanted.path, is_over=is_over)
            raise
        return None

    def plain_form(self) -> Form | None:
        """Form of the target if torch's own two functions do all that is asked, else ``None``."""
        from dcpconv.conversion import torch_engine  # noqa: PLC0415 - imports torch

        said, wanted = self.said, self.wanted
        own = torch_engine.form_of(self.source)
        form = wanted.form_from(own)
        changed = (wanted.to, wanted.root, wanted.dtype, wanted.max_file_size)
        stated = (said.from_, said.keymap, said.assets, self.only)
        is_verbatim = all(change is None for change in (*changed, *stated))
        is_verbatim = is_verbatim and wanted.chunks == 1 and not said.sizes and not self.adapters
        return form if is_verbatim and {own, form} == {"torch", "dcp"} else None


def told(convert: _Function) -> _Function:
    """A function that takes ``target``, ``rank``, ``of`` and ``run``; where there are several
    ranks, what fails in one before they have met is left for the others to find."""

    @wraps(convert)
    def telling_others(*args: Any, **options: Any) -> Any:
        rank, of = options.get("rank", 0), options.get("of", 1)
        if (of == 1 and rank == 0) or options.get("dry_run"):
            return convert(*args, **options)
        from dcpconv.engine.worlds.early import telling  # noqa: PLC0415 - most are alone
        from dcpconv.engine.worlds.seats import Seat  # noqa: PLC0415

        target = options["target"] if "target" in options else args[1]
        with telling(target, Seat(rank, of, options.get("run", ""))):
            return convert(*args, **options)

    return cast("_Function", telling_others)


def guarded(source: Path, target: Path, files: Collection[str] = ()) -> Path | None:
    """What a result must not replace: the source.

    A file of ``torch.save`` beside the files of a DCP is no part of it: torch's own
    ``dcp_to_torch_save`` writes there, and writes there again.

    Args:
        source: What is read.
        target: Where the result goes.
        files: What the source is known to consist of.
    """
    if is_remote(source) or is_remote(target):
        return None
    is_beside = (
        target.suffix in {".pth", ".pt", ".bin"}
        and target.is_file()
        and target.resolve().parent == source.resolve()
        and target.resolve().name not in files
        and (source / METADATA_FILE).is_file()
    )
    return None if is_beside else source


def float_dtype(name: str | None) -> DType | None:
    """The floating-point type that the user names.

    Raises:
        DcpconvError: It is none.
    """
    if name is None:
        return None
    dtype = dtype_named(name)
    if dtype is None or not dtype.is_floating_point:
        floats = ", ".join(d.label for d in BY_LABEL.values() if d.is_floating_point)
        raise DcpconvError(f"cannot cast to {name!r}", [("expected", f"one of {floats}")])
    return dtype
