"""An interrupted trial ends with the bits of an undisturbed one, wherever it is interrupted."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from sweeps import no_room_after
from torch.utils.data import DataLoader, Dataset, TensorDataset

import orchestrator as orc
from orchestrator.config.spec import CheckpointOptions, Metric
from orchestrator.core.atomic import JsonObject
from orchestrator.core.messages import AttemptEnded, Cause, Message, Resumed, Superseded, Unable
from orchestrator.results.objective import Diverged
from orchestrator.training.checkpoint.files import Checkpoints, Identity
from orchestrator.training.checkpoint.manager import LEAVE, SAVE, STAY, CheckpointManager, Interrupted, left
from orchestrator.training.trial import Result, Trial, stream

WRITER = "0123456789abcdef" * 2
Job = Callable[[Trial], object]

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(44, 6, generator=GENERATOR)
Y = X[:, :1].sin() + 0.1 * torch.randn(44, 1, generator=GENERATOR)


class Process:
    """A worker process that runs one trial, and hears a notice at its n-th safe point."""

    def __init__(
        self,
        folder: Path,
        job: Job,
        *,
        metric: Metric | None = None,
        every: str = "1 steps",
        hears: Callable[[], list[str]] = list,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.clock = clock
        self.job = job
        self.metric = metric or Metric()
        self.every = every
        self.hears = hears
        self.reports: list[JsonObject] = []
        self.said: list[str] = []
        self.told: list[Message] = []

    def run(self, attempt: int = 0, leave_after: int | None = None) -> Result | Message:
        """The result; what the attempt answers if it left."""
        left = [leave_after]

        def hears() -> list[str]:
            if left[0] is None:
                return self.hears()
            left[0] -= 1
            return [LEAVE] if left[0] < 0 else []

        torch.manual_seed(stream(5, "global"))  # as a worker does before each trial
        checkpoints = Checkpoints(self.folder, Identity(sweep="s", trial=0), WRITER, say=self.said.append)
        keeper = CheckpointManager(
            checkpoints,
            CheckpointOptions(every=self.every),
            hears=hears,
            tells=self.told.append,
            say=self.said.append,
            clock=self.clock,
        )
        try:
            return self._result(keeper, attempt)
        except Interrupted as interrupted:
            return interrupted.answer
        finally:
            keeper.close()

    def _result(self, keeper: CheckpointManager, attempt: int) -> Result:
        trial = Trial(
            index=0,
            params={},
            seed=5,
            metric=self.metric,
            emit=self.reports.append,
            attempt=attempt,
            device=torch.device("cpu"),
            keeper=keeper,
            found=keeper.newest() if attempt else None,
        )
        with contextlib.suppress(Diverged):
            self.job(trial)
        return trial.result(None)


def check_everywhere(folder: Path, job: Job, *, steps: set[int], **options: Any) -> None:
    """Leave at each safe point in turn, and go on in a new process: the same payload, model and reports."""
    process = Process(folder / "calm", job, **options)
    calm, reports = process.run(), process.reports
    assert isinstance(calm, Result), calm
    assert calm.model is not None
    left: set[int] = set()
    for place in itertools.count():
        process = Process(folder / f"at-{place}", job, **options)
        answer = process.run(leave_after=place)
        if isinstance(answer, Result):  # there was no safe point after that any more
            break
        assert isinstance(answer, AttemptEnded)
        assert (answer.cause, answer.detail) == (Cause.PREEMPTED, f"saved at step {answer.step}, to go on later")
        assert answer.step is not None
        left.add(answer.step)
        found = process.run(attempt=1)
        assert isinstance(found, Result), found
        assert (found.payload, found.model) == (calm.payload, calm.model), place
        assert Resumed(step=answer.step) in process.told
        assert process.reports == reports  # nothing is reported twice
    assert left == steps


# Jobs


def build(*, width: int = 7) -> orc.State:
    net = torch.nn.Sequential(
        torch.nn.Linear(6, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.5), torch.nn.Linear(width, 1)
    )
    opt = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    return orc.State(net=net, opt=opt, schedule=torch.optim.lr_scheduler.StepLR(opt, 2, 0.5))


def losses(net: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    x, y = batch
    error = (net(x) - y).square().mean(dim=1)
    return {"loss": error, "far": (error > 0.5).float()}


def usual(trial: Trial) -> None:
    trial.build(build)
    for _ in trial.epochs(3):
        for batch in trial.batches((X, Y), 8):
            trial.step(losses, batch)
        trial.state.others["schedule"].step()  # type: ignore[union-attr]
        trial.validate(losses, (X, Y))


class Noisy(Dataset[Any]):
    """Samples that are augmented by the global generator."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return X[index] + 0.1 * torch.randn(6), Y[index]


