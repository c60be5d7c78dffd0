"""Histories of sweeps as record files: lines, what a file system shows of them over time, and views of their fold."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from orchestrator.config.spec import Metric
from orchestrator.core.atomic import JsonObject, checked
from orchestrator.core.paths import SweepPaths
from orchestrator.results.fold import Fold
from orchestrator.results.records import Cause, Status, end, notice, outcome, report, start

NUM = 4
WRITERS = ("a" * 32, "b" * 32, "c" * 32)


def empty(folder: Path) -> SweepPaths:
    found = SweepPaths(folder)
    found.records.mkdir()
    return found


def writer(name: str, **more: object) -> JsonObject:
    return {"kind": "writer", "writer": name, "host": f"host-{name[0]}", **more}


def done(trial: int, value: float = 1.0, attempt: int = 0, status: Status = Status.COMPLETE) -> JsonObject:
    return outcome(trial=trial, attempt=attempt, status=status, payload={"value": value}, seconds=1.0)


def ended(trial: int, cause: Cause = Cause.SIGNAL, attempt: int = 0, **more: bool) -> JsonObject:
    return end(trial=trial, attempt=attempt, cause=cause, detail="because", **more)


def begun(*trials: int, attempt: int = 0) -> list[JsonObject]:
    return [start(trial=trial, attempt=attempt) for trial in trials]


def put(paths: SweepPaths, name: str, *lines: JsonObject, **more: object) -> bytes:
    data = b"".join(map(checked, (writer(name, **more), *lines)))
    paths.record(name).write_bytes(data)
    return data


def folded(paths: SweepPaths) -> Fold:
    found = Fold(paths, NUM)
    found.update()
    return found


def view(fold: Fold) -> object:
    """All that a person can ask of a fold."""
    trials = fold.indices
    return (
        [fold.status(i) for i in trials],
        [fold.value(i) for i in trials],
        [fold.outcome(i) for i in trials],
        [fold.payload(i) for i in trials],
        [fold.next_attempt(i) for i in trials],
        [fold.attempts(i) for i in trials],
        [fold.charges(i) for i in trials],
        fold.running(),
        fold.retries(),
        fold.disagreements,
        fold.num_missing,
        fold.num_bad_lines,
        fold.writers(),
        sorted(map(repr, fold.notices())),
        fold.seen,
        fold.has_begun,
        fold.seconds,
        fold.missing(),
        [fold.trials(status) for status in Status],
        *(fold.best(Metric(goal=goal), top) for goal in ("minimize", "maximize") for top in (1, 3)),
        fold.summary(2),
    )


OUTCOMES = st.builds(
    done, st.integers(0, NUM - 1), st.sampled_from([1.0, 2.0, -0.0]), st.integers(0, 1), st.sampled_from(list(Status))
)
ENDS = st.builds(ended, st.integers(0, NUM - 1), st.sampled_from(list(Cause)), st.integers(0, 2), begun=st.booleans())
STARTS = st.builds(
    lambda trial, attempt: start(trial=trial, attempt=attempt), st.integers(0, NUM - 1), st.integers(0, 2)
)
OTHERS = st.sampled_from(
    [
        {"kind": "beat"},
        report(trial=0, attempt=0, step=1, metrics={"m": 1.0}),
        notice(signal="S", state="R", action="A"),
    ]
)
FILES = st.lists(st.lists(STARTS | OUTCOMES | ENDS | OTHERS, max_size=6), min_size=1, max_size=3)


@st.composite
def views_of_a_file(draw: st.DrawFn, content: bytes, steps: int) -> list[bytes]:
    """What a network file system shows of a file over time: more and more of it, with zeros that become data late."""
    lengths = sorted(draw(st.integers(0, len(content))) for _ in range(steps))
    first = draw(st.integers(0, len(content)))
    last = min(len(content), first + draw(st.integers(0, 200)))
    healed = draw(st.integers(0, steps))
    holed = content[:first] + bytes(last - first) + content[last:]
    return [(content if step >= healed else holed)[:length] for step, length in enumerate(lengths)]


def shows(files: list[list[JsonObject]], data: st.DataObject) -> dict[str, list[bytes]]:
    """Writer -> what is seen of its file, four times; whole in the end."""
    whole = {
        name: b"".join(map(checked, (writer(name, slots=2), *lines)))
        for name, lines in zip(WRITERS, files, strict=False)
    }
    return {name: [*data.draw(views_of_a_file(content, 3)), content] for name, content in whole.items()}
