"""The fold cache: what the last fold knew, so that the next one reads only what is new.

One file in the sweep's folder: a checked line of JSON (record files and how far each was read, what is rare, what was
worked out), then the columns of the rows as they lie in memory. It is derived: one that does not fit the record files,
is damaged, is of another version or belongs to a third user counts for nothing, and deleting it loses nothing but time.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from io import BufferedReader, FileIO
from typing import Final, cast
from zlib import crc32

from orchestrator.core import atomic, permissions
from orchestrator.core.atomic import JsonObject
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import OrcError
from orchestrator.results.fold.columns import Columns
from orchestrator.results.fold.incremental import IncrementalBest
from orchestrator.results.fold.segment import RecordFile, Segment, opened, tail
from orchestrator.results.fold.table import Table
from orchestrator.results.records import Seen

__all__ = ["load", "save"]

SCHEMA: Final = 3
_PIECE: Final = 1 << 20
_TAIL: Final = 1 << 16
"""Bytes at an end that are looked at: more than a worker writes before it waits for the disk."""
_SETTLED_NS: Final = 5 * 10**9
"""How much older than the cache a record file is that is surely on the disk, by the file system's clock."""


# Writing


def save(
    paths: SweepPaths, files: list[RecordFile], table: Table, leaders: IncrementalBest, seen: Mapping[str, Seen]
) -> None:
    """Write the cache, if this user may; that it can't be written is no error.

    All that the table holds must be of lines up to the `offset` of their file: `load` looks at no others.
    """
    with contextlib.suppress(OrcError, OSError, TypeError):
        if _may_replace(paths):
            atomic.write_lines(paths.fold_cache, _pieces(files, table, leaders, seen))


def _may_replace(paths: SweepPaths) -> bool:
    """Whether the cache is ours, or the folder is: two users must not keep replacing each other's."""
    try:
        owner = paths.fold_cache.lstat().st_uid
    except FileNotFoundError:
        return True
    return os.getuid() in (owner, paths.root.stat().st_uid)


def _pieces(
    files: list[RecordFile], table: Table, leaders: IncrementalBest, seen: Mapping[str, Seen]
) -> Iterator[bytes]:
    head: JsonObject = {
        "kind": "fold",
        "schema": SCHEMA,
        "byteorder": sys.byteorder,
        "num_trials": table.num_trials,
        "rows": crc32(table.rows.buffer),
        "table": table.to_json(),
        "leaders": leaders.to_json(),
        "files": [_file_json(number, file, seen) for number, file in enumerate(files)],
    }
    yield atomic.checked(head)
    for start in range(0, table.rows.num_bytes, _PIECE):
        yield table.rows.buffer[start : start + _PIECE].tobytes()


def _file_json(number: int, file: RecordFile, seen: Mapping[str, Seen]) -> JsonObject:
    # What is not intact is read again by every fold, so nothing is said of it here.
    known = Segment(
        number, 0, file.offset, num_lines=file.num_lines, writer=file.writer, notices=file.notices, open=file.open
    )
    known_by = tail(file.path, file.offset, _TAIL) if file.offset else 0
    looked = seen.get(file.path.name)
    return {**known.to_json(), "name": file.path.name, "tail": known_by, "changed_ns": looked and looked.changed_ns}


# Reading


def load(
    paths: SweepPaths, table: Table, leaders: IncrementalBest, seen: Mapping[str, Seen]
) -> list[RecordFile] | None:
    """Fill an empty table from the cache; returns the record files, or None if there is no cache that fits."""
    try:
        with opened(paths.fold_cache) as raw, BufferedReader(raw) as file:
            return _load(paths, file, table, leaders, seen) if permissions.is_believed(paths, file.fileno()) else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        # Whatever is wrong with it, the records hold all that it held.
        return None


def _load(
    paths: SweepPaths, file: BufferedReader[FileIO], table: Table, leaders: IncrementalBest, seen: Mapping[str, Seen]
) -> list[RecordFile] | None:
    head = atomic.unchecked(file.readline().removesuffix(b"\n")) or {}
    mine = {"schema": SCHEMA, "byteorder": sys.byteorder, "num_trials": table.num_trials}
    if any(head.get(name) != value for name, value in mine.items()):
        return None
    known = cast("list[JsonObject]", head["files"])
    saved_ns = os.fstat(file.fileno()).st_mtime_ns
    if not all(_fits(paths, one, seen.get(str(one["name"])), saved_ns) for one in known):
        return None
    rows = Columns(table.num_trials, range(table.num_trials))
    if file.readinto(rows.buffer) != rows.num_bytes or file.read(1) or crc32(rows.buffer) != head["rows"]:
        return None
    files = [_file(paths, one) for one in known]
    table.take_json(cast("JsonObject", head["table"]))
    if len(table.trials) == table.num_trials:
        table.rows = rows
        leaders.take_json(cast("JsonObject", head["leaders"]))
    else:
        table.rows = rows.narrowed(table.trials)
    return files


def _fits(paths: SweepPaths, known: JsonObject, seen: Seen | None, saved_ns: int) -> bool:
    """Whether a record file is still one that begins with what was read of it."""
    end = cast("int", known["end"])
    if seen is None or seen.size < end:
        return False
    # What was written just before the cache was may not have been on the disk yet when the machine lost its power.
    if (seen.size, seen.changed_ns) == (end, known["changed_ns"]) and seen.changed_ns < saved_ns - _SETTLED_NS:
        return True
    return not end or tail(paths.records / str(known["name"]), end, _TAIL) == known["tail"]


def _file(paths: SweepPaths, known: JsonObject) -> RecordFile:
    found = RecordFile(paths.records / str(known["name"]))
    found.take([Segment.from_json(known)])
    return found
