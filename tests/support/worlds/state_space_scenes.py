"""Scenes for ``dist_worlds``: the pairs of ``pair_scenes`` whose layers keep a state.

Run as a script by ``launch``.
"""

from __future__ import annotations

from collections.abc import Mapping

from support.worlds.dist_worlds import Scene, take_part
from support.worlds.pair_scenes import Pair, scenes_of

PAIRS: Mapping[str, Pair] = {
    "qwen3_next-qwen3_5_moe_text": ("qwen3_next", {}, "hf-memory-qwen3_5_moe_text"),
    "nemotron_h-memory": ("nemotron_h", {"moe_latent_size": 36}, "hf-memory-nemotron_h"),
    "kimi_linear-memory": ("kimi_linear", {}, "hf-memory-kimi_linear"),
}
SCENES: dict[int, dict[str, Scene]] = {2: scenes_of(PAIRS)}

if __name__ == "__main__":
    take_part(SCENES)
