"""Layout strings: what they parse to, and what they refuse."""

from __future__ import annotations

import pytest

from dcpconv.core.errors import LayoutError
from dcpconv.core.layout import Layout, relabel

SIZES = {"V": 131, "d": 12, "h": 6, "g": 2, "e": 8, "two": 2, "p": 4, "f": 20, "E": 3, "m": 5}


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        pytest.param("d", (12,), id="vector"),
        pytest.param("", (), id="0-d"),
        pytest.param("V d", (131, 12), id="matrix"),
        pytest.param("(h two p) d", (48, 12), id="fused rows"),
        pytest.param("d (h e)", (12, 48), id="fused columns"),
        pytest.param("[(h e) | (g e) | (g e)] d", (80, 12), id="qkv end to end"),
        pytest.param("(h [e | e | e]) d", (144, 12), id="qkv within each head"),
        pytest.param("E [m | m] d", (3, 10, 12), id="stacked experts"),
        pytest.param("1 E", (1, 3), id="fixed dim"),
        pytest.param("(g (h e)) d", (96, 12), id="nested parentheses"),
    ],
)
def test_shape_follows_from_the_axes(text: str, shape: tuple[int, ...]) -> None:
    assert Layout(text).shape(SIZES) == shape


def test_alternatives_belong_to_slots_in_order() -> None:
    layout = Layout("[(h e) | (g e) | (g e)] d")

    assert layout.terms == 3
    assert layout.axes(0) == ("h", "e", "d")
    assert layout.axes(1) == ("g", "e", "d")
    assert [layout.place(SIZES, term).dims[0][0] for term in range(3)] == [0, 48, 64]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("(h e d", "expected ')', found the end", id="open parenthesis"),
        pytest.param("h e) d", "unexpected ')'", id="stray parenthesis"),
        pytest.param("[h |] d", "an alternative in brackets is empty", id="empty alternative"),
        pytest.param("h-e d", "cannot read the layout at '-e d'", id="unknown character"),
        pytest.param("(h e) e", "axis e occurs twice", id="axis twice"),
        pytest.param("[h | g] [e | e]", "at most one pair of brackets", id="two sums"),
        pytest.param("(" * 20 + "h" + ")" * 20, "nested too deeply", id="bottomless"),
    ],
)
def test_a_malformed_layout_says_where(text: str, complaint: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout(text)
    assert complaint in str(caught.value)


def test_a_missing_size_is_named() -> None:
    with pytest.raises(LayoutError, match="needs the size of axis p"):
        Layout("(h two p) d").shape({"h": 6, "two": 2, "d": 12})


def test_llama_3_8b_wq_is_one_run_per_row() -> None:
    sizes = {"h": 32, "two": 2, "p": 64, "d": 4096}

    loops, runs = relabel(Layout("(h two p) d"), Layout("(h p two) d"), sizes)

    assert runs == 4096
    assert loops == ((32, 524288, 524288), (64, 4096, 8192), (2, 262144, 4096), (4096, 1, 1))


def test_layouts_of_other_axes_cannot_be_relabelled() -> None:
    with pytest.raises(LayoutError, match="same axes"):
        relabel(Layout("(h e) d"), Layout("(g e) d"), SIZES)
