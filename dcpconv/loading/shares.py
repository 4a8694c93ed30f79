"""What this rank reads by itself, and what it takes part in sending around."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dcpconv.core.numbers import size
from dcpconv.loading.regions import Need, Wish
from dcpconv.loading.replicas import (
    Group,
    Sharing,
    groups_of,
    in_lots,
    lots_of,
    sharing,
    storage_reads,
)
from dcpconv.loading.world import World
from dcpconv.plan.coverage import Target

MOST_READS = 2
"""Times that storage may have to deliver a checkpoint because every host reads its part, before
ranks send to each other instead: a network is rarely slower than the storage that all hosts share,
and within a host the page cache is faster than both."""


@dataclass(frozen=True, slots=True)
class Share:
    """Regions that some ranks hold all alike, and that they send to each other.

    Attributes:
        ranks: Who takes part, in order.
        readers: Those who read.
        wishes: The regions, in the order of the files; empty on a rank that does not hold them.
        is_told: Whether a rank takes part that does not hold them and must be told.
    """

    ranks: tuple[int, ...]
    readers: tuple[int, ...]
    wishes: tuple[Wish, ...]
    is_told: bool = False


@dataclass(frozen=True, slots=True)
class Shares:
    """Everything that this rank reads or is sent.

    Attributes:
        read: Which ranks read.
        own: What it reads for itself.
        sent: What it takes part in sending, in an order that is the same on all ranks.
        note: Why, where that was decided by numbers.
    """

    read: Sharing = "all"
    own: tuple[Need, ...] = ()
    sent: tuple[Share, ...] = ()
    note: str = ""


def share_out(
    needs: Sequence[Need],
    world: World,
    *,
    read: Sharing | None,
    hosts: Sequence[str],
    is_cached: bool,
    nbytes: Callable[[Wish], int],
    place: Callable[[Wish], tuple[str, int]],
) -> Shares:
    """Decides with all other ranks who reads what.

    Args:
        needs: What this rank holds.
        world: The ranks.
        read: Which ranks are to read; ``None`` decides by the bytes that storage has to deliver.
        hosts: Of every rank.
        is_cached: Whether a host that has read a byte reads it again for nothing.
        nbytes: Bytes of a wish.
        place: File and byte of a wish's tensor, to read forwards.

    Raises:
        LostRankError: A rank does not answer.
    """
    if read is None and len(set(hosts)) == 1:
        read = "all" if is_cached else "host"
    if read == "all" or world.size == 1:
        return Shares("all", tuple(needs))
    mine = in_lots(dict.fromkeys(need.wish for need in needs))
    groups = groups_of(world.gather(lots_of(mine, nbytes)))
    note = ""
    if read is None:
        read, note = chosen(groups, hosts, is_cached=is_cached)
    sent: list[Share] = []
    taken: set[str] = set()
    for group, ranks, readers in sharing(groups, hosts, read):
        if world.rank not in ranks:
            continue
        holds = world.rank in group.ranks
        found = [wish for name in group.lots for wish in mine.get(name, ())] if holds else []
        found.sort(key=lambda one: (place(one), one.offsets, one.start))
        sent.append(Share(ranks, readers, tuple(found), is_told=not {*ranks} <= {*group.ranks}))
        taken.update(wish.key for wish in found)
    own = tuple(need for need in needs if need.wish.key not in taken)
    return Shares(read, own, tuple(sent), note)


def chosen(
    groups: Sequence[Group], hosts: Sequence[str], *, is_cached: bool
) -> tuple[Sharing, str]:
    """Whether ranks on several hosts read each their own, or send to each other; and why."""
    once, per_host = storage_reads(groups, hosts)
    how: Sharing = "all" if is_cached else "host"
    what = "every rank reads its shards" if is_cached else "ranks of a host send to each other"
    if per_host > MOST_READS * once:
        how, what = "once", "ranks send to each other"
    times = f"{per_host / once:.2f} x" if once else "none of"
    return how, (
        f"read={how!r}: {what}; one read per host would be {times} the {size(once)} that are"
        f" wanted, on {len(set(hosts))} hosts"
    )


def place_in(targets: Mapping[str, Target]) -> Callable[[Wish], tuple[str, int]]:
    """Where the tensors of wishes begin, by file and byte."""

    def place(wish: Wish) -> tuple[str, int]:
        pieces = targets[wish.key].pieces
        if not pieces or not pieces[0].entry.chunks:
            return "", 0
        extent = pieces[0].entry.chunks[0].extent
        return extent.file, extent.offset

    return place
