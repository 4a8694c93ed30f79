"""Files of ``torch.save``: one, a directory of shard files, or Meta's model-parallel ranks."""

from __future__ import annotations

from dcpconv.formats.torchfile.files import (
    alone_in,
    is_one_in_a_directory,
    is_torch_file,
    read_catalog,
)
from dcpconv.formats.torchfile.outline import outline

__all__ = ["alone_in", "is_one_in_a_directory", "is_torch_file", "outline", "read_catalog"]