def augmented(trial: Trial) -> None:
    trial.build(build)
    for _ in trial.epochs(2):
        for batch in trial.batches(Noisy(), 8):
            trial.step(losses, batch)
        trial.validate(losses, (X, Y))


def pairs(trial: Trial, batch_size: int, **options: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return cast("Iterator[tuple[torch.Tensor, torch.Tensor]]", trial.batches((X, Y), batch_size, **options))


def phases(trial: Trial) -> None:
    """A look at the data, two loops an epoch with a report between, and a loop after all epochs."""
    total = 0.0
    for x, _ in pairs(trial, 8, shuffle=False):
        total += x.sum().item()
    mean = total / X.numel()
    trial.build(build)
    trial.report(mean=mean)
    for _ in trial.epochs(2):
        for x, y in pairs(trial, 16):
            trial.step(losses, (x - mean, y))
        first = trial.validate(losses, (X, Y), prefix="mid_")
        for batch in trial.batches((X, Y), 22):
            trial.step(losses, batch)
        total = 0.0
        for batch in trial.batches((X, Y), 11, shuffle=False):
            total += losses(trial.net, batch)["loss"].sum().item()
        trial.report(total=total, mid=first["mid_loss"], spread=trial.summaries["mid_far"].compute().mean or 0.0)
    for batch in trial.batches((X, Y), 22, shuffle=False):
        trial.step(losses, batch)
    trial.validate(losses, (X, Y))


def own_loop(trial: Trial) -> None:
    """Steps that the job makes itself, of two batches each, and parts that go on from epoch to epoch."""
    torch.manual_seed(trial.seed)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Dropout(0.3), torch.nn.Linear(5, 1))
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    average = torch.optim.swa_utils.AveragedModel(net)
    trial.prepare(net=net, opt=opt, average=average)
    memory: dict[str, Any] = trial.extra_state
    memory.setdefault("best", [])
    for _ in trial.epochs(3):
        for x, y in pairs(trial, 8):
            net.train()
            (net(x) - y).square().mean().backward()
            memory["seen"] = memory.get("seen", 0) + 1
            if memory["seen"] % 2 == 0:
                opt.step()
                opt.zero_grad()
                average.update_parameters(net)
        net.eval()
        memory["best"] = [*memory["best"], (average(X) - Y).square().mean().item()]
        trial.report(val_loss=memory["best"][-1], least=min(memory["best"]))


def without_epochs(trial: Trial) -> None:
    trial.build(build)
    for number in range(2):
        for one, other in zip(trial.batches((X, Y), 8), trial.batches((X, Y), 8, shuffle=False), strict=True):
            trial.step(losses, one)
            trial.step(losses, other)
        trial.report(val_loss=trial.net(X).sum().item(), number=number)


def nested(trial: Trial) -> None:
    """Cycles of epochs, and a loop in the body of another one: only the outer one is a place to go on from."""
    trial.build(build)
    for _ in trial.epochs(2):
        for _ in trial.epochs(2):
            for batch in trial.batches((X, Y), 22):
                for other in trial.batches((X, Y), 22, shuffle=False):
                    trial.step(losses, other)
                trial.step(losses, batch)
    trial.validate(losses, (X, Y))


def stops_early(trial: Trial) -> None:
    trial.build(build)
    for epoch in trial.epochs(9):
        for batch in trial.batches((X, Y), 8, shuffle=epoch > 0):
            if epoch == 0 and trial.num_steps == 2:
                break
            trial.step(losses, batch)
        trial.validate(losses, (X, Y))
        if epoch == 2:
            break
    for batch in trial.batches((X, Y), 22):
        trial.step(losses, batch)
    trial.validate(losses, (X, Y))


