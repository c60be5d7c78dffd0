"""A sweep as a client of a network file system sees it: what others have written becomes visible late and in pieces.

    view = Late(paths, tmp_path / "view")       nothing of records and models is visible yet
    view.reveal("records/ab12.jsonl", 100)      its first 100 bytes are
    view.reveal_all()

The view is a folder of its own, so real processes can be started in it. Claims are shared, since a file that is created
exclusively is so for every client at once.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.core.paths import SweepPaths

__all__ = ["Late"]


class Late:
    """A view of the sweep in `real`, below `runs`."""

    def __init__(self, real: SweepPaths, runs: Path) -> None:
        self._real = real
        self.paths = SweepPaths(runs / real.id)
        for folder in self.paths.folders:
            if folder != self.paths.claims:
                folder.mkdir(parents=True)
        self.paths.claims.symlink_to(real.claims)
        self.paths.plan.write_bytes(real.plan.read_bytes())

    def hidden(self) -> dict[str, int]:
        """Name -> bytes not visible yet, of each record and model of the others."""
        found = {}
        for path in (*self._real.records.iterdir(), *self._real.models.iterdir()):
            name = str(path.relative_to(self._real.root))
            mine = self.paths.root / name
            visible = mine.stat().st_size if mine.exists() else 0
            if (hidden := path.stat().st_size - visible) > 0 or not mine.exists():
                found[name] = hidden
        return found

    def reveal(self, name: str, size: int | None = None, *, zeros: int = 0) -> None:
        """Make a file visible up to `size` bytes, the first of them as `zeros`, as pages that have not arrived yet."""
        data = (self._real.root / name).read_bytes()[:size]
        (self.paths.root / name).write_bytes(bytes(min(zeros, len(data))) + data[zeros:])

    def reveal_all(self) -> None:
        """Make everything visible, and whole."""
        for path in (*self._real.records.iterdir(), *self._real.models.iterdir()):
            self.reveal(str(path.relative_to(self._real.root)))
