"""solve_ffn() inverts ffn_width() for every width there is."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dcpconv.families.configs.ffn import FfnWidth, ffn_width, solve_ffn

MODELS = [
    pytest.param(4096, 11008, 256, None, id="Llama-2-7B"),
    pytest.param(5120, 13824, 256, None, id="Llama-2-13B"),
    pytest.param(4096, 14336, 256, 1.3, id="Llama-3-8B"),
    pytest.param(8192, 28672, 256, 1.31, id="Llama-3-70B"),
    pytest.param(2048, 8192, 256, 1.5, id="Llama-3.2-1B"),
    pytest.param(3072, 8192, 256, None, id="Llama-3.2-3B"),
    pytest.param(2048, 5632, 256, None, id="TinyLlama"),
    pytest.param(896, 4864, 256, 2.0, id="Qwen2.5-0.5B"),
    pytest.param(1536, 8960, 256, 2.16, id="Qwen2.5-1.5B"),
    pytest.param(2048, 11008, 256, 2.0, id="Qwen2.5-3B"),
    pytest.param(3584, 18944, 256, 1.97, id="Qwen2.5-7B"),
    pytest.param(5120, 27648, 256, 2.02, id="Qwen2.5-32B"),
    pytest.param(8192, 29568, 128, 1.35, id="Qwen2.5-72B"),
    pytest.param(4096, 13696, 128, 1.25, id="ChatGLM3-6B"),
    pytest.param(512, 1408, 128, None, id="MiniMind-512"),
    pytest.param(640, 1728, 64, None, id="MiniMind-640"),
    pytest.param(768, 2048, 256, None, id="MiniMind-768"),
    pytest.param(768, 2432, 128, 1.16, id="minimind-3"),
]

META = [
    pytest.param(4096, 1024, 1.3, 14336, id="Llama-3-8B"),
    pytest.param(8192, 4096, 1.3, 28672, id="Llama-3-70B"),
    pytest.param(2048, 256, 1.5, 8192, id="Llama-3.2-1B"),
]


@pytest.mark.parametrize(("dim", "ffn", "multiple_of", "multiplier"), MODELS)
def test_published_models_get_the_plainest_parameters(
    dim: int, ffn: int, multiple_of: int, multiplier: float | None
) -> None:
    assert ffn_width(dim, multiple_of, multiplier) == ffn
    assert solve_ffn(dim, ffn) == FfnWidth(multiple_of, multiplier)


@pytest.mark.parametrize(("dim", "multiple_of", "multiplier", "ffn"), META)
def test_the_rule_gives_the_widths_of_the_releases(
    dim: int, multiple_of: int, multiplier: float, ffn: int
) -> None:
    assert ffn_width(dim, multiple_of, multiplier) == ffn


@settings(max_examples=3000)
@given(dim=st.integers(1, 16_384), ffn=st.integers(1, 131_072))
@example(dim=1, ffn=1)
@example(dim=16_384, ffn=1)
@example(dim=1, ffn=131_072)
def test_the_solution_gives_back_any_width(dim: int, ffn: int) -> None:
    width = solve_ffn(dim, ffn)
    assert ffn_width(dim, width.multiple_of, width.multiplier) == ffn


@pytest.mark.parametrize("dim", [8, 96, 512, 4096, 5120, 16_384])
def test_every_width_of_a_range_has_a_solution(dim: int) -> None:
    # Both sides of 8/3 dim, where a multiplier is below and above one, and every residue.
    middle = int(8 * dim / 3)
    for ffn in range(max(1, middle - 2000), middle + 2000):
        width = solve_ffn(dim, ffn)
        assert ffn_width(dim, width.multiple_of, width.multiplier) == ffn


@settings(max_examples=1000)
@given(dim=st.integers(1, 2**31 - 1), ffn=st.integers(1, 2**31 - 1))
def test_no_size_that_a_spec_admits_is_too_large(dim: int, ffn: int) -> None:
    width = solve_ffn(dim, ffn)
    assert ffn_width(dim, width.multiple_of, width.multiplier) == ffn


@settings(max_examples=1000)
@given(
    dim=st.integers(8, 16_384),
    multiple_of=st.sampled_from([1, 7, 64, 100, 256, 1024, 4096]),
    multiplier=st.none() | st.floats(0.01, 16.0),
)
def test_any_file_can_be_restated(dim: int, multiple_of: int, multiplier: float | None) -> None:
    ffn = ffn_width(dim, multiple_of, multiplier)
    if ffn > 0:
        width = solve_ffn(dim, ffn)
        assert ffn_width(dim, width.multiple_of, width.multiplier) == ffn


@pytest.mark.parametrize(("dim", "ffn"), [(0, 1), (1, 0), (-8, 8)])
def test_a_size_below_one_has_no_solution(dim: int, ffn: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        solve_ffn(dim, ffn)
