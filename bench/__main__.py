"""``python -m bench``: the tables of ``docs/benchmarks.md``."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from bench import (
    comparing,
    loading,
    loop,
    pages,
    rank_files,
    ranks,
    remote,
    scale,
    sharing,
    start_up,
    two_ranks,
)
from bench.cases import CASES, PEERS, prepare
from bench.data import write_llama
from bench.measure import Result, beside_floor, table, workplace
from bench.writing import write_page


def main() -> int:
    """Measures, prints, and with ``--write`` keeps the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.5, help="size of the model, in GB")
    parser.add_argument("--pairs", type=int, default=7, help="runs of every case and of its floor")
    parser.add_argument(
        "--work", type=Path, default=Path("out"), help="directory on the disk to measure"
    )
    parser.add_argument("--only", default="", help="run only rows whose name contains this")
    parser.add_argument("--no-peers", action="store_true", help="leave out what others do")
    parser.add_argument("--no-loading", action="store_true", help="leave out live models")
    parser.add_argument("--no-remote", action="store_true", help="leave out servers")
    parser.add_argument(
        "--no-comparing", action="store_true", help="leave out fingerprint and diff"
    )
    parser.add_argument("--no-ranks", action="store_true", help="leave out two ranks beside one")
    parser.add_argument(
        "--no-scale", action="store_true", help="leave out the 671B shape and a thousand ranks"
    )
    parser.add_argument(
        "--write", action="store_true", help="write docs/benchmarks.md and its plot"
    )
    options = parser.parse_args()
    sections: dict[str, list[Result]] = {}
    notes: list[str] = []
    with workplace(options.work) as work:
        sections["ordinary disk"] = _disk(work, options)
        for kind in ("xfs", "btrfs"):
            found = loop.mounted(kind, work, gigabytes=options.gb * 4 + 2)
            if isinstance(found, str):
                _say(f"{kind}: skipped, {found}")
                notes.append(f"{kind}: skipped, {found}")
                continue
            with found as directory:
                sections[kind] = loop.rows(directory, gb=options.gb, only=options.only)
                _say(f"{kind}\n{table(sections[kind])}")
        loaded = [] if options.no_loading else loading.rows(work, gb=options.gb)
        fetched = [] if options.no_remote else remote.rows(work, gb=min(options.gb, 1.0))
        compared = [] if options.no_comparing else comparing.rows(work, gb=options.gb)
        texts = {} if options.no_loading else _ranks(work, options)
        shared = [] if options.no_ranks else _two_ranks(work, options)
        started = start_up.rows(work)
        growth = [] if options.no_scale else scale.rows(work)
        ranked = [] if options.no_scale else rank_files.rows(work)
    for title, results in sections.items():
        _say(f"\n{title}\n{table(results)}")
    if loaded:
        _say(f"\n2 ranks load\n{loading.table(loaded)}")
    if fetched:
        _say(f"\nfrom a server\n{remote.table(fetched)}")
    if compared:
        _say(f"\nfingerprint and diff\n{comparing.table(compared)}")
    for title, text in texts.items():
        _say(f"\n{title}\n{text}")
    if shared:
        _say(f"\n2 ranks convert\n{two_ranks.table(shared)}")
    for line in (*growth, *ranked):
        _say(str(line))
    _say(f"\nstart-up\n{start_up.table(started)}")
    if options.write:
        write_page(
            sections,
            loaded,
            compared,
            shared,
            growth,
            started,
            notes,
            gb=options.gb,
            pairs=options.pairs,
            texts=texts,
        )
    return 0


def _ranks(work: Path, options: argparse.Namespace) -> dict[str, str]:
    """Loading on several ranks beside the least that it can take, and on a thousand."""
    hf = write_llama(work / "sharing", gigabytes=options.gb / 2)
    found = sharing.measure(hf, runs=options.pairs, only="")
    shutil.rmtree(hf)
    scale_of_job = ranks.Scale()
    planned = ranks.simulate(scale_of_job, ranks.some_of(scale_of_job), work)
    return {
        "Ranks beside the least that loading can take": sharing.table(found),
        "A thousand ranks, simulated": ranks.table(planned),
        "Huge pages": pages.table(pages.run(work)),
    }


def _disk(work: Path, options: argparse.Namespace) -> list[Result]:
    hf = write_llama(work / "hf", gigabytes=options.gb)
    sources = prepare(hf, work)
    results = []
    for case in (*CASES, *(() if options.no_peers else PEERS)):
        if options.only not in case.name:
            continue
        result = beside_floor(
            case.name,
            case.run(sources[case.source]),
            source=sources[case.source],
            work=work,
            pairs=options.pairs if case.target is not None else max(1, options.pairs - 1),
            target=case.target,
        )
        _say(table([result]).splitlines()[-1])
        results.append(result)
    for path in sources.values():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return results


def _two_ranks(work: Path, options: argparse.Namespace) -> list[two_ranks.Ranks]:
    hf = write_llama(work / "for-ranks", gigabytes=options.gb)
    try:
        return two_ranks.rows(hf, work, pairs=options.pairs)
    finally:
        shutil.rmtree(hf)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