@pytest.mark.parametrize(
    ("job", "steps"),
    [
        (usual, {*range(1, 18)}),
        (augmented, {*range(1, 12)}),
        (phases, {1, 2, 4, 5, 6, 7, 9, 11}),
        (own_loop, {*range(1, 18)} - {1, 7, 13}),
        (without_epochs, {*range(2, 24, 2)} - {12}),
        (nested, {3, 6, 9, 12, 15, 18, 21}),
        (stops_early, {*range(1, 14), 15}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_trial_that_leaves_at_any_safe_point_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path: Path, job: Job, steps: set[int]
) -> None:
    check_everywhere(tmp_path, job, steps=steps)


@pytest.mark.parametrize("at", ["last", "best"])
@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_the_report_that_counts_and_its_weights_go_on(tmp_path: Path, at: Any, goal: Any) -> None:
    check_everywhere(tmp_path, usual, steps={*range(1, 18)}, metric=Metric(at=at, goal=goal))


# Which state counts


def test_it_goes_on_in_the_newest_state_after_a_kill_and_repeats_what_came_after(tmp_path: Path) -> None:
    """What an attempt does after its last save is done again, and counts once."""
    calm = Process(tmp_path / "calm", usual)
    expected = calm.run()
    for kill_after in range(2, 18, 3):
        process = Process(tmp_path / str(kill_after), killed(usual, kill_after), every="4 steps")
        with pytest.raises(KeyboardInterrupt):
            process.run()
        process.job = usual
        assert process.run(attempt=1) == expected
        (step,) = [told.step for told in process.told if isinstance(told, Resumed)]
        assert (0 < step < kill_after) if kill_after > 4 else step == 0
        assert last(process.reports) == last(calm.reports)


def killed(job: Job, after: int) -> Job:
    """The job, ended in the middle of a step."""

    def fatal(net: torch.nn.Module, batch: Any, *, seen: list[int] = [0]) -> Any:  # noqa: B006  # it is to be kept
        seen[0] += net.training
        if seen[0] == after:
            raise KeyboardInterrupt
        return losses(net, batch)

    def train(trial: Trial) -> None:
        trial.build(build)
        for _ in trial.epochs(3):
            for batch in trial.batches((X, Y), 8):
                trial.step(fatal, batch)
            trial.state.others["schedule"].step()  # type: ignore[union-attr]
            trial.validate(losses, (X, Y))

    return train


def last(reports: list[JsonObject]) -> dict[Any, JsonObject]:
    """What counts of reports: the last of each step."""
    return {one["step"]: one for one in reports}


def test_an_attempt_that_finds_nothing_begins_anew_and_says_so(tmp_path: Path) -> None:
    expected = Process(tmp_path / "calm", usual).run()
    process = Process(tmp_path / "none", usual)
    assert process.run(attempt=3) == expected
    assert process.told[0] == Resumed(step=0)
    assert process.said == ["--- begins anew: no checkpoint was left"]


def test_a_newest_state_that_is_damaged_gives_way_to_the_one_before(tmp_path: Path) -> None:
    expected = Process(tmp_path / "calm", usual).run()
    process = Process(tmp_path / "damaged", usual)
    process.run(leave_after=9)
    newest, before = sorted((tmp_path / "damaged").iterdir(), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-3])
    assert process.run(attempt=1) == expected
    assert Resumed(step=int(before.name.partition("-")[0])) in process.told
    assert any(newest.name in line and "refused" in line for line in process.said)


# Data loaders


def loaded(trial: Trial) -> None:
    generator = torch.Generator().manual_seed(trial.seed)
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, generator=generator)
    trial.build(build)
    for _ in trial.epochs(4):
        for batch in trial.batches(loader):
            trial.step(losses, batch)
        trial.validate(losses, (X, Y))


def loaded_globally(trial: Trial) -> None:
    trial.build(build)
    for _ in trial.epochs(4):
        for batch in trial.batches(DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)):
            trial.step(losses, batch)
        trial.validate(losses, (X, Y))


@pytest.mark.parametrize("job", [loaded, loaded_globally], ids=lambda job: job.__name__)
def test_a_trial_with_a_data_loader_goes_on_at_epochs(tmp_path: Path, job: Job) -> None:
    check_everywhere(tmp_path, job, steps={6, 12, 18})
    process = Process(tmp_path / "said", job)
    process.run()
    assert process.said == [
        "--- this trial is saved at the ends of its epochs only, since a DataLoader gives its batches"
    ]


