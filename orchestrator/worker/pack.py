"""The worker that trains packs: several trials as one, each with its own reports, outcome and model.

Trials whose networks can't be stacked are trained apart, part after part: whose first trial comes first. A part is the
same whatever became of the others, so its trials end with the same bits however often a pack was interrupted.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import cast

import torch

from orchestrator.config.plan import PlannedTrial as Planned
from orchestrator.config.program import LoadedJob
from orchestrator.config.signatures import split
from orchestrator.config.spec import SweepSpec
from orchestrator.core.atomic import JsonObject
from orchestrator.core.channel import Channel, Send, say
from orchestrator.core.messages import AttemptEnded, Cause, Message, Outcome, PackDone, Progress, Resumed, RunTrial
from orchestrator.core.paths import SweepPaths
from orchestrator.results.objective import Diverged, NoResult
from orchestrator.training.checkpoint.files import Checkpoint, Checkpoints, Identity
from orchestrator.training.checkpoint.manager import CheckpointManager, Interrupted
from orchestrator.training.packing.members import Unlike, Unpackable
from orchestrator.training.packing.pack import Member, PackedTrial, seed_of
from orchestrator.training.trial import Result
from orchestrator.worker.single import TrialWorker, check_devices, described, loaded, reported, reset

__all__ = ["PackWorker", "server"]

Part = tuple[Planned, ...]


class PackWorker(TrialWorker):
    """Trains the packs that come over a channel.

    Args:
        paths: the sweep.
        spec: its spec.
        job: the user's job.
        channel: to the supervisor.
    """

    def __init__(self, paths: SweepPaths, spec: SweepSpec, job: LoadedJob, channel: Channel) -> None:
        super().__init__(paths, spec, job, channel)
        self._found: dict[int, Checkpoint | None] = {}
        self._heard: list[str] = []

    def _done(self, assigned: RunTrial, send: Send) -> Message:
        check_devices(self._spec.launch.gpus)
        self._found.clear()
        self._heard.clear()
        parts = [tuple(Planned(**one) for one in cast("list[JsonObject]", assigned.pack))]  # type: ignore[arg-type]
        whole, failed = parts[0], ""
        while parts:
            part = parts.pop(0)
            if not self._open(part, assigned):
                continue
            try:
                failed = self._part_tried(part, assigned, send) or failed
            except Unlike as unlike:
                say(f"--- {len(part)} trials train in {len(unlike.groups)} parts: {unlike.reason}")
                parts[:0] = [tuple(part[place] for place in group) for group in unlike.groups]
            except Interrupted as interrupted:
                answer = interrupted.answer
                if part != whole and isinstance(answer, AttemptEnded):
                    raise Interrupted(replace(answer, step=None)) from None  # the step is of this part alone
                raise
        return AttemptEnded(cause=Cause.ERROR, detail=failed) if failed else PackDone()

    @staticmethod
    def _open(part: Part, assigned: RunTrial) -> list[int]:
        """Return the trials of a part that have no outcome."""
        return [planned.index for planned in part if planned.index in assigned.open]

    def _part_tried(self, part: Part, assigned: RunTrial, send: Send) -> str:
        """As `_part_done`; an error of the job in one part is told as well, and costs the others nothing."""
        try:
            return self._part_done(part, assigned, send)
        except (Interrupted, Unlike, MemoryError, torch.OutOfMemoryError, OSError):
            raise
        except Exception as error:
            say(traceback.format_exc())
            return described(error)

    def _part_done(self, part: Part, assigned: RunTrial, send: Send) -> str:
        """Train a part and tell what its trials came to; returns why one of them has no result, if one has none.

        The best come first: a model that doesn't rank among those of the part isn't written, and the outcomes that it
        is beaten by must be there whenever this process may be killed.
        """
        pack = self._trained(part, assigned, send)
        open_, failed, found = self._open(part, assigned), "", dict[int, Result]()
        own = pack.bar(assigned.bar, self._spec.reduce.top, open_)
        for member in pack.members:
            if member.index in open_:
                try:
                    found[member.index] = member.result(own)
                except NoResult as error:
                    failed = str(error)
        for index in sorted(found, key=lambda index: (*self._rank(found[index]), index)):
            answer = self._kept(index, found[index])
            if not isinstance(answer, Outcome):
                raise Interrupted(answer)
            send(replace(answer, trial=index))
        return failed

    def _rank(self, result: Result) -> tuple[bool, float]:
        """What sorts a result before worse ones."""
        value = result.payload.get("value")
        if not isinstance(value, float):
            return True, 0.0
        return False, value if self._spec.metric.goal == "minimize" else -value

    def _hears_again(self) -> list[str]:
        """The words of notices, also for the part after this one, if this one has no safe point left for them."""
        words = self._hears()
        self._heard += words
        return words

    def _trained(self, part: Part, assigned: RunTrial, send: Send) -> PackedTrial:
        self._listen()
        self._words, self._heard = [*self._heard, *self._words], []
        self._noticed = bool(self._words)
        reset(seed_of(one.seed for one in part), self._spec.launch.cpus, self._cwd, self._environment, self._settings)
        keeper = self._keeper = self._keeper_of(part, assigned, send)
        try:
            pack, for_train = self._pack(part, assigned, send, keeper)
            with contextlib.suppress(Diverged), warnings.catch_warnings():
                self._run(pack, for_train)
            pack.check_end()
            del self._found[part[0].index]
            return pack
        finally:
            self._keeper, self._has_saved = None, keeper.has_saved
            keeper.close()

    def _keeper_of(self, part: Part, assigned: RunTrial, send: Send) -> CheckpointManager:
        lead, together = part[0].index, list(self._open(part, assigned))
        whose = Identity(sweep=self._paths.id, trial=lead)
        checkpoints = Checkpoints(self._paths.checkpoint(lead), whose, assigned.writer, say=say)
        return CheckpointManager(
            checkpoints,
            self._spec.checkpoint,
            hears=self._hears_again,
            tells=lambda told: send(_of_pack(told, lead, together)),
            say=say,
        )

    def _pack(
        self, part: Part, assigned: RunTrial, send: Send, keeper: CheckpointManager
    ) -> tuple[PackedTrial, JsonObject]:
        """The pack of a part, as far as it was done before, and the parameters that `train` takes."""
        taken = [split(one.params, self._job.build, self._job.train) for one in part]
        if any(for_train != taken[0][1] for _, for_train in taken):
            raise Unpackable("train takes parameters that are not equal for all trials of a pack")
        attempt, lead = assigned.attempt, part[0].index
        if lead not in self._found:
            self._found[lead] = keeper.newest() if attempt else None
        members = [
            Member(
                index=one.index,
                params=one.params,
                seed=one.seed,
                emit=partial(_emit, send, one.index),
                build_params=for_build,
            )
            for one, (for_build, _) in zip(part, taken, strict=True)
        ]
        pack = PackedTrial(
            members,
            metric=self._spec.metric,
            attempt=attempt,
            asked_to_stop=self._is_asked_to_stop,
            keeper=keeper,
            found=self._found[lead],
        )
        return pack, taken[0][1]


def _emit(send: Send, trial: int, report: JsonObject) -> None:
    send(reported(report, trial))


def _of_pack(message: Message, lead: int, together: list[int]) -> Message:
    """The message of a keeper, for all trials of a part."""
    if isinstance(message, Resumed):
        return replace(message, trial=lead, together=together)
    return replace(message, trial=lead) if isinstance(message, Progress) else message


def server(paths: SweepPaths, spec: SweepSpec) -> Callable[[Channel], None]:
    """Import the job; returns what serves its packs in a worker process."""
    job = loaded(paths, spec)
    return lambda channel: PackWorker(paths, spec, job, channel).serve()
