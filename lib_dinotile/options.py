"""An option, and a table of options."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lib_dinotile import DinotileError

T = TypeVar("T")
Table = TypeVar("Table", bound="Options")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel = 2


@dataclass(frozen=True)
class Option:
    """One row of the table."""

    name: str
    """As in the API; the command line has it with dashes."""
    type: type[Any]
    """bool, int, float or str."""
    default: Any
    label: str
    help: str
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    """Of the slider; an int must be a multiple of it, counted from zero."""
    zero: str | None = None
    """Meaning of 0, for an int that may be 0 besides its range."""
    choices: tuple[str, ...] | None = None
    """The allowed values where they are fixed. Lists that depend on what is installed are checked by the host."""
    infotext: str | None = None
    """Key in PNG info, or None if it does not change the image; what does is an X/Y/Z axis, too."""
    flag: str | None = None
    """On the command line, where that is not the name with dashes."""
    only_with: Callable[[Any], bool] = lambda settings: True
    """Whether it has a part in the image with these settings."""
    lines: int = 1
    """Lines that its text box shows."""

    @property
    def labelled(self) -> Option:
        """Itself by its label: what it refuses, it refuses in the words of the UI."""
        return dataclasses.replace(self, name=self.label)

    @property
    def allowed(self) -> str:
        """Its values, in words."""
        if self.choices is not None:
            return "one of " + ", ".join(self.choices)
        if self.type in (int, float):
            number = "a whole number" if self.type is int else "a number"
            steps = f", a multiple of {self.step:g}" if self.type is int and self.step and self.step > 1 else ""
            zero = f"0 ({self.zero}) or " if self.zero else ""
            return f"{zero}{number} from {self.type(self.minimum):n} to {self.type(self.maximum):n}{steps}"
        return "true or false" if self.type is bool else "text"

    def check(self, value: Any) -> Any:
        """`value` in the option's own type; DinotileError with one line if it is not allowed.

        A whole float is accepted for an int (JSON and sliders do not tell them apart), a whole number where a choice is
        one, and spaces around a text do not count (PNG info does not keep them); nothing else is converted.
        """
        if type(value) in (int, float) and self.choices is not None:
            value = next((choice for choice in self.choices if choice.isdecimal() and value == int(choice)), value)
        if self.type in (int, float):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # Also refuses NaN: nothing compares with it.
            within = number and (self.minimum <= value <= self.maximum or (self.zero is not None and value == 0))
            if not within or (self.type is int and value != int(value)):
                raise self._refuse(value)
            value = self.type(value)
            if self.type is int and self.step and value % self.step:
                raise self._refuse(value)
        elif not isinstance(value, self.type) or (self.choices is not None and value not in self.choices):
            raise self._refuse(value)
        elif self.type is str and self.choices is None:
            if not _is_unicode(value):
                raise self._refuse(value)
            value = value.strip()
        return value

    def parse(self, text: str) -> Any:
        """`check` for a value that comes as text: PNG info, an X/Y/Z axis, the command line."""
        text = text.strip()
        try:
            if self.type is bool:
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
            return self.check(self.type(text))
        except (KeyError, ValueError) as error:
            raise self._refuse(text) from error

    def _refuse(self, value: Any) -> DinotileError:
        return DinotileError(f"{self.name}: {_shown(value)} is not allowed, give {self.allowed}")


def _shown(value: Any) -> str:
    """A value of any type, in at most 80 characters."""
    try:
        text = _short.repr(value)
    except ValueError:  # Python writes no whole number of over 4300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def _is_unicode(text: str) -> bool:
    """Whether it can be written to a file: halves of characters cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def option(default: T, label: str, help: str, **more: Any) -> T:
    """A field of an options class; `more` as in `Option`."""
    return dataclasses.field(default=default, metadata={"label": label, "help": help, **more})  # type: ignore[return-value]


class Options:
    """Base of `Settings` and `Generation`: a frozen dataclass whose fields are made by `option`."""

    @classmethod
    def table(cls) -> Iterator[Option]:
        """The options, in the order in which they are shown."""
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            yield Option(field.name, type(field.default), field.default, **field.metadata)

    @classmethod
    def option(cls, name: str) -> Option:
        """The option of that name; DinotileError, with the nearest name there is, if there is none."""
        rows = {row.name: row for row in cls.table()}
        if name in rows:
            return rows[name]
        near = difflib.get_close_matches(name[:80], rows, n=1) if isinstance(name, str) else ()
        hint = f": did you mean {near[0]!r}?" if near else cls._listed()
        raise DinotileError(f"{_shown(name)} is not an option of DINO Tile{hint}")

    @classmethod
    def _listed(cls) -> str:
        return ": the options are " + ", ".join(row.name for row in cls.table())

    @classmethod
    def with_label(cls, line: str) -> str:
        """A line that begins with an option's name, as refusals do, with its label in place of that."""
        name, colon, rest = line.partition(":")
        labels = {row.name: row.label for row in cls.table()}
        return labels.get(name, name) + colon + rest

    @classmethod
    def parse(cls: type[Table], values: Mapping[str, Any], labels: bool = False, texts: bool = False) -> Table:
        """Options from a dict, defaults for what is left out.

        DinotileError, one line, for all wrong names, types and ranges, and all values that do not go together; labels:
        with the labels of options in place of their names; texts: the values are texts, see `Option.parse`.
        """
        if not isinstance(values, Mapping):
            raise DinotileError(f"{_shown(values)} is not allowed, give one dict of options")
        checked, faults = {}, []
        for name, value in values.items():
            try:
                option = cls.option(name).labelled if labels else cls.option(name)
                checked[name] = option.parse(value) if texts else option.check(value)
            except DinotileError as error:
                faults.append(str(error))
        draft = cls()
        vars(draft).update(checked)
        found = draft.conflicts((lambda name: cls.option(name).label) if labels else str)
        faults += [line for names, line in found if all(name in checked or name not in values for name in names)]
        if faults:
            every = cls._listed()  # is told once, at the end
            faults.sort(key=lambda line: line.endswith(every))
            raise DinotileError("; ".join([*(line.removesuffix(every) for line in faults[:-1]), faults[-1]]))
        return cls(**checked)

    def conflicts(self, called: Callable[[str], str] = str) -> Iterator[tuple[tuple[str, ...], str]]:
        """Values that do not go together: names of the options, and a line. called: how it is to call an option."""
        return iter(())

    def __post_init__(self) -> None:
        faults = [line for _, line in self.conflicts()]
        if faults:
            raise DinotileError("; ".join(faults))
