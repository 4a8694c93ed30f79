"""Two or three ranks that save FSDP1's local and sharded state dicts of models they wrapped.

Every scene writes ``pytorch_model_fsdp_rankR.bin``, as accelerate does, and ``full.pt``: the state
dict before it was wrapped.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from support.models.hf_models import tiny

WRAPPED: dict[str, type[nn.Module]] = {
    "llama": LlamaDecoderLayer,
    "gemma2": Gemma2DecoderLayer,  # embedding and head are one tensor
}
KINDS = {
    "local": StateDictType.LOCAL_STATE_DICT,
    "sharded": StateDictType.SHARDED_STATE_DICT,
}


class _Tail(nn.Module):
    def __init__(self, tied: nn.Parameter) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(3, 2))
        self.inner = nn.Linear(5, 7)
        self.inner.weight = tied


def plain() -> nn.Sequential:
    """A model that no table knows: odd sizes, a tied matrix, running statistics."""
    embedding = nn.Embedding(7, 5)
    tied = cast("nn.Parameter", embedding.weight)
    model = nn.Sequential(
        embedding, nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 5), _Tail(tied)
    )
    torch.manual_seed(3)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor)
    return model


SCENES = [
    *(f"{model}-local-{names}" for model in ("plain", *WRAPPED) for names in ("named", "flat")),
    *(f"plain-sharded-{names}" for names in ("named", "flat")),
]
"""A model, the kind of its state dict, and whether parameters keep their names: ``use_orig_params``
does that."""


def _scene(name: str) -> Callable[[Path], None]:
    kind, form, naming = name.split("-")

    def save(path: Path) -> None:
        model = plain() if kind == "plain" else tiny(kind)
        whole = copy.deepcopy(model.state_dict())
        policy = {nn.BatchNorm1d} if kind == "plain" else {WRAPPED[kind]}
        wrapped = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy(policy),
            device_id=torch.device("cpu"),
            use_orig_params=naming == "named",
            ignored_modules=[model[3]] if kind == "plain" else None,
            mixed_precision=MixedPrecision(param_dtype=torch.bfloat16) if kind == "llama" else None,
        )
        with FullyShardedDataParallel.state_dict_type(wrapped, KINDS[form]):
            state = wrapped.state_dict()
        path.mkdir(exist_ok=True)
        torch.save(state, path / f"pytorch_model_fsdp_rank{dist.get_rank()}.bin")
        if dist.get_rank() == 0:
            torch.save(whole, path / "full.pt")
            if kind != "plain":
                cast("Any", model).config.save_pretrained(path)
        dist.barrier()

    return save


def _run(rank: int, ranks: int, directory: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    try:
        for name in SCENES:
            _scene(name)(directory / name)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
