"""A sweep file's tree, where each value of it came from, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.config.yaml12 import Document, Path, Place
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.core.text import describe
from orchestrator.errors import SweepFileError

__all__ = ["HARMLESS", "HARMLESS_IN_METRIC", "REFUSED", "SweepDocument", "dotted", "parameter_paths", "set_aside"]


class SweepDocument:
    """The tree of a sweep file, where each value came from, and every problem found so far."""

    def __init__(self, file: str, document: Document, arguments: Sequence[str] = ()) -> None:
        self.tree: JsonObject = document.value if isinstance(document.value, dict) else {}
        self._file, self._places = file, document.places
        self._given, self._arguments = arguments, dict[Path, str]()
        self._problems: dict[tuple[Path, str], tuple[tuple[int, ...], str]] = {}
        for path, place, text in document.problems:
            self._add(path, (0, *place), f"{file}:{place.line}:{place.column}", text)

    def override(self, path: Path, value: Json, argument: str) -> None:
        """Put `value` at `path`, making the mappings on the way."""
        above = self.tree
        for depth, part in enumerate(path[:-1]):
            if above.get(str(part)) is None:
                above[str(part)] = {}
            inner = above[str(part)]
            if not isinstance(inner, dict):
                return self.blame_argument(
                    argument, f"{dotted(path[: depth + 1])} is {describe(inner)}, nothing is inside it"
                )
            above = inner
        above[str(path[-1])] = value
        self._places = {p: place for p, place in self._places.items() if p[: len(path)] != path}
        self._problems = {k: v for k, v in self._problems.items() if k[0][: len(path)] != path}
        self._arguments[path] = argument
        return None

    def blame(self, path: Path, text: str, *, key: bool = False, at: Path | None = None) -> None:
        """Note a problem of the value at `path` (or of its key), shown at `at`, else at the nearest there is."""
        if any(path == known for known, _ in self._problems):
            return
        spot = path if at is None else at
        while spot and spot not in self._places and spot not in self._arguments:
            spot, key = spot[:-1], True
        order: tuple[int, ...]
        if spot in self._arguments:
            order, where = (1, self._given.index(self._arguments[spot])), f"argument {self._arguments[spot]!r}"
        else:
            both = self._places.get(spot)
            place = Place(1, 1) if both is None else both.key if key else both.value
            order, where = (0, *place), f"{self._file}:{place.line}:{place.column}"
        self._add(path, order, where, text)

    def blame_argument(self, argument: str, text: str) -> None:
        """Note a problem of an override as such."""
        self._problems[(argument,), text] = ((1, self._given.index(argument)), f"argument {argument!r}: {text}")

    def _add(self, path: Path, order: tuple[int, ...], where: str, text: str) -> None:
        self._problems[path, text] = (order, ": ".join(filter(None, (where, dotted(path), text))))

    def raise_problems(self) -> None:
        """Raise what was found, in the order of the file."""
        if self._problems:
            raise SweepFileError([text for _, text in sorted(self._problems.values())])


def dotted(path: Path) -> str:
    """A path as it is written in messages."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in path)
    return "".join(parts).removeprefix(".")


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)[1:-1]


def parameter_paths(parameters: Json, above: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every parameter, groups too; of a tree that nobody has checked yet."""
    for name, config in parameters.items() if isinstance(parameters, dict) else ():
        yield name, (*above, name)
        if isinstance(config, dict):
            for inner, path in parameter_paths(config.get("parameters"), (*above, name, "parameters")):
                yield f"{name}.{inner}", path


HARMLESS = ("apiVersion", "kind", "controller", "project", "entity")


HARMLESS_IN_METRIC = ("impute", "impute_while_running")


REFUSED: dict[Path, str] = {
    ("early_terminate",): "stopping trials early is not available yet; without this key every trial runs to its end",
    ("metrics",): "several objectives are not available; give one as metric",
    ("scheduler",): "schedulers of one's own are not available; give method: grid or random",
    ("job",): "W&B's launch jobs are not available; give program or command",
    ("image_uri",): "W&B's launch images are not available; give program or command, and launch.apptainer for an image",
    ("metric", "target"): "ending a sweep at a target is not available; without this key every trial runs",
}


def set_aside(sheet: SweepDocument) -> None:
    """Take out W&B's keys that mean nothing here, and refuse those that would change the result."""
    for key in HARMLESS:
        sheet.tree.pop(key, None)
    metric = sheet.tree.get("metric")
    for path, reason in REFUSED.items():
        section = sheet.tree if len(path) == 1 else metric
        if isinstance(section, dict) and str(path[-1]) in section:
            sheet.blame(path, reason, key=True)
            del section[str(path[-1])]
    if isinstance(metric, dict):
        for key in HARMLESS_IN_METRIC:
            metric.pop(key, None)
