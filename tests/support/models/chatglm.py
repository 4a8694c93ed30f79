"""ChatGLM3 (and 2) by its parameter names, order, shapes and arithmetic.

Written from the facts, without the model's own code.

Source: ``modeling_chatglm.py`` and ``config.json`` of THUDM/chatglm3-6b.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.models.layers import RMSNorm, angles, attend, rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatGLMConfig:
    """Field names are those of ChatGLM's ``config.json``."""

    num_layers: int = 3
    hidden_size: int = 96
    num_attention_heads: int = 6
    multi_query_group_num: int = 2
    multi_query_attention: bool = True
    kv_channels: int = 16
    ffn_hidden_size: int = 152
    padded_vocab_size: int = 131
    layernorm_epsilon: float = 1e-5
    add_qkv_bias: bool = True
    rope_ratio: float = 1.0

    @property
    def theta(self) -> float:
        return 1e4 * self.rope_ratio

    @property
    def groups(self) -> int:
        if self.multi_query_attention:
            return self.multi_query_group_num
        return self.num_attention_heads

    def as_json(self) -> dict[str, object]:
        """``config.json`` as the published models have it, with these sizes."""
        return {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "multi_query_attention": self.multi_query_attention,
            "multi_query_group_num": self.multi_query_group_num,
            "kv_channels": self.kv_channels,
            "ffn_hidden_size": self.ffn_hidden_size,
            "padded_vocab_size": self.padded_vocab_size,
            "layernorm_epsilon": self.layernorm_epsilon,
            "add_qkv_bias": self.add_qkv_bias,
            "add_bias_linear": False,
            "apply_residual_connection_post_layernorm": False,
            "post_layer_norm": True,
            "rmsnorm": True,
            "original_rope": True,
            "rope_ratio": self.rope_ratio,
            "seq_length": 64,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "eos_token_id": 2,
            "pad_token_id": 0,
        }


class SelfAttention(nn.Module):
    """Queries, keys and values come from one matrix.

    Its rows are ``[q | k | v]`` with ``multi_query_attention``, else ``[head][q | k | v]``.
    RoPE turns neighbouring pairs in the first half of each head.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        query = config.num_attention_heads * config.kv_channels
        rows = query + 2 * config.groups * config.kv_channels
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=config.add_qkv_bias)
        self.dense = nn.Linear(query, config.hidden_size, bias=False)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        config = self.config
        fused = self.query_key_value(x)
        if config.multi_query_attention:
            heads = fused.view(*x.shape[:-1], -1, config.kv_channels)
            q, k, v = heads.split((config.num_attention_heads, config.groups, config.groups), -2)
        else:
            heads = fused.view(*x.shape[:-1], -1, 3, config.kv_channels)
            q, k, v = heads.unbind(-2)
        q, k = (rotate(t, angle, interleaved=True) for t in (q, k))
        out: Tensor = self.dense(attend(q, k, v))
        return out


class MLP(nn.Module):
    """SwiGLU with gate and up in one matrix, the gate first."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        out: Tensor = self.dense_4h_to_h(functional.silu(gate) * up)
        return out


class Layer(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x), angle)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class ChatGLM(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        rotary_dim = config.kv_channels // 2
        self.transformer = nn.Module()
        self.transformer.embedding = nn.Module()
        self.transformer.embedding.word_embeddings = nn.Embedding(
            config.padded_vocab_size, config.hidden_size
        )
        self.transformer.rotary_pos_emb = nn.Module()
        exponent = torch.arange(0, rotary_dim, 2) / rotary_dim
        self.transformer.rotary_pos_emb.register_buffer("inv_freq", 1.0 / config.theta**exponent)
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(
            Layer(config) for _ in range(config.num_layers)
        )
        self.transformer.encoder.final_layernorm = RMSNorm(
            config.hidden_size, config.layernorm_epsilon
        )
        self.transformer.output_layer = nn.Linear(
            config.hidden_size, config.padded_vocab_size, bias=False
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seq, vocab] of ``tokens`` [batch, seq]."""
        angle = angles(tokens.shape[1], self.config.kv_channels // 2, self.config.theta)
        x = self.transformer.get_submodule("embedding.word_embeddings")(tokens)
        for layer in self.transformer.get_submodule("encoder.layers").children():
            x = layer(x, angle)
        x = self.transformer.get_submodule("encoder.final_layernorm")(x)
        out: Tensor = self.transformer.get_submodule("output_layer")(x)
        return out
