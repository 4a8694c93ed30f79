"""What loading weights into a live model did, on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from dcpconv.core.numbers import size
from dcpconv.engine.execute import LossyCast


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What ``load_init_weights`` did.  Counts of bytes and of lossy values are this rank's own.

    Attributes:
        source: The checkpoint.
        form: How its bytes are stored.
        family: Its naming, or ``as stored``.
        target: The model's naming, or ``as stored``.
        loaded: FQNs that were loaded, tied ones once.
        nbytes: Bytes of this rank's shards, as the source stores them; as fp32 where they are
            multiplied out of scaled blocks.
        nbytes_read: Bytes that this rank read from files, without the factors of scaled blocks.
        nbytes_received: Bytes that other ranks read and sent.
        missing: ``(FQN, reason)`` of what the source could not supply.
        unexpected: ``(stored key, reason)`` of what no rank's model has a place for.
        ignored: ``(name, reason)`` of what was passed over on purpose.
        tied: FQNs that are one tensor in the model.
        casts: ``(source dtype, model dtype, tensors)`` of every cast; the first is
            ``f8e4m3 in scaled blocks`` for those that were multiplied out.
        lossy: Tensors that a cast changed by more than rounding.
        computed_buffers: Non-persistent buffers that their module computed again.
        uninitialised_buffers: Non-persistent buffers that nothing has initialised.
        initialised: FQNs that ``init_missing`` was asked to fill.
        on_meta: FQNs of parameters that still have no memory, because they were ignored.
        engine: ``direct``, or ``torch`` where the state dict was loaded and set.
        read: Which ranks read: ``all``, ``host``, ``once`` or ``rank0``.
        notes: What else a user should know.
        seconds: Wall time.
    """

    source: str
    form: str
    family: str
    target: str
    loaded: tuple[str, ...]
    nbytes: int
    nbytes_read: int
    nbytes_received: int
    missing: tuple[tuple[str, str], ...]
    unexpected: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, str], ...]
    tied: tuple[tuple[str, ...], ...]
    casts: tuple[tuple[str, str, int], ...]
    lossy: tuple[LossyCast, ...]
    computed_buffers: tuple[str, ...]
    uninitialised_buffers: tuple[str, ...]
    initialised: tuple[str, ...]
    on_meta: tuple[str, ...]
    engine: str
    read: str
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        rows: list[tuple[str, str]] = [
            ("source", f"{self.source}  {self.form}  {self.family}"),
            ("model", f"{len(self.loaded)} tensors loaded  {self.target}"),
            ("bytes", f"{size(self.nbytes)} in {self.seconds:.2f} s on this rank"),
        ]
        if self.nbytes_received:
            rows.append(("received", f"{size(self.nbytes_received)} from other ranks"))
        rows.extend(("cast", f"{count} tensors {old} -> {new}") for old, new, count in self.casts)
        rows.extend(
            ("lossy", f"{one.key}  {one.overflowed} overflowed, {one.underflowed} became zero")
            for one in self.lossy
        )
        rows.extend(("tied", " = ".join(names)) for names in self.tied)
        for label, faults in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("ignored", self.ignored),
        ):
            rows.extend((label, f"{key}  {why}".rstrip()) for key, why in faults)
        for label, names in (
            ("computed", self.computed_buffers),
            ("garbage", self.uninitialised_buffers),
            ("new", self.initialised),
            ("on meta", self.on_meta),
            ("note", self.notes),
        ):
            rows.extend((label, name) for name in names)
        return "\n".join(f"{label:<10} {text}" for label, text in rows)
