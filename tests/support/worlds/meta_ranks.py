"""Meta's own code on several ranks, each of which reads its file of a release.

``python meta_ranks.py RANK RANKS DIRECTORY`` loads ``DIRECTORY/release``; rank 0 leaves the logits
of ``TOKENS``, or of the tokens and images in ``DIRECTORY/seen.pt``, in ``DIRECTORY/logits.pt``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed

from support.checkpoints.families import TOKENS
from support.models.meta_package import MetaLlama3, loaded


def _run(rank: int, ranks: int, directory: Path) -> None:
    from fairscale.nn.model_parallel import initialize

    distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    initialize.initialize_model_parallel(ranks)
    Tensor.cuda = lambda tensor: tensor  # type: ignore[method-assign,assignment,misc]
    params = json.loads((directory / "release/params.json").read_text())
    state = torch.load(directory / f"release/consolidated.{rank:02d}.pth", weights_only=True)
    images = directory / "seen.pt"
    if "ffn_exp" in params:
        asked = torch.load(images) if images.is_file() else (TOKENS,)
        with torch.no_grad():
            logits = loaded(params, state)(*asked)
    else:
        model = MetaLlama3(params)
        model.model.load_state_dict(state, strict=True)
        logits = model.eval()(TOKENS)
    if rank == 0:
        torch.save(logits, directory / "logits.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