def test_a_sweep_file_can_ask_for_whole_epochs(tmp_path: Path) -> None:
    check_everywhere(tmp_path, usual, steps={6, 12}, every="epoch")
    process = Process(tmp_path / "two", usual, every="2 epochs")
    process.run()
    assert [int(path.name.partition("-")[0]) for path in (tmp_path / "two").iterdir()] == [12]


# Trials that can't be saved


def without_state(trial: Trial) -> None:
    for epoch in trial.epochs(3):
        for _ in trial.batches((X, Y), 8):
            pass
        trial.report(val_loss=epoch)


class Stubborn:
    def state_dict(self) -> dict[str, object]:
        return {"lock": object()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        raise AssertionError


def unsaveable(trial: Trial) -> None:
    state = build()
    trial.prepare(net=state.net, opt=state.opt, stubborn=Stubborn())
    for _ in trial.epochs(2):
        for batch in trial.batches((X, Y), 8):
            trial.step(losses, batch)
        trial.validate(losses, (X, Y))


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (without_state, ""),
        (unsaveable, "--- no checkpoints: if this trial is interrupted, it begins anew: state['parts']['stubborn']"),
        (lambda trial: trial.report(val_loss=1.0), ""),
    ],
)
def test_a_trial_that_cannot_be_saved_runs_to_its_end_whatever_it_is_asked(tmp_path: Path, job: Job, says: str) -> None:
    process = Process(tmp_path / "it", job)
    found = process.run(leave_after=0)
    assert isinstance(found, Result)
    assert [line[: len(says)] for line in process.said] == ([says] if says else [])
    assert not (tmp_path / "it").exists()
    again = Process(tmp_path / "it", job).run(attempt=1)
    assert isinstance(again, Result)
    assert again.payload == found.payload


def test_with_checkpoints_off_nothing_is_saved_and_a_notice_changes_nothing(tmp_path: Path) -> None:
    process = Process(tmp_path / "off", usual, every="off")
    assert isinstance(process.run(leave_after=3), Result)
    assert not (tmp_path / "off").exists()


def test_a_trial_of_a_moment_saves_nothing(tmp_path: Path) -> None:
    process = Process(tmp_path / "short", usual, every="auto", clock=lambda: 0.0)
    assert isinstance(process.run(), Result)
    assert not (tmp_path / "short").exists()


# Jobs that change their mind


def other_width(trial: Trial) -> None:
    trial.build(lambda: build(width=5))
    for _ in trial.epochs(3):
        for batch in trial.batches((X, Y), 8):
            trial.step(losses, batch)


def no_loops(trial: Trial) -> None:
    trial.build(build)


def no_state(trial: Trial) -> None:
    list(itertools.chain.from_iterable(trial.batches((X, Y), 8) for _ in trial.epochs(3)))


def more_reports(trial: Trial) -> None:
    trial.report(acc=1.0)
    usual(trial)


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (other_width, "the checkpoint doesn't fit net['0.weight']: it holds torch.float32 of shape (7, 6)"),
        (no_loops, "it has ended before it came back to where it was to go on"),
        (no_state, "it has called neither trial.build nor trial.prepare on its way"),
        (more_reports, "it reports more often on the way than it did before"),
    ],
)
def test_a_job_that_is_another_than_before_is_refused_by_name_and_never_begins_anew_by_itself(
    tmp_path: Path, job: Job, text: str
) -> None:
    Process(tmp_path / "it", usual).run(leave_after=8)
    answer = Process(tmp_path / "it", job).run(attempt=1)
    assert isinstance(answer, AttemptEnded)
    assert answer.cause == "error"
    assert answer.detail.startswith(f"it can't go on from its checkpoint: {text}")
    assert "`orc resume --failed`" in answer.detail


# Notices


def heard(*words: list[str]) -> Callable[[], list[str]]:
    """Hears these, a list a look, and then nothing any more."""
    left = iter(words)
    return lambda: next(left, [])


def saves(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[0]) for path in folder.glob("*.ckpt"))


