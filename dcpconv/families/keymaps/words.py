"""The words that a table may use: axes of layouts, and conditions of rows."""

from __future__ import annotations

from collections.abc import Mapping

INDICES: Mapping[str, str] = {
    "L": "layer",
    "E": "routed expert",
    "S": "shared expert",
}
"""Axes that may stand in a key, ``layers.{L}.``, as well as in a layout."""

AXES: Mapping[str, str] = {
    **INDICES,
    "V": "tokens of the vocabulary",
    "d": "hidden size",
    "h": "query heads",
    "g": "key and value heads",
    "r": "query heads per key and value head: h = g * r",
    "e": "channels of a head, where RoPE does not tell them apart",
    "two": "the two channels that RoPE turns together",
    "p": "pairs of channels: e = two * p",
    "t": "positions that the model was made for",
    "f": "width of the feed-forward block",
    "m": "width of one routed expert",
    "s": "width of one shared expert",
    "c": "latent attention: rank of keys and values",
    "a": "latent attention: rank of queries",
    "n": "latent attention: channels of a head that RoPE leaves alone",
    "v": "latent attention: channels of a value head",
    "k": "classes that scores tell apart",
}
"""Every axis whose size ``ModelSpec.axes`` gives."""

CONDITIONS: Mapping[str, str] = {
    "tied": "the head is the embedding",
    "untied": "the head is a tensor of its own",
    "sequential": "feed-forward comes after attention",
    "parallel_norms": "attention and feed-forward stand beside each other, each with its norm",
    "no_parallel_norms": "they do not",
    "dense": "in layers with a plain feed-forward block",
    "moe": "in layers with experts",
    "shared_experts": "in layers with experts, where some see every token",
    "qkv_bias": "q, k and v have biases",
    "o_bias": "the attention output has a bias",
    "mlp_bias": "gate, up and down have biases, except in routed experts",
    "head_bias": "the head has a bias",
    "qk_norm": "every head of q and k is normalised",
    "qk_norm_heads": "every head of q and k is normalised by weights of its own",
    "score": "scores stand in place of logits",
    "score_bias": "scores are of every token, and have a bias",
    "no_score_bias": "they are of a whole text, and have none",
    "spans": "starts and ends of answers stand in place of logits",
    "q_latent": "latent attention projects queries through a rank",
    "q_direct": "latent attention projects queries directly",
    "latent_bias": "latent attention projects into ranks with biases",
}
"""When a row exists: ``ModelSpec.has`` decides.  A row may join several by ``&``."""
