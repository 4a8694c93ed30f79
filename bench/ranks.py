"""What loading costs on a thousand ranks: the real planning of some of them, on fake meshes.

    python -m bench.ranks --ranks 1024 --tensors 91000

A checkpoint of holes is written, with real headers.  Rank 0 opens it; then some ranks plan, one
after the other, each in a process of its own, with the code of ``load_init_weights`` and a model
whose parameters are DTensors of torch's fake process group: HSDP, ``--replicas`` copies of shards.
What a rank says and hears is counted.  Other ranks answer as the placements make them: those with
the same shard say the same.  Bytes and messages are exact, seconds and memory are measured, and the
time to move the weights is computed for a storage and a network of given speeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.data import deepseek_shapes, write_sparse
from bench.measure import status, workplace
from bench.ranks_picture import picture

FILES_OF_671B = 163
SECONDS_TARGET = 10.0
MEMORY_TARGET = 200
"""MiB that planning may add to a rank."""


@dataclass(frozen=True)
class Scale:
    """The job that is simulated.

    Attributes:
        ranks: How many.
        per_host: Ranks on a host.
        replicas: Copies of the model.
        tensors: Of the checkpoint.
        storage: GB/s that shared storage delivers to all hosts together.
        network: GB/s into and out of a host.
        latency: Seconds to open a file.
    """

    ranks: int = 1024
    per_host: int = 8
    replicas: int = 16
    tensors: int = 91_000
    storage: float = 50.0
    network: float = 40.0
    latency: float = 0.002

    @property
    def shards(self) -> int:
        """Ranks that hold one copy together."""
        return self.ranks // self.replicas

    def host(self, rank: int) -> str:
        """Name of a rank's host."""
        return f"host-{rank // self.per_host}"


@dataclass(frozen=True, slots=True)
class Planned:
    """What planning cost one rank, and what it would move then.

    Attributes:
        rank: Which.
        seconds: Until it knows what to read and send, of CPU: other ranks are other machines' work.
        peak: MiB above what it had with the model built.
        opens: Files of the checkpoint that it opened.
        messages: Meetings with other ranks, by kind.
        said: Bytes that it sent while planning.
        heard: Bytes that it was sent while planning.
        catalog: Bytes of the packed checkpoint.
        tensors: That it loads.
        own: Bytes that it reads and nobody else holds.
        shared: Bytes that it holds and others hold too.
        reads: Bytes of those that it reads for all.
        members: Ranks that it shares with.
        tiles: That reach it.
        links: Largest number of bytes between two hosts on behalf of its group, and in all.
    """

    rank: int
    seconds: float
    peak: float
    opens: int
    messages: dict[str, int]
    said: int
    heard: int
    catalog: int
    tensors: int
    own: int
    shared: int
    reads: int
    members: int
    tiles: int
    links: tuple[int, int]


def some_of(scale: Scale) -> tuple[int, ...]:
    """Ranks to plan for beside rank 0: its neighbour, one in the middle, the last."""
    return 1, scale.ranks // 2, scale.ranks - 1


def moving_seconds(scale: Scale, planned: Sequence[Planned]) -> dict[str, float]:
    """Seconds of every step on the critical path, for the speeds of ``scale``.

    Reading and sending overlap, so moving takes as long as the slower of the two.
    """
    first = planned[0]
    worst = max(planned, key=lambda one: one.seconds)
    hops = max(1, (scale.ranks - 1).bit_length())
    read = (first.own + first.reads) * scale.ranks / (scale.storage * 1e9)
    into_a_host = first.shared * (first.members - 1) / first.members * scale.per_host
    return {
        "open": first.opens * scale.latency,
        "tell": first.catalog * hops / (scale.network * 1e9),
        "plan": worst.seconds,
        "read": read,
        "send": into_a_host / (scale.network * 1e9),
    }


