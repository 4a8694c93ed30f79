"""``--html``: one file without a network, small for any model, and alive in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bench.data import deepseek_shapes
from dcpconv import convert
from dcpconv.cli.app import app
from dcpconv.cli.pictures.pages import catalog_page, coverage_page, diff_page
from dcpconv.comparing.records import Diff
from dcpconv.core.catalog import Catalog, Chunk, Extent, TensorEntry
from dcpconv.core.dtypes import BY_LABEL
from dcpconv.plan.coverage import Coverage, Fault, as_stored
from dcpconv.plan.differences import Apart, Held, TensorDiff
from dcpconv.sources.opening import End
from support.models.hf_models import save_hf, tiny


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of a model, of one that differs from it, and of its shards."""
    place = tmp_path_factory.mktemp("pages")
    a = save_hf(tiny("qwen3_moe"), place / "a")
    b = place / "b"
    shutil.copytree(a, b)
    tensors = load_file(b / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] += 0.5
    tensors["model.layers.2.mlp.experts.4.up_proj.weight"] *= 1.5
    del tensors["model.layers.0.self_attn.k_norm.weight"]
    tensors["model.norm.weight"] = torch.ones(97)
    save_file(tensors, b / "model.safetensors", {"format": "pt"})
    convert(a, place / "dcp", form="dcp", to="hf", chunks=3)
    run("diff", a, b, "--html", place / "diff.html", code=1)
    run("check", b, "--html", place / "check.html", code=1)
    sketch = ("--sketch", "model.embed_tokens.weight")
    run("inspect", place / "dcp", "-q", "--html", place / "inspect.html", *sketch, code=0)
    return place


def run(*words: object, code: int) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.stdout


