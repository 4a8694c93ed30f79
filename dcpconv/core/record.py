"""Records whose fields are checked: what a parameter file says becomes values of the stated kinds.

A record is declared like a dataclass, and read from what ``json.load`` gives::

    class Size(Record, extra="ignore"):
        rows: Annotated[int, field(ge=1)]
        columns: int | None = field(default=None, names=("cols", "columns"))

Every field is checked and every problem is listed at once.  Nothing is converted, except that an
integer may stand for a float.  (The names of the methods are pydantic's.  Importing pydantic and
building its validators takes longer than a small conversion, so that it reads only tables that
users write.)
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Union, get_type_hints

if TYPE_CHECKING:
    from typing import TypeAlias

    from typing_extensions import Self, dataclass_transform

    Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
else:

    class Json:
        """Whatever a JSON file may hold."""

    def dataclass_transform(**_: object) -> Callable[[type], type]:
        """Only type checkers look at it."""
        return lambda cls: cls


_UNSET: Any = object()


class _Field(NamedTuple):
    default: Any
    factory: Callable[[], Any] | None
    ge: float | None
    le: float | None
    gt: float | None
    names: tuple[str, ...]


def field(
    *,
    default: Any = _UNSET,
    default_factory: Callable[[], Any] | None = None,
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    names: tuple[str, ...] = (),
) -> Any:
    """What else holds of a value, and where to read it.

    Args:
        default: Where nothing is said; a field without one must be said.
        default_factory: Makes the default.
        ge: Least value.
        le: Greatest value.
        gt: What the value exceeds; it is then finite.
        names: Names in a file, of which the first that is there counts; by default the field's own.
    """
    return _Field(default, default_factory, ge, le, gt, names)


class Problem(NamedTuple):
    """One value that does not fit.

    Attributes:
        loc: Where it stands: names of fields and keys, as they were read.
        msg: ``Input should be a valid integer``.
        input: The value; the whole record where one is missing.
        is_missing: Whether nothing was said.
    """

    loc: tuple[str | int, ...]
    msg: str
    input: object
    is_missing: bool = False


class ValidationError(ValueError):
    """Fields that do not fit, every one of them."""

    def __init__(self, record: str, problems: list[Problem]) -> None:
        self.problems = problems
        lines = (f"{'.'.join(map(str, item.loc)) or record}: {item.msg}" for item in problems)
        super().__init__("; ".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ("", self.problems)


_Check = Callable[[object, tuple[str | int, ...], list[Problem]], Any]
"""Gives the value to keep; adds what is wrong with it to the list."""


class _Slot(NamedTuple):
    """How one field is filled."""

    names: tuple[str, ...]
    check: _Check
    default: Callable[[], Any] | None


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
class Record:
    """Immutable values of declared kinds; two with the same values are equal."""

    model_fields: ClassVar[Mapping[str, Any]] = {}
    model_extra: Mapping[str, Any] | None
    _extra: ClassVar[str] = "forbid"
    _slots: ClassVar[Mapping[str, _Slot] | None] = None

    def __init_subclass__(cls, *, extra: str | None = None) -> None:
        super().__init_subclass__()
        cls._extra = extra or cls._extra
        cls._slots = None
        own = {
            name: text
            for name, text in get_annotations(cls).items()
            if not name.startswith("_") and not str(text).startswith("ClassVar")
        }
        cls.model_fields = {**cls.model_fields, **own}

    def __init__(self, **values: Any) -> None:
        self._fill(values, by_name=True)

    @classmethod
    def model_validate(cls, fields: object) -> Self:
        """The record that a mapping describes, under the names that files use.

        Raises:
            ValidationError: Lists every field that does not fit.
        """
        if isinstance(fields, cls):
            return fields
        if not isinstance(fields, Mapping):
            what = f"Input should be a valid dictionary or instance of {cls.__name__}"
            raise ValidationError(cls.__name__, [Problem((), what, fields)])
        made = cls.__new__(cls)
        Record._fill(made, fields, by_name=False)
        return made

    def _fill(self, values: Mapping[str, Any], *, by_name: bool) -> None:
        cls = type(self)
        problems: list[Problem] = []
        found: dict[str, Any] = {}
        used: set[str] = set()
        for name, slot in slots_of(cls).items():
            names = (name,) if by_name else slot.names
            said = next((at for at in names if at in values), None)
            if said is not None:
                used.add(said)
                found[name] = slot.check(values[said], (said,), problems)
            elif slot.default is None:
                problems.append(Problem((names[0],), "Field required", values, is_missing=True))
            else:
                found[name] = slot.default()
        rest = {key: value for key, value in values.items() if key not in used}
        if cls._extra == "forbid":
            problems.extend(
                Problem((key,), "Extra inputs are not permitted", value)
                for key, value in rest.items()
            )
        self.__dict__.update(found)
        self.__dict__["model_extra"] = rest if cls._extra == "allow" else None
        if not problems:
            try:
                self.agree()
            except ValueError as error:
                problems.append(Problem((), str(error), values))
        if problems:
            raise ValidationError(cls.__name__, problems)

    def agree(self) -> None:
        """Raises ``ValueError`` where fields contradict each other."""

    def __setattr__(self, name: str, value: object) -> None:
        raise ValidationError(type(self).__name__, [Problem((name,), "is immutable", value)])

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self._values().items()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self._values().values()))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self)
        return f"{type(self).__name__}({values})"

    def _values(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "model_extra"}

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """The same with some fields replaced; the new values are not checked."""
        made = type(self).__new__(type(self))
        made.__dict__.update({**self.__dict__, **update})
        return made

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]:
        """As plain mappings; with ``mode="json"`` tuples are lists."""
        return {name: _plain(value, mode) for name, value in self}


def _plain(value: Any, mode: str) -> Any:
    if isinstance(value, Record):
        return value.model_dump(mode=mode)
    if isinstance(value, Mapping):
        return {key: _plain(item, mode) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, mode) for item in value]
        return items if mode == "json" or isinstance(value, list) else tuple(items)
    return value


def slots_of(cls: type[Record]) -> Mapping[str, _Slot]:
    """How the fields of a record are filled, found out when the first one is made."""
    if cls._slots is None:
        hints = get_type_hints(cls, include_extras=True)
        cls._slots = {
            name: _slot(name, hints[name], getattr(cls, name, _UNSET)) for name in cls.model_fields
        }
    return cls._slots


def _slot(name: str, hint: Any, default: Any) -> _Slot:
    names: tuple[str, ...] = (name,)
    check = _check(hint)
    if isinstance(default, _Field):
        names, check = default.names or names, _bounded(check, default)
        if default.factory is not None:
            return _Slot(names, check, default.factory)
        default = default.default
    return _Slot(names, check, None if default is _UNSET else lambda: default)


def _check(hint: Any) -> _Check:
    """The check of one type; those that no record uses are not known."""
    origin = getattr(hint, "__origin__", None)
    arguments: tuple[Any, ...] = getattr(hint, "__args__", ())
    if hasattr(hint, "__metadata__"):  # Annotated[int, field(ge=1)]
        check = _check(origin)
        for word in hint.__metadata__:
            check = _bounded(check, word) if isinstance(word, _Field) else _after(check, word)
        return check
    if origin is Union or isinstance(hint, types.UnionType):
        return _one_of([_check(item) for item in arguments])
    if origin in {list, tuple}:
        return _items(origin, _check(arguments[0]))
    if origin is not None and issubclass(origin, Mapping):
        return _pairs(_check(arguments[1]))
    if isinstance(hint, type) and issubclass(hint, Record):
        return _record(hint)
    return _SIMPLE[hint]


def _plainly(kinds: tuple[type, ...], msg: str, keep: Callable[[Any], Any] | None = None) -> _Check:
    def check(value: object, loc: tuple[str | int, ...], problems: list[Problem]) -> Any:
        if type(value) not in kinds:
            problems.append(Problem(loc, f"Input should be {msg}", value))
            return value
        return value if keep is None else keep(value)

    return check


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _json(value: object, loc: tuple[str | int, ...], problems: list[Problem]) -> Any:
    if isinstance(value, dict):
        return {key: _json(item, (*loc, key), problems) for key, item in value.items()}
    if isinstance(value, list):
        return [_json(item, (*loc, at), problems) for at, item in enumerate(value)]
    if value is not None and not isinstance(value, (str, int, float)):
        problems.append(Problem(loc, "input was not a valid JSON value", value))
    return value


_SIMPLE: Mapping[Any, _Check] = {
    bool: _plainly((bool,), "a valid boolean"),
    int: _plainly((int,), "a valid integer"),
    float: _plainly((float, int), "a valid number", _float),
    str: _plainly((str,), "a valid string"),
    type(None): _plainly((type(None),), "None"),
    Json: _json,
}


def _bounded(check: _Check, bounds: _Field) -> _Check:
    def bounded(value: object, loc: tuple[str | int, ...], problems: list[Problem]) -> Any:
        before = len(problems)
        kept = check(value, loc, problems)
        if len(problems) > before or kept is None or isinstance(kept, (str, bool)):
            return kept
        what = None
        if isinstance(kept, float) and bounds.gt is not None and not math.isfinite(kept):
            what = "a finite number"
        elif bounds.gt is not None and not kept > bounds.gt:
            what = f"greater than {bounds.gt}"
        elif bounds.ge is not None and not kept >= bounds.ge:
            what = f"greater than or equal to {bounds.ge}"
        elif bounds.le is not None and not kept <= bounds.le:
            what = f"less than or equal to {bounds.le}"
        if what:
            problems.append(Problem(loc, f"Input should be {what}", value))
        return kept

    if (bounds.ge, bounds.le, bounds.gt) == (None, None, None):
        return check
    return bounded


def _after(check: _Check, change: Callable[[Any], Any]) -> _Check:
    def changed(value: object, loc: tuple[str | int, ...], problems: list[Problem]) -> Any:
        before = len(problems)
        kept = check(value, loc, problems)
        if len(problems) > before:
            return kept
        try:
            return change(kept)
        except ValueError as error:
            problems.append(Problem(loc, str(error), value))
            return kept

    return changed


def _one_of(checks: list[_Check]) -> _Check:
    """The member that keeps the value as it is, or the first that fits; all complain otherwise."""
    empty = _SIMPLE[type(None)]
    members = [check for check in checks if check is not empty]
    may_be_none = len(members) < len(checks)

    def check(value: object, loc: tuple[str | int, ...], problems: list[Problem]) -> Any:
        if value is None and may_be_none:
            return None
        complaints: list[Problem] = []
        fits = []
        for member in members:
            wrong: list[Problem] = []
            kept = member(value, loc, wrong)
            if not wrong:
                fits.append(kept)
            complaints += wrong
        if fits:
            return next((kept for kept in fits if type(kept) is type(value)), fits[0])
        problems += complaints
        return value

    return check


def _items(kind: type, member: _Check) -> _Check:
    def check(value: object, loc: tuple[str | int, ...], problems: list[Problem]) -> Any:
        if not isinstance(value, kind):
            problems.append(Problem(loc, f"Input should be a valid {kind.__name__}", value))
            return value
        kept = [member(item, (*loc, at), problems) for at, item in enumerate(value)]  # type: ignore[var-annotated, arg-type]
        return kind(kept)

    return check


def _pairs(member: _Check) -> _Check:
    def check(value: object, loc: tuple[str | int, ...], problems: list[Problem]) -> Any:
        if not isinstance(value, Mapping):
            problems.append(Problem(loc, "Input should be a valid dictionary", value))
            return value
        return {key: member(item, (*loc, key), problems) for key, item in value.items()}

    return check


def _record(record: type[Record]) -> _Check:
    def check(value: object, loc: tuple[str | int, ...], problems: list[Problem]) -> Any:
        try:
            return record.model_validate(value)
        except ValidationError as error:
            problems.extend(item._replace(loc=(*loc, *item.loc)) for item in error.problems)
            return value

    return check