def simulate(scale: Scale, ranks: Sequence[int], work: Path) -> dict[str, Any]:
    """Plan on some ranks, rank 0 first.

    Args:
        scale: The job.
        ranks: Which plan.
        work: Directory for the checkpoint.
    """
    source = work / "sparse"
    shapes = dict(islice(deepseek_shapes(layers=4 + scale.tensors // 1480), scale.tensors))
    files = max(1, round(FILES_OF_671B * len(shapes) / 91_000))
    nbytes = write_sparse(source, shapes, files=files)
    planned = [_in_a_process(scale, rank, source, work) for rank in dict.fromkeys([0, *ranks])]
    hosts = -(-scale.ranks // scale.per_host)
    path = moving_seconds(scale, planned)
    return {
        "scale": asdict(scale),
        "checkpoint": {"tensors": len(shapes), "files": files, "bytes": nbytes},
        "ranks": [asdict(one) for one in planned],
        "job": {
            "opens": planned[0].opens,
            "opens_allowed": files + hosts,
            "read": sum(one.own + one.reads for one in planned[:1]) * scale.ranks,
        },
        "critical_path": path,
        "met": {
            "seconds": max(one.seconds for one in planned) < SECONDS_TARGET,
            "memory": max(one.peak for one in planned) < MEMORY_TARGET,
            "opens": sum(one.opens for one in planned) <= files + hosts,
        },
    }


def _in_a_process(scale: Scale, rank: int, source: Path, work: Path) -> Planned:
    command = [sys.executable, "-W", "ignore", "-m", "bench.ranks", "--plan", str(rank)]
    options = [("--source", source), ("--work", work), ("--scale", json.dumps(asdict(scale)))]
    done = subprocess.run(  # noqa: S603  our own interpreter
        [*command, *(str(part) for option in options for part in option)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return Planned(**{**found, "links": tuple(found["links"])})


# -- what one rank does ----------------------------------------------------------------------


def _plan(scale: Scale, rank: int, source: Path, work: Path) -> Planned:
    from bench.ranks_model import Simulated, hsdp_model  # noqa: PLC0415 - torch, for ranks alone
    from dcpconv.loading import catalogs  # noqa: PLC0415
    from dcpconv.loading.agreement import agree  # noqa: PLC0415
    from dcpconv.loading.hooks import own_state_dict  # noqa: PLC0415
    from dcpconv.loading.replicas import TILE, in_turns, tiles_of  # noqa: PLC0415
    from dcpconv.loading.supply import Options  # noqa: PLC0415
    from dcpconv.loading.terms import LoadRequest  # noqa: PLC0415

    shapes = dict(islice(deepseek_shapes(layers=4 + scale.tensors // 1480), scale.tensors))
    model = hsdp_model(shapes, rank=rank, replicas=scale.replicas, shards=scale.shards)
    world = Simulated.of_rank(rank, scale, work / "rank0.pickle")
    patch.object(catalogs, "hostname", lambda: scale.host(rank)).start()
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    request = LoadRequest(
        source=source,
        options=Options(),
        strict=True,
        keeps_dtype=True,
        ignore=(),
        initialises=False,
        read="once",
        device=None,
    )
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    before, started = status("VmRSS"), time.process_time()
    world.distinct(own_state_dict(model))
    agreement = agree(model, request, world)
    tiles = [
        (share, tuple(tiles_of(share.wishes, agreement.itemsize, nbytes=TILE)))
        for share in agreement.shares.sent
    ]
    seconds, peak = time.process_time() - started, status("VmHWM") - before
    links: Counter[tuple[str, str]] = Counter()
    reads = 0
    for share, some in tiles:
        for number, reader in in_turns(len(some), share.readers):
            reads += some[number].nbytes if reader == rank else 0
            root = share.ranks.index(reader)
            for child in range(1, len(share.ranks)):
                # A binomial tree: the parent of a rank lacks its lowest bit.
                pair = (child & (child - 1), child)
                ends = [scale.host(share.ranks[(root + n) % len(share.ranks)]) for n in pair]
                if ends[0] != ends[1]:
                    links[ends[0], ends[1]] += some[number].nbytes
    world.close()
    weights = [path for path in opened if path.startswith(str(source)) and "safetensors" in path]
    return Planned(
        rank=rank,
        seconds=seconds,
        peak=peak,
        opens=sum(not path.endswith(".json") for path in weights),
        messages=dict(world.messages),
        said=world.said,
        heard=world.heard,
        catalog=world.catalog,
        tensors=len(agreement.account.chosen),
        own=sum(agreement.nbytes(need.wish) for need in agreement.shares.own),
        shared=sum(agreement.nbytes(wish) for share, _ in tiles for wish in share.wishes),
        reads=reads,
        members=max((len(share.ranks) for share, _ in tiles), default=1),
        tiles=sum(len(some) for _, some in tiles),
        links=(max(links.values(), default=0), sum(links.values())),
    )


def table(found: dict[str, Any]) -> str:
    """Aligned rows for people."""
    lines = [
        f"{'rank':>6} {'s':>6} {'MiB':>5} {'opens':>5} {'said':>9} {'heard':>9} {'messages':>8}"
    ]
    for one in found["ranks"]:
        messages = sum(one["messages"].values())
        lines.append(
            f"{one['rank']:>6} {one['seconds']:>6.2f} {one['peak']:>5.0f} {one['opens']:>5}"
            f" {one['said']:>9,} {one['heard']:>9,} {messages:>8}"
        )
    path = found["critical_path"]
    lines.append("critical path  " + "  ".join(f"{k} {v:.2f} s" for k, v in path.items()))
    lines.append("met            " + "  ".join(f"{k} {v}" for k, v in found["met"].items()))
    return "\n".join(lines)


def main() -> int:
    """Simulate and print, or be one rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--ranks", type=int, default=Scale.ranks)
    parser.add_argument("--tensors", type=int, default=Scale.tensors)
    parser.add_argument("--per-host", type=int, default=Scale.per_host)
    parser.add_argument("--replicas", type=int, default=Scale.replicas, help="copies of the model")
    parser.add_argument(
        "--storage", type=float, default=Scale.storage, help="GB/s for all hosts together"
    )
    parser.add_argument("--network", type=float, default=Scale.network, help="GB/s into a host")
    parser.add_argument(
        "--latency", type=float, default=Scale.latency, help="seconds to open a file"
    )
    parser.add_argument("--work", type=Path, default=Path("out"), help="directory to write to")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--picture", type=Path, help="file for a picture of them, SVG")
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scale", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan is not None:
        scale = Scale(**json.loads(options.scale))
        planned = _plan(scale, options.plan, options.source, options.work)
        sys.stdout.write(json.dumps(asdict(planned)) + "\n")
        return 0
    scale = Scale(
        ranks=options.ranks,
        per_host=options.per_host,
        replicas=options.replicas,
        tensors=options.tensors,
        storage=options.storage,
        network=options.network,
        latency=options.latency,
    )
    with workplace(options.work) as work:
        found = simulate(scale, some_of(scale), work)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.picture:
        options.picture.write_text(picture(found))
    sys.stdout.write(table(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