@pytest.mark.parametrize("words", [([SAVE, SAVE, STAY], [SAVE, STAY]), ([SAVE], [], [], [STAY, SAVE], [STAY])])
def test_a_notice_to_save_saves_once_and_the_trial_goes_on(tmp_path: Path, words: tuple[list[str], ...]) -> None:
    process = Process(tmp_path / "it", usual, every="9999 steps", hears=heard(*words))
    assert process.run() == Process(tmp_path / "calm", usual).run()
    assert process.said == ["--- saved at step 1 after a notice, and goes on"]
    assert saves(tmp_path / "it") == [1]


@pytest.mark.parametrize("words", [([], [SAVE, LEAVE]), ([], [SAVE], [], [], [LEAVE]), ([], [LEAVE], [SAVE, LEAVE])])
def test_a_notice_that_turns_out_to_mean_leave_saves_once(tmp_path: Path, words: tuple[list[str], ...]) -> None:
    process = Process(tmp_path / "it", usual, every="9999 steps", hears=heard(*words))
    answer = process.run()
    assert answer == AttemptEnded(cause=Cause.PREEMPTED, detail="saved at step 2, to go on later", step=2)
    assert saves(tmp_path / "it") == [2]


def test_a_notice_whose_reason_takes_long_holds_the_training_up_no_longer_than_that(tmp_path: Path) -> None:
    process = Process(tmp_path / "it", usual, every="9999 steps", hears=heard([SAVE], *[[]] * 1000))
    assert isinstance(process.run(), Result)
    assert saves(tmp_path / "it") == [1]


def test_a_notice_in_the_first_moments_leaves_without_a_checkpoint(tmp_path: Path) -> None:
    def train(trial: Trial) -> None:
        trial.build(build)
        for batch in trial.batches((X, Y), 8):
            with torch.no_grad():
                trial.net[0].weight.add_(losses(trial.net, batch)["loss"].mean())  # type: ignore[index,operator,union-attr]

    process = Process(tmp_path / "it", train, hears=heard([LEAVE]))
    assert process.run() == left(1)


# Disks and folders


def test_fault_18_a_trial_that_cannot_be_saved_for_want_of_room_goes_on_and_says_so_once(tmp_path: Path) -> None:
    expected = Process(tmp_path / "calm", usual).run()
    process = Process(tmp_path / "full", usual, every="2 steps")
    with no_room_after(1000):
        assert process.run() == expected
    (line,) = process.said
    assert line.startswith("--- a checkpoint could not be written, and the trial goes on: ")
    assert str(tmp_path / "full") in line
    assert list((tmp_path / "full").iterdir()) == []


def test_fault_18_without_room_at_a_notice_the_path_is_named_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    expected = Process(tmp_path / "calm", usual).run()
    process = Process(tmp_path / "full", usual, every="9999 steps", hears=heard([], [], [SAVE, STAY], [], [], [LEAVE]))
    process.job = job = full_after(usual, 4)
    answer = process.run()
    assert isinstance(answer, Unable)
    assert str(tmp_path / "full" / "000000000006") in answer.reason
    assert saves(tmp_path / "full") == [3]
    del job
    process.job, process.hears = usual, list
    assert process.run(attempt=1) == expected
    assert Resumed(step=3) in process.told


def full_after(job: Job, steps: int) -> Job:
    """The job, on a disk that is full after so many steps."""

    def train(trial: Trial) -> None:
        trial.build(build)
        with contextlib.ExitStack() as stack:
            for _ in trial.epochs(3):
                for batch in trial.batches((X, Y), 8):
                    trial.step(losses, batch)
                    if trial.num_steps == steps:
                        stack.enter_context(no_room_after(1000))

    del job
    return train


@pytest.mark.parametrize("every", ["1 steps", "9999 steps"])
def test_a_worker_whose_folder_is_gone_stops_quietly(tmp_path: Path, every: str) -> None:
    folder = tmp_path / "it"

    def train(trial: Trial) -> None:
        trial.build(build)
        for batch in trial.batches((X, Y), 1):
            trial.step(losses_of_one, batch)
            if trial.num_steps == 9:
                folder.rename(tmp_path / "gone")  # at once, whatever the thread that saves is doing

    process = Process(folder, train, every=every, hears=heard([SAVE, STAY], *[[]] * 20, [LEAVE]))
    answer = process.run()
    assert isinstance(answer, Superseded)


def losses_of_one(net: torch.nn.Module, batch: Any) -> torch.Tensor:
    net.eval()  # one sample has no variance
    x, y = batch
    return (net(x) - y).square().mean(dim=1)
