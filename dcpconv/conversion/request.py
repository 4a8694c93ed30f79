"""What the user asked of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dcpconv.core.catalog import Form
from dcpconv.core.dtypes import DType
from dcpconv.engine.publish import check_target
from dcpconv.plan.adapting import Weighed


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for; see ``convert``."""

    source: Path
    target: Path
    form: Form | None
    to: str | None
    from_: str | None
    keymap: Path | None
    root: str | None
    only: str | None
    dtype: DType | None
    cast_all: bool
    dequantize: bool
    allow: tuple[str, ...]
    assets: Path | None
    sizes: Mapping[str, str]
    chunks: int
    model_parallel: int
    max_file_size: int | None
    overwrite: bool
    trust: bool
    adapters: tuple[Weighed, ...] = ()

    def check_target(self) -> None:
        """Raises early, before anything is read, where the target cannot be written."""
        is_split = self.to == "meta" and self.model_parallel > 1
        form = self.form or default_form("hf", self.target, self.to)
        check_target(
            self.target,
            overwrite=self.overwrite,
            is_file=form == "torch" and not is_split,
            source=self.source,
        )

    def plain_form(self) -> Form | None:
        """Form of the target if torch's own two functions do all that is asked, else ``None``."""
        from dcpconv.conversion import torch_engine  # noqa: PLC0415 - imports torch

        own = torch_engine.form_of(self.source)
        form = self.form or default_form(own, self.target, self.to)
        changes = (self.to, self.from_, self.keymap, self.root, self.only, self.dtype, self.assets)
        is_verbatim = not any(change is not None for change in (*changes, self.max_file_size))
        is_verbatim = is_verbatim and self.chunks == 1 and not self.sizes and not self.adapters
        return form if is_verbatim and {own, form} == {"torch", "dcp"} else None


def default_form(source: Form, target: Path, to: str | None = None) -> Form:
    """The form that a target's name and the source suggest."""
    if target.suffix in {".pth", ".pt", ".bin"}:
        return "torch"
    family_is_hf = to is None or to == "hf" or to.startswith("hf-")
    return "hf" if source == "dcp" and family_is_hf else "dcp"
