"""Meta's own Llama 3 and 4 on a CPU: the package ``llama-models`` on ``fairscale`` of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn


@contextmanager
def one_rank(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, in which the package's caches stay on the CPU."""
    from fairscale.nn.model_parallel import initialize

    store = f"file://{directory / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    initialize.initialize_model_parallel(1)
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor)
    try:
        yield
    finally:
        initialize.destroy_model_parallel()
        distributed.destroy_process_group()


IMAGE = 130
"""The token that stands for a part of an image."""


class MetaLlama4(nn.Module):
    """The reference model of a params.json: token ids, of which some may be of images, to
    logits."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        from llama_models.llama4.args import ModelArgs
        from llama_models.llama4.model import Transformer

        super().__init__()
        self.model = Transformer(ModelArgs(**params, max_seq_len=64, max_batch_size=4))
        if params.get("vision_args"):
            self.model.vision_embeddings.float()  # made in bf16

    def forward(self, tokens: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        from llama_models.llama4.datatypes import MaskedEmbedding, TransformerInput

        image = None
        if pixel_values is not None:
            mask = (tokens == IMAGE).unsqueeze(-1)
            batch = [[images] for images in torch.tensor_split(pixel_values, len(tokens))]
            embedded = self.model.vision_embeddings(batch, mask, self.model.tok_embeddings(tokens))
            image = MaskedEmbedding(embedding=embedded, mask=mask)
        found: Tensor = self.model(TransformerInput(tokens, 0, image)).logits
        return found


class MetaLlama3(nn.Module):
    """The same of Llama 3, for sequences as long as the file says."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        from llama_models.llama3.args import ModelArgs
        from llama_models.llama3.model import Transformer

        super().__init__()
        length = params["max_position_embeddings"]
        self.model = Transformer(ModelArgs(max_seq_len=length, max_batch_size=4, **params))

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.model(tokens, 0)
        return found


def loaded(params: Mapping[str, Any], state: Mapping[str, Tensor]) -> MetaLlama4:
    """The model with these weights, under the names of its releases or its own."""
    model = MetaLlama4(params)
    kept = {name: torch.clone(tensor) for name, tensor in state.items()}
    model.model.load_state_dict(kept, strict=True)
    return model.eval()
