"""Draw the rooms of the package from its imports, and the ways that a trial, a value and a signal take through them.

python docs/figures/rooms.py            writes docs/figures/rooms.svg; `make docs` runs it
"""

from __future__ import annotations

import ast
import html
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent.parent / "orchestrator"

ROOMS = {
    "core": "files, processes, messages",
    "config": "sweep file, code, plan",
    "stats": "the exact Summary",
    "results": "records, fold, reduction",
    "slurm": "scripts, submissions",
    "distributed": "ranks, consensus",
    "training": "what a job sees",
    "worker": "processes that run trials",
    "supervisor": "hands out trials",
    "cli": "the verbs of orc",
}
WAYS = {
    "a trial": (
        "config.plan", "slurm.submit", "supervisor.trial_queue", "supervisor.scheduler", "worker.single",
        "training.trial", "results.records", "results.fold",
    ),
    "a value": (
        "training.losses", "stats.batch", "stats.summary", "distributed.control_group", "training.trial",
        "core.messages", "results.records", "results.reducer",
    ),
    "a signal": (
        "slurm.script", "core.signals", "supervisor.notice_handler", "slurm.notice_policy", "supervisor.worker_pool",
        "worker.single", "training.checkpoint.manager", "slurm.own_job",
    ),
}  # fmt: skip
COLOURS = {"a trial": "#1f6feb", "a value": "#1a7f37", "a signal": "#bc4c00"}

BOX_W, BOX_H, GAP_X, GAP_Y, LEFT, TOP = 178, 54, 26, 46, 24, 24


def main() -> None:
    """Write the picture."""
    (HERE / "rooms.svg").write_text(draw())


def draw() -> str:
    """Return the picture as SVG.

    Raises:
        LookupError: a module of `WAYS` is not there any more, or a folder has no row in `ROOMS`.
    """
    check()
    uses = reduced(imports())
    rows = layers(uses)
    height_rooms = TOP + len(rows) * (BOX_H + GAP_Y)
    width = LEFT * 2 + 4 * BOX_W + 3 * GAP_X
    places = {
        room: (
            width / 2 - (len(row) * (BOX_W + GAP_X) - GAP_X) / 2 + column * (BOX_W + GAP_X),
            TOP + line * (BOX_H + GAP_Y),
        )
        for line, row in enumerate(rows)
        for column, room in enumerate(row)
    }
    parts = [*arrows(uses, places), *boxes(places), *ways(height_rooms)]
    height = height_rooms + len(WAYS) * 86
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="ui-sans-serif, system-ui, sans-serif" font-size="13">'
    )
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#57606a"/></marker></defs>'
    )
    background = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, marker, background, *parts, "</svg>", ""])


def check() -> None:
    """Raise LookupError where the picture would show what is not there, or leave out a room."""
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    if folders != ROOMS.keys():
        raise LookupError(f"rooms and folders differ: {', '.join(sorted(folders ^ ROOMS.keys()))}")
    for module in (module for way in WAYS.values() for module in way):
        path = PACKAGE / module.replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__init__.py").exists():
            raise LookupError(f"there is no module {module}")


def imports() -> dict[str, set[str]]:
    """Return room -> the rooms that it imports, at any depth, for types too."""
    return {
        room: {
            name.split(".")[1]
            for path in (PACKAGE / room).rglob("*.py")
            for name in modules(ast.walk(ast.parse(path.read_text())))
            if name.split(".")[1] in ROOMS.keys() - {room}
        }
        for room in ROOMS
    }


def modules(nodes: Iterable[ast.AST]) -> Iterable[str]:
    """Yield the full names of what import statements load from this package."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("orchestrator"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reduced(uses: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the same without imports that another import implies, so that few arrows show all."""
    below = {room: reached(uses, room) for room in uses}
    return {
        room: {other for other in direct if not any(other in below[third] for third in direct - {other})}
        for room, direct in uses.items()
    }


def reached(uses: dict[str, set[str]], room: str) -> set[str]:
    """Return all rooms that one imports, directly or by others."""
    seen: set[str] = set()
    left = list(uses[room])
    while left:
        if (other := left.pop()) not in seen:
            seen.add(other)
            left += uses[other]
    return seen


def layers(uses: dict[str, set[str]]) -> list[list[str]]:
    """Return the rooms row by row, from the one that all rest on: each above everything that it imports."""
    rows: list[list[str]] = []
    placed: set[str] = set()
    while len(placed) < len(uses):
        rows.append([room for room in uses if room not in placed and uses[room] <= placed])
        placed |= set(rows[-1])
    return rows


def boxes(places: dict[str, tuple[float, float]]) -> Iterable[str]:
    """Yield a box for each room."""
    for room, (x, y) in places.items():
        yield f'<rect x="{x:g}" y="{y:g}" width="{BOX_W}" height="{BOX_H}" rx="8" fill="#f6f8fa" stroke="#57606a"/>'
        yield text(x + BOX_W / 2, y + 23, room, weight="bold", size=15)
        yield text(x + BOX_W / 2, y + 41, ROOMS[room], colour="#57606a", size=12)


def arrows(uses: dict[str, set[str]], places: dict[str, tuple[float, float]]) -> Iterable[str]:
    """Yield an arrow from each room to those that it imports, which lie above it."""
    for room, others in uses.items():
        for other in sorted(others, key=lambda each: places[each]):
            (x, y), (to_x, to_y) = places[room], places[other]
            offset = (to_x - x) / 12
            yield (
                f'<path d="M{x + BOX_W / 2 + offset:.1f},{y:g} L{to_x + BOX_W / 2 - offset:.1f},{to_y + BOX_H:g}" '
                'stroke="#8c959f" fill="none" marker-end="url(#tip)"/>'
            )


def ways(top: float) -> Iterable[str]:
    """Yield a row for each way: the modules in their order."""
    for row, (name, way) in enumerate(WAYS.items()):
        y = top + row * 86
        yield text(LEFT, y + 12, f"The way of {name}", weight="bold", anchor="start", colour=COLOURS[name])
        for place, module in enumerate(way):
            x, line = LEFT + (place % 4) * (BOX_W + GAP_X), y + 22 + place // 4 * 27
            frame = f'fill="#ffffff" stroke="{COLOURS[name]}"'
            yield f'<rect x="{x}" y="{line}" width="{BOX_W}" height="21" rx="5" {frame}/>'
            yield text(x + BOX_W / 2, line + 15, f"{place + 1}  {module}", size=10.5)


def text(
    x: float, y: float, words: str, *, weight: str = "normal", size: float = 13, anchor: str = "middle",
    colour: str = "#1f2328",
) -> str:  # fmt: skip
    """Return one line of text."""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size:g}" '
        f'fill="{colour}">{html.escape(words)}</text>'
    )


if __name__ == "__main__":
    main()
