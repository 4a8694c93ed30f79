"""``dcpconv inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcpconv.cli.answers import answers_of, note, say, say_json
from dcpconv.cli.options import Assets, From, Html, KeymapFile, Spec
from dcpconv.cli.words import count, size

if TYPE_CHECKING:
    from dcpconv.core.catalog import Catalog, TensorEntry
    from dcpconv.core.spec import ModelSpec
    from dcpconv.sources.recognition import Weights


@answers_of("source", "assets")
def inspect(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint of any form, or a hub id.")
    ],
    only: Annotated[
        str | None,
        typer.Option(help="List only keys under this one, or that match.", metavar="KEY"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    from_: From = None,
    keymap: KeymapFile = None,
    assets: Assets = None,
    spec: Spec = None,
    html: Html = None,
    sketch: Annotated[
        list[str] | None,
        typer.Option(
            help="With --html: read this tensor and draw how its values are distributed. "
            " Repeatable.",
            metavar="KEY",
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="The summary without the list of keys.")
    ] = False,
) -> None:
    """Show what a checkpoint holds: keys, shapes, types, chunks, and the naming it is in.

    Reads headers only, but for --sketch; nothing in the files is executed.
    """
    from dcpconv.sources.said import Said
    from dcpconv.sources.understanding import understand

    said = Said.parse(from_=from_, keymap=keymap, assets=assets, spec=spec or ())
    found = understand(source, said, only=only)
    if html is not None:
        _draw(found.catalog, list(summary(found.catalog, found.weights, found.spec)), html, sketch)
    if as_json:
        say_json(_as_json(found.catalog, found.weights, found.spec))
        return
    for line in summary(found.catalog, found.weights, found.spec):
        say(line)
    if not quiet:
        say("")
        for line in listing(found.catalog):
            say(line)
    for text in dict.fromkeys(found.notes):
        note(text)


def _draw(catalog: Catalog, told: list[str], html: str, keys: list[str] | None) -> None:
    from dcpconv.cli.pictures.page import write
    from dcpconv.cli.pictures.pages import catalog_page

    sketches = []
    if keys:
        from dcpconv.plan.sketches import sketch_of

        sketches = [(key, sketch_of(catalog, key)) for key in keys]
    write(html, catalog_page(catalog, told, sketches))


def summary(catalog: Catalog, weights: Weights, model: ModelSpec | None) -> Iterator[str]:
    """What it is, in a few aligned lines."""
    dtypes: Counter[str] = Counter()
    for entry in catalog.tensors.values():
        dtypes[entry.dtype.label] += entry.numel
    chunks = sum(len(entry.chunks) for entry in catalog.tensors.values())
    yield f"path      {catalog.source}"
    yield f"form      {catalog.form}, {count(len(catalog.files), 'file')}"
    family = weights.keymap.name if weights.keymap else "as stored"
    yield f"family    {family}  ({'; '.join(weights.evidence)})"
    if weights.alternatives:
        yield f"or        {', '.join(table.name for table in weights.alternatives)}"
    if model is not None:
        yield f"model     {model}"
    yield (
        f"tensors   {count(len(catalog.tensors), 'key')}, {size(catalog.nbytes)},"
        f" {count(chunks, 'chunk')}, {sum(dtypes.values()):,} elements"
    )
    for label, numel in dtypes.most_common():
        yield f"dtype     {label:<8} {numel:>18,} elements"
    if catalog.objects:
        yield f"objects   {count(len(catalog.objects), 'key')} that are not tensors"
    if weights.rest:
        yield f"beside    {count(len(weights.rest), 'key')} that are not weights"


def listing(catalog: Catalog) -> Iterator[str]:
    """One key per line: type, shape, size, chunks."""
    rows = [
        (
            key,
            entry.dtype.label,
            str(list(entry.shape)),
            size(entry.nbytes),
            _chunks(catalog, entry),
        )
        for key, entry in catalog.tensors.items()
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    for key, dtype, shape, nbytes, chunks in rows:
        yield (
            f"{key:<{widths[0]}}  {dtype:<{widths[1]}}  {shape:<{widths[2]}}"
            f"  {nbytes:>{widths[3]}}  {chunks}".rstrip()
        )
    for key, value in catalog.objects.items():
        text = repr(value)
        yield f"{key:<{widths[0]}}  object  {text if len(text) <= 60 else text[:57] + '...'}"


def _chunks(catalog: Catalog, entry: TensorEntry) -> str:
    words = []
    if len(entry.chunks) > 1:
        words.append(f"{len(entry.chunks)} chunks")
    if entry.key in catalog.tied:
        words.append(f"= {catalog.tied[entry.key]}")
    return ", ".join(words)


def _as_json(catalog: Catalog, weights: Weights, model: ModelSpec | None) -> dict[str, Any]:
    return {
        "path": str(catalog.source),
        "form": catalog.form,
        "family": weights.keymap.name if weights.keymap else None,
        "alternatives": [table.name for table in weights.alternatives],
        "evidence": list(weights.evidence),
        "root": weights.root,
        "model": model.model_dump(mode="json") if model is not None else None,
        "files": dict(catalog.files),
        "nbytes": catalog.nbytes,
        "tensors": {
            key: {
                "dtype": entry.dtype.name,
                "shape": list(entry.shape),
                "nbytes": entry.nbytes,
                "tied_to": catalog.tied.get(key),
                "chunks": [
                    {
                        "offsets": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        "file": chunk.extent.file,
                        "offset": chunk.extent.offset,
                        "nbytes": chunk.extent.nbytes,
                    }
                    for chunk in entry.chunks
                ],
            }
            for key, entry in catalog.tensors.items()
        },
        "objects": {key: repr(value) for key, value in catalog.objects.items()},
    }
