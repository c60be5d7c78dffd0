"""YAML 1.2 (core schema) as JSON, with the place of every key and value.

    document = parse("{lr: 1e-5, at: 12:00:00}")
    document.value                      {"lr": 1e-05, "at": "12:00:00"}
    document.places[("lr",)].value      Place(line=1, column=6)
    document.problems                   duplicate keys, tags, what JSON can't hold: all of them

PyYAML scans and composes; its YAML 1.1 reading of plain scalars, and its constructors, are not used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import yaml

from orchestrator.core.atomic import Json, JsonObject

__all__ = ["Document", "Path", "Place", "Spot", "YamlError", "parse"]

Path: TypeAlias = tuple[str | int, ...]

_MAX_NODES = 100_000
_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class Place(NamedTuple):
    """Where something begins, both counted from 1."""

    line: int
    column: int


class Spot(NamedTuple):
    """Where a value begins, and its key (for an item of a list, the item)."""

    key: Place
    value: Place


class YamlError(Exception):
    """The text is not YAML, or more than one document."""

    def __init__(self, place: Place, text: str) -> None:
        super().__init__(text)
        self.place = place


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What was read.

    Args:
        value: the document as JSON; null stands for what `problems` names.
        places: where each value is, by its path.
        problems: path, place and text of everything that JSON can't carry or that is ambiguous.
    """

    value: Json
    places: dict[Path, Spot] = field(default_factory=dict)
    problems: list[tuple[Path, Place, str]] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """Composes nodes, with the plain scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # PyYAML's own shape


for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})\\Z"), _first)


def parse(text: str) -> Document:
    """Read one YAML document.

    Raises:
        YamlError: with the first place where it is not YAML, or the second document's.
    """
    try:
        node = _compose(text)
        if node is None:
            return Document(value=None)
        builder = _Builder()
        value = builder.build(node, (), _place(node.start_mark))
        return Document(value=value, places=builder.places, problems=builder.problems)
    except RecursionError:
        raise YamlError(Place(1, 1), "nested too deeply") from None


def _compose(text: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        node: yaml.Node | None = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        raise _unprintable(text, error) from None
    except yaml.MarkedYAMLError as error:
        raise _marked(error) from None
    return node


def _unprintable(text: str, error: yaml.reader.ReaderError) -> YamlError:
    before = text[: error.position]
    place = Place(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)
    return YamlError(place, f"character U+{ord(text[error.position]):04X} is not allowed in YAML")


def _marked(error: yaml.MarkedYAMLError) -> YamlError:
    mark = error.problem_mark or error.context_mark
    assert mark is not None
    problem = error.problem or "can't be read"
    if "single document" in (error.context or ""):
        return YamlError(_place(mark), "a second document begins here; a sweep file holds one")
    text = "; ".join(part for part in (error.context, problem) if part)
    if "'\\t'" in text:
        text += "; indent with spaces, not tabs"
    return YamlError(_place(mark), f"not YAML: {text}")


def _place(mark: yaml.Mark) -> Place:
    return Place(mark.line + 1, mark.column + 1)


class _Builder:
    """Turns nodes into JSON, noting places and problems on the way."""

    def __init__(self) -> None:
        self.places: dict[Path, Spot] = {}
        self.problems: list[tuple[Path, Place, str]] = []
        self._open: set[int] = set()
        self._num_nodes = 0

    def build(self, node: yaml.Node, path: Path, key: Place) -> Json:
        place = _place(node.start_mark)
        self.places[path] = Spot(key, place)
        self._count(place)
        if id(node) in self._open:
            raise YamlError(place, "this anchor holds an alias of itself")
        if not isinstance(node, yaml.ScalarNode):
            self._open.add(id(node))
        try:
            return self._value(node, path, place)
        finally:
            self._open.discard(id(node))

    def _count(self, place: Place) -> None:
        # Ten lines of aliases can stand for 10^10 values.
        self._num_nodes += 1
        if self._num_nodes > _MAX_NODES:
            raise YamlError(place, f"more than {_MAX_NODES:,} values, aliases counted")

    def _value(self, node: yaml.Node, path: Path, place: Place) -> Json:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.build(item, (*path, i), _place(item.start_mark)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.ScalarNode) and kind in ("str", *_PLAIN):
            return self._scalar(node.value, kind, path, place)
        shown = node.tag.replace(_TAG, "!!")
        self._blame(path, place, f"tag {shown} is not allowed here; write the value without it")
        return None

    def _mapping(self, node: yaml.MappingNode, path: Path) -> JsonObject:
        found: JsonObject = {}
        for source in [value for key, value in node.value if _is_merge(key)]:
            for each in reversed(list(self._merged(source, path))):
                self._count(_place(each.start_mark))
                found |= self._mapping(each, path)
        own: set[str] = set()
        for key, value in node.value:
            if not _is_merge(key):
                self._pair(key, value, path, own, found)
        return found

    def _merged(self, source: yaml.Node, path: Path) -> Iterator[yaml.MappingNode]:
        for node in source.value if isinstance(source, yaml.SequenceNode) else [source]:
            if id(node) in self._open:
                raise YamlError(_place(node.start_mark), "this anchor holds an alias of itself")
            if isinstance(node, yaml.MappingNode):
                yield node
            else:
                self._blame(path, _place(node.start_mark), "<<: expected a mapping, or a list of mappings")

    def _pair(self, key: yaml.Node, value: yaml.Node, path: Path, own: set[str], found: JsonObject) -> None:
        place = _place(key.start_mark)
        if key.tag != _TAG + "str" or not isinstance(key, yaml.ScalarNode):
            shown = f" {key.value}" if isinstance(key, yaml.ScalarNode) else ""
            self._blame(path, place, f"found the key{shown}, which is not a string; quote it")
            return
        name = self._scalar(key.value, "str", path, place)
        if not isinstance(name, str):
            return
        if name in own:
            first = self.places[*path, name].key.line
            self._blame((*path, name), place, f"a second time in this mapping, after line {first}")
            return
        own.add(name)
        found[name] = self.build(value, (*path, name), place)

    def _scalar(self, text: str, kind: str, path: Path, place: Place) -> Json:
        if kind in ("str", "merge"):
            return self._string(text, path, place)
        if not re.fullmatch(_PLAIN[kind][0], text):
            self._blame(path, place, f"{text!r} is not what its tag !!{kind} says")
            return None
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        return self._number(text, kind, path, place)

    def _string(self, text: str, path: Path, place: Place) -> Json:
        if "\0" not in text and not re.search("[\ud800-\udfff]", text):
            return text
        self._blame(path, place, "found a string with a NUL or half a surrogate pair, which no file can carry")
        return None

    def _number(self, text: str, kind: str, path: Path, place: Place) -> Json:
        if kind == "float":
            number = math.inf if text.lower().endswith(("inf", "nan")) else float(text)
            if math.isfinite(number):
                return number
            self._blame(path, place, f"found {text}, expected a finite number")
            return None
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        # Longer ones are not even converted: Python's own limit on digits would raise.
        if len(text) < 30 and -(2**63) <= (integer := int(text, base)) < 2**63:
            return integer
        self._blame(path, place, f"found {text[:30]}, expected an integer of at most 64 bits")
        return None

    def _blame(self, path: Path, place: Place, text: str) -> None:
        self.problems.append((path, place, text))


def _is_merge(key: yaml.Node) -> bool:
    return key.tag == _TAG + "merge"
