"""Where a job is in its loops, and how one that runs again from its top comes back to that place.

    course = LoopReplay(mark)
    loop = course.begin(opens=True)             a call of `epochs`, or of `batches` with opens=False
    first = course.first(loop)                  its first item here; None: all of it is behind us
    course.give(loop) ... course.take(loop)     around the body of each item
    course.end(loop)
    place = course.place(loop)                  at a safe point of `loop`; later LoopReplay(mark, place)

A job that resumes runs again from its top. What it did up to its place is told apart by whether it trained: a loop that
trained is not run again, since the state that is put back has seen it; one that did not, such as a look at the data, is
run again, since nothing but the job's own variables can have come of it. Reports on the way are not made again, but
answered as they were. At the place, `arrive` ends this, and everything is put back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias, cast

__all__ = ["Astray", "Loop", "LoopReplay", "Place"]

Place: TypeAlias = "list[dict[str, object]]"
"""Plain values, one entry a frame; see `LoopReplay.place`."""

_MANY = 1000
"""Answers in one frame that are worth asking whether they will ever be wanted."""


class Astray(Exception):
    """A job that runs again from its top took another way than before; the text says where."""


@dataclass(slots=True, eq=False)
class Loop:
    """One call of `epochs` or `batches`.

    Args:
        frame: in which it was made.
        ordinal: its number among the calls of that frame.
        opens: each item has a frame of its own, as epochs have.
        num_answers: of the frame, when it was made.
        mark: of what was trained, when it was made.
        num_given: items that it has given.
        is_own: its items are ours to give again; those of a DataLoader, say, are not.
        is_behind: it was over before the place, and trained.
    """

    frame: _Frame
    ordinal: int
    opens: bool
    num_answers: int
    mark: int
    is_own: bool = True
    num_given: int = 0
    is_behind: bool = False


@dataclass(slots=True, eq=False)
class _Frame:
    """The body of an epoch, or the job outside of any.

    Args:
        before: this frame on the way to the place; None once that was reached, or where there is none.
        num_loops: calls that were made in it.
        open: loops that are not over, by ordinal.
        trained: ordinals of loops that are over and trained.
        answers: what reports in it were answered.
    """

    before: dict[str, object] | None = None
    num_loops: int = 0
    open: dict[int, Loop] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)
    answers: list[object] = field(default_factory=list)


class LoopReplay:
    """Where a job is.

    Args:
        mark: a number that changes whenever something was trained.
        place: where it is to go on; None to begin.
    """

    def __init__(self, mark: Callable[[], int], place: Place | None = None) -> None:
        self._mark = mark
        self._place = place
        self._frames = [_Frame(before=None if place is None else place[0])]
        self._num_answered = 0

    @property
    def is_under_way(self) -> bool:
        """Whether the place where the job is to go on is still ahead."""
        return self._place is not None

    # Loops

    def begin(self, *, opens: bool, is_own: bool = True) -> Loop:
        """A loop that the job has called for."""
        frame = self._frames[-1]
        loop = Loop(frame, frame.num_loops, opens, len(frame.answers), self._mark(), is_own)
        frame.num_loops += 1
        frame.open[loop.ordinal] = loop
        if frame.before is not None:
            loop.num_given = cast("dict[int, int]", frame.before["open"]).get(loop.ordinal, 0)
            loop.is_behind = loop.ordinal in cast("list[int]", frame.before["trained"])
        return loop

    def is_goal(self, loop: Loop) -> bool:
        """Whether the place is in this loop, and not deeper."""
        return self._leads_on(loop) and self._place is not None and len(self._frames) == len(self._place)

    def _leads_on(self, loop: Loop) -> bool:
        return loop.frame.before is not None and loop.frame.before["path"] == loop.ordinal

    def first(self, loop: Loop) -> int | None:
        """The first item that the loop gives here, from 0; None when all of it is behind us."""
        if loop.is_behind:
            return None
        if self._leads_on(loop) and not self.is_goal(loop):
            loop.num_given -= 1  # the place is inside of the item that was given last
        return loop.num_given

    def give(self, loop: Loop) -> None:
        """An item is given; one that `opens` has a frame of its own from here on."""
        loop.num_given += 1
        if loop.opens:
            depth = self._frames.index(loop.frame) + 1
            deeper = self._place if self._place is not None and self._leads_on(loop) else None
            self._frames[depth:] = [_Frame(before=deeper[depth] if deeper and depth < len(deeper) else None)]

    def take(self, loop: Loop) -> None:
        """The job has come back for the next item."""
        if loop.opens and loop.frame in self._frames:
            del self._frames[self._frames.index(loop.frame) + 1 :]

    def end(self, loop: Loop) -> bool:
        """The loop is over, or was left. Whether it has trained."""
        frame, has_trained = loop.frame, loop.is_behind or self.has_trained(loop)
        if frame.open.pop(loop.ordinal, None) is not None and frame in self._frames:
            self.take(loop)
            if has_trained:
                frame.trained.append(loop.ordinal)
                del frame.answers[loop.num_answers :]
        return has_trained

    def has_trained(self, loop: Loop) -> bool:
        """Whether anything was trained since the loop began."""
        return self._mark() != loop.mark

    # Places

    def is_safe(self, loop: Loop) -> bool:
        """Whether the job can go on from here, where it has come back for the next item of `loop`.

        Not where nothing was trained since: there the job is collecting something of its own, such as a mean. Nor
        inside of the body of another loop, whose item would be lost.
        """
        if self.is_under_way or loop.frame is not self._frames[-1] or not self.has_trained(loop):
            return False
        if not all(other.is_own for frame in self._frames for other in frame.open.values()):
            return False
        return all(other.ordinal >= loop.ordinal for other in loop.frame.open.values() if other.opens == loop.opens)

    def place(self, loop: Loop) -> Place:
        """Where the job is: at a safe point of `loop`."""
        paths = [self._path(frame) for frame in self._frames[:-1]]
        return [_entry(frame, path) for frame, path in zip(self._frames, [*paths, loop], strict=True)]

    def _path(self, frame: _Frame) -> Loop:
        """The loop in whose item the next frame is."""
        return max((loop for loop in frame.open.values() if loop.opens), key=lambda loop: loop.ordinal)

    def arrive(self) -> None:
        """The place is reached: from here on everything is done, and noted, as it was before."""
        for frame in self._frames:
            before = frame.before
            assert before is not None
            frame.num_loops = max(frame.num_loops, cast(int, before["num_loops"]))
            frame.trained = list(cast("list[int]", before["trained"]))
            frame.answers = list(cast("list[object]", before["answers"]))
            for loop in frame.open.values():
                loop.num_answers = min(loop.num_answers, len(frame.answers))
            frame.open[cast(int, before["path"])].num_answers = len(frame.answers)
            frame.before = None
        self._place = None

    # Reports

    def note(self, answer: object) -> None:
        """A report was answered so."""
        answers = self._frames[-1].answers
        answers.append(answer)
        if len(answers) % _MANY == 0:
            self._forget()

    def _forget(self) -> None:
        """Drop the answers to what will not be asked again: they would fill the memory of a job of many reports."""
        frame = self._frames[-1]
        for loop in frame.open.values():
            if self.has_trained(loop):
                del frame.answers[loop.num_answers :]

    def answer(self) -> object:
        """What this report was answered before.

        Raises:
            Astray: there was none here.
        """
        frame = self._frames[-1]
        known = [] if frame.before is None else cast("list[object]", frame.before["answers"])
        if len(frame.answers) >= len(known):
            raise Astray("it reports more often on the way than it did before")
        frame.answers.append(known[len(frame.answers)])
        return frame.answers[-1]


def _entry(frame: _Frame, path: Loop) -> dict[str, object]:
    others = [loop for loop in frame.open.values() if loop is not path]
    return {
        "num_loops": frame.num_loops,
        "path": path.ordinal,
        "open": {loop.ordinal: loop.num_given for loop in (path, *others)},
        "trained": list(frame.trained),
        "answers": frame.answers[: path.num_answers],
    }