def sections(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return {section["title"].split(":")[0]: section for section in json.loads(found[1])}


@pytest.mark.parametrize("name", ["diff", "check", "inspect"])
def test_a_page_needs_nothing_but_itself(pages: Path, name: str) -> None:
    text = (pages / f"{name}.html").read_text()
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(?:link|script|img|iframe)[^>]+(?:src|href)=\"(?!data:,)", text)
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(", text)


def test_the_heat_map_has_every_tensor_in_its_cell(pages: Path) -> None:
    heat = sections((pages / "diff.html").read_text())["What changed, by layer and slot"]
    column = {name: at for at, name in enumerate(heat["columns"])}
    rows = dict(heat["rows"])
    assert list(rows) == ["0", "1", "2"]
    assert rows["0"][column["o"]][0] == "="
    assert rows["1"][column["o"]][0] in "123"
    assert rows["0"][column["k_norm"]][0] == "a"
    glyph, name, text, strip, template = rows["2"][column["expert.up"]]
    assert (glyph, name, strip) == ("1", "layer.2.expert.4.up", "====1")
    assert template == "layer.2.expert.#.up"
    assert "relative 0.5" in text
    assert {head: cell[0] for head, cell in heat["outside"]}["final_norm"] == "!"


def test_the_shard_map_has_every_box_with_its_rank(pages: Path) -> None:
    found = sections((pages / "inspect.html").read_text())
    shards = found["Shards"]
    by_name = {name.split("  ")[0]: boxes for name, _, _, boxes in shards["tensors"]}
    boxes = by_name["model.embed_tokens.weight"]
    assert [shards["files"][box[4]][2] for box in boxes] == ["rank 0", "rank 1", "rank 2"]
    assert "[0:44, 0:96]" in boxes[0][5]
    assert sum(box[2] * box[3] for box in boxes) == pytest.approx(200 * 200 * 96 / 131, rel=0.01)
    assert found["Files"]["rows"][0][:2] == ["__0_0.distcp", "rank 0"]


def test_areas_are_bytes(pages: Path) -> None:
    shapes = sections((pages / "inspect.html").read_text())["Bytes by name"]["shapes"]
    sizes = {shape[5]: shape[2] * shape[3] for shape in shapes}
    tensors = load_file(pages / "a" / "model.safetensors")
    total = sum(tensor.numel() for tensor in tensors.values())
    share = sizes["model.embed_tokens.weight"] / (960 * 420)
    assert share == pytest.approx(tensors["model.embed_tokens.weight"].numel() / total, rel=0.02)
    assert sum(sizes.values()) == pytest.approx(960 * 420, rel=0.01)


def test_a_sketch_counts_every_element(pages: Path) -> None:
    bars = sections((pages / "inspect.html").read_text())["Values of model.embed_tokens.weight"]
    tensor = load_file(pages / "a" / "model.safetensors")["model.embed_tokens.weight"].double()
    low, high = float(tensor.min()), float(tensor.max())
    expected = torch.histc(tensor, bins=len(bars["counts"]), min=low, max=high)
    assert sum(bars["counts"]) == tensor.numel()
    assert sum(abs(a - int(b)) for a, b in zip(bars["counts"], expected, strict=True)) <= 4
    assert f"mean {float(tensor.mean()):.4g}" in bars["summary"]
    assert f"standard deviation {float(tensor.std(correction=0)):.4g}" in bars["summary"]


def test_no_name_can_leave_its_place() -> None:
    name = 'x</script><script>alert(1)</script>"\u202e\x1b[31m'
    entry = TensorEntry(name, BY_LABEL["fp32"], (2,), ())
    catalog = Catalog("torch", Path(name), Path(name), {name: 8}, {name: entry})
    fault = Fault(name, name)
    coverage = Coverage(name, name, (as_stored(name, entry),), missing=(fault,), notes=(name,))
    held = Held((name,), "fp32", (2,))
    tensor = TensorDiff(name, "only_a", held, None, None, name)
    diff = Diff(End(name, "hf", 1), End(name, "hf", 1), (name, name), (tensor,), notes=(name,))
    for page in (catalog_page(catalog, [name], []), coverage_page(coverage), diff_page(diff)):
        assert "alert(1)</script>" not in page.replace("&lt;", "<x")
        assert not {"\u202e", "\x1b"} & set(page)
        assert page.count("<script") == 2
        assert sections(page)


def many() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from deepseek_shapes()


def test_91000_tensors_make_less_than_a_megabyte() -> None:
    bf16 = BY_LABEL["bf16"]
    entries, targets, tensors = {}, [], []
    for number, (key, shape) in enumerate(many()):
        file = f"__{number % 64}_0.distcp"
        half = (shape[0] // 2, *shape[1:])
        chunks = tuple(
            Chunk(
                (at * half[0], *(0,) * (len(shape) - 1)), half, Extent(file, number << 20, 1 << 20)
            )
            for at in (0, 1)
        )
        entry = TensorEntry(key, bf16, shape, chunks)
        entries[key] = entry
        targets.append(as_stored(key, entry))
        held = Held((key,), "bf16", shape)
        change = 10.0 ** -(number % 9)
        apart = Apart(9, change, (1,), change, change, 1.0, 1.0, (1.0, 1.0, change**2))
        layer = int(key.split(".")[2]) if key.startswith("model.layers") else None
        tensors.append(TensorDiff(key, "differs", held, held, apart, "", layer))
    assert len(entries) > 90_000
    files = {f"__{number}_0.distcp": 1 << 40 for number in range(64)}
    catalog = Catalog("dcp", Path("x"), Path("x"), files, entries)
    diff = Diff(End("a", "hf", 9), End("b", "hf", 9), ("", ""), tuple(tensors))
    coverage = Coverage("as stored", "as stored", tuple(targets))
    for page in (catalog_page(catalog, [], []), diff_page(diff), coverage_page(coverage)):
        assert 10_000 < len(page.encode()) < 1_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser that is installed here, without a window."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
    if found is None:
        pytest.skip("no chromium is installed")
    with driver.sync_playwright() as started:
        # Root may not have a sandbox; the page is ours and has no network.
        launched = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["diff", "check", "inspect"])
def test_a_browser_opens_it_and_a_click_selects(
    pages: Path, browser: Any, name: str, scheme: str
) -> None:
    page = browser.new_page(color_scheme=scheme)
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((pages / f"{name}.html").as_uri())

    button = page.get_by_role("button", name=re.compile("layer.1.o:|layers.1.self_attn.o|embed"))
    button.first.click()

    assert button.first.get_attribute("aria-pressed") == "true"
    told = page.locator(".detail", has_text=re.compile(r"self_attn\.o_proj|embed_tokens"))
    assert told.count() >= 1
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is (scheme == "light")
    wide = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert wide
    assert not complaints
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert len(page.screenshot()) > 10_000
    page.close()


def test_keys_move_through_the_cells_and_a_link_leads_to_one(pages: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto((pages / "diff.html").as_uri() + "#layer.1.q")
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(focused) == "layer.1.q: equal"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == "layer.1.k: equal"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == "layer.2.k: equal"
    assert page.url.endswith("#layer.2.k")
    assert page.locator("[aria-pressed=true]").count() == 1
    assert page.locator(".cell[type=button][tabindex='0']").count() == 1
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button')].filter(b => !b.getAttribute('aria-label')).length"
    )
    assert unnamed == 0
    page.close()


def test_what_was_selected_is_told_in_view_of_a_long_grid(pages: Path, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 900, "height": 420})
    page.goto((pages / "diff.html").as_uri())
    page.get_by_role("button", name="layer.0.q: equal").click()
    told = page.locator(".detail", has_text="layer.0.q")
    box = told.bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= 420
    page.close()


def test_it_prints_on_white(pages: Path, browser: Any) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto((pages / "diff.html").as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    assert page.pdf().startswith(b"%PDF")
    page.close()
