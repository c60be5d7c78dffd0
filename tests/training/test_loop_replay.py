"""Where a job is in its loops, and how one that runs again from its top comes back there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.training.resume import Astray, Loop, LoopReplay, Place


class Job:
    """A job on a course, which trains, reports, and may stop at its n-th safe point."""

    def __init__(self, place: Place | None = None, *, steps: int = 0, stop_at: int | None = None) -> None:
        self.steps = steps
        self.course = LoopReplay(lambda: self.steps, place)
        self.stop_at = stop_at
        self.num_safe = 0
        self.log: list[object] = []
        self.left: Place | None = None
        self._goal = steps

    def loop(self, num: int, *, opens: bool) -> Iterator[int]:
        """What `trial.epochs` and `trial.batches` do."""
        course, loop = self.course, self.course.begin(opens=opens)
        try:
            first = course.first(loop)
            if first is None:
                return
            if course.is_goal(loop):
                course.arrive()
            for item in range(first, num):
                course.give(loop)
                yield item
                course.take(loop)
                self._pass(loop)
        finally:
            course.end(loop)

    def _pass(self, loop: Loop) -> None:
        if self.course.is_safe(loop):
            self.num_safe += 1
            if self.num_safe == self.stop_at:
                self.left = self.course.place(loop)
                raise Stopped

    def train(self, what: object) -> None:
        if not self.course.is_under_way:  # a loop that trained is not run again on the way
            self.steps += 1
            self.log.append(what)

    def report(self, make: Callable[[], object]) -> object:
        if self.course.is_under_way:
            return self.course.answer()
        answer = make()
        self.course.note(answer)
        self.log.append(("report", answer))
        return answer


class Stopped(Exception):
    pass


def usual(job: Job) -> None:
    """A look at the data, epochs of two loops with a report between, and a loop after them."""
    for _ in job.loop(2, opens=False):
        pass
    mean = job.report(lambda: "mean")
    for epoch in job.loop(3, opens=True):
        for batch in job.loop(2, opens=False):
            job.train((epoch, "a", batch, mean))
        middle = job.report(lambda epoch=epoch: f"middle of {epoch}")
        for batch in job.loop(2, opens=False):
            job.train((epoch, "b", batch, middle))
        job.report(lambda epoch=epoch: f"end of {epoch}")
    for batch in job.loop(2, opens=False):
        job.train(("after", batch))


def outcome(job: Job, body: Callable[[Job], None]) -> list[object]:
    try:
        body(job)
    except Stopped:
        assert job.left is not None
    return job.log


def test_a_job_that_stops_at_any_safe_point_goes_on_as_if_it_had_not() -> None:
    undisturbed = outcome(calm := Job(), usual)
    assert calm.num_safe == 17, "after each batch, and after each epoch"
    for stop_at in range(1, calm.num_safe + 1):
        first = Job(stop_at=stop_at)
        before = [*outcome(first, usual)]
        second = Job(orjson_round_trip(first.left), steps=first.steps)
        after = outcome(second, usual)
        assert before + after == undisturbed
        assert not second.course.is_under_way


def orjson_round_trip(place: Place | None) -> Place:
    """A place is plain values; of a checkpoint it comes back with whole numbers as keys."""
    found: Any = orjson.loads(orjson.dumps(place, option=orjson.OPT_NON_STR_KEYS))
    for frame in found:
        frame["open"] = {int(ordinal): num for ordinal, num in frame["open"].items()}
    return found  # type: ignore[no-any-return]


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=4), st.integers(1, 3), st.data())
def test_any_row_of_loops_in_epochs_goes_on_from_any_safe_point(
    loops: list[tuple[int, bool]], num_epochs: int, data: st.DataObject
) -> None:
    def body(job: Job) -> None:
        for epoch in job.loop(num_epochs, opens=True):
            for number, (num, reports) in enumerate(loops):
                for batch in job.loop(num, opens=False):
                    job.train((epoch, number, batch))
                if reports:
                    job.report(lambda where=(epoch, number): f"at {where}")

    undisturbed = outcome(calm := Job(), body)
    first = Job(stop_at=data.draw(st.integers(1, calm.num_safe)))
    before = [*outcome(first, body)]
    assert before + outcome(Job(orjson_round_trip(first.left), steps=first.steps), body) == undisturbed


def test_a_loop_that_trains_nothing_is_no_place_to_go_on_from() -> None:
    def body(job: Job) -> None:
        for _ in job.loop(3, opens=False):
            pass

    outcome(job := Job(), body)
    assert job.num_safe == 0


def test_inside_of_another_loop_s_item_is_no_place_to_go_on_from() -> None:
    def body(job: Job) -> None:
        for batch in job.loop(2, opens=False):
            for inner in job.loop(3, opens=False):
                job.train((batch, inner))

    outcome(job := Job(), body)
    assert job.num_safe == 2, "after each item of the outer loop, and of the inner one never"


def test_a_loop_whose_items_are_not_ours_is_no_place_to_go_on_from_nor_is_any_within() -> None:
    job = Job()
    epochs = job.course.begin(opens=True)
    job.course.give(epochs)
    loader = job.course.begin(opens=False, is_own=False)
    job.course.give(loader)
    job.steps += 1
    assert not job.course.is_safe(loader)
    job.course.end(loader)
    job.course.take(epochs)
    assert job.course.is_safe(epochs)


def test_a_job_that_reports_more_on_the_way_than_before_is_astray() -> None:
    first = Job(stop_at=3)
    outcome(first, usual)
    second = Job(first.left, steps=first.steps)

    def more(job: Job) -> None:
        for _ in job.loop(2, opens=False):
            pass
        job.report(lambda: "mean")
        job.report(lambda: "another")

    with pytest.raises(Astray, match=r"^it reports more often on the way than it did before$"):
        more(second)


def test_a_job_of_many_reports_forgets_the_answers_that_nobody_will_ask_for() -> None:
    job = Job()
    loop = job.course.begin(opens=False)
    for _ in range(5000):
        job.course.give(loop)
        job.steps += 1
        job.report(lambda: "x")
        job.course.take(loop)
    assert len(job.course._frames[0].answers) < 2000
    [entry] = job.course.place(loop)
    assert entry["answers"] == []


def test_whether_a_loop_has_trained_is_told_at_its_end() -> None:
    job = Job()
    idle, busy = job.course.begin(opens=False), job.course.begin(opens=False)
    assert not job.course.has_trained(busy)
    job.steps += 1
    assert job.course.end(busy)
    job = Job()
    idle = job.course.begin(opens=False)
    assert not job.course.end(idle)
    assert not job.course.end(idle), "to end it again is no harm"
