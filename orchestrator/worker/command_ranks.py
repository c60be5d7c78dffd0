"""A `command:` of several ranks: one process each, with the variables that torchrun sets.

    RANK  LOCAL_RANK  WORLD_SIZE  LOCAL_WORLD_SIZE  GROUP_RANK  GROUP_WORLD_SIZE  ROLE_NAME  ROLE_RANK  ROLE_WORLD_SIZE
    MASTER_ADDR  MASTER_PORT  TORCHELASTIC_RUN_ID  TORCHELASTIC_RESTART_COUNT  TORCHELASTIC_MAX_RESTARTS
    TORCHELASTIC_USE_AGENT_STORE=True

They are those of `torch.distributed.elastic.agent.server.local_elastic_agent`, so that `init_process_group` with its
defaults, and whatever looks for torchrun, find what they look for. The store listens in the worker that runs rank 0's
program, on a port which that worker has bound itself: no port is guessed, and none is free for a moment in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its stubs

from orchestrator.config.spec import Launch, Retries, SweepSpec
from orchestrator.core.channel import Channel, Send, say
from orchestrator.core.messages import AttemptEnded, Cause, Message, RankDone, RankStarted, RunTrial
from orchestrator.core.paths import SweepPaths
from orchestrator.distributed.rendezvous import LOOPBACK, RendezvousFailed, RendezvousRequest, hosted
from orchestrator.worker.command import CommandRunner, attempt_folder, prepared
from orchestrator.worker.command_reports import Reports

__all__ = ["RankRunner", "server", "variables"]

_JOIN_S = 60.0
"""How long the others wait for rank 0 to say where the store is, at least: it may copy checkpoints before."""
_FAR_JOIN_S = 180.0
"""The same on several nodes: a shared file system may show a new file to others after a minute."""


class RankRunner(CommandRunner):
    """Runs the program of one rank, and stays until the supervisor ends it: the others may still need the store.

    Args:
        paths: the sweep.
        spec: its spec.
        channel: to the supervisor.
        folder: for files of attempts, which someone else removes in the end.
        meeting: where rank 0 says how to reach the store.
    """

    _ENDS_REST = False  # it may serve other ranks

    def __init__(self, paths: SweepPaths, spec: SweepSpec, channel: Channel, folder: Path, meeting: Path) -> None:
        super().__init__(paths, spec, channel, folder)
        self._meeting = meeting
        self._rank = 0
        self._tells: Send = channel.send
        self._store: TCPStore | None = None

    def _attempt(self, assigned: RunTrial, send: Send) -> Message:
        self._rank, self._tells = assigned.rank, send
        try:
            answer = super()._attempt(assigned, send)
        except RendezvousFailed as error:
            say(str(error))
            answer = AttemptEnded(cause=Cause.SIGNAL, detail=str(error), peer=self._rank > 0)
        # What ends after a notice is no reason to end the others, which may be saving.
        return replace(answer, noticed=True) if self._noticed and isinstance(answer, AttemptEnded) else answer

    def _wait(self, reports: Reports) -> None:
        assert self._process is not None
        self._tells(RankStarted(pid=self._process.pid))
        super()._wait(reports)

    def _reports(self, assigned: RunTrial, folder: Path, send: Send) -> Reports:
        if self._rank == 0:
            return super()._reports(assigned, folder, send)
        return Reports(folder / "report.jsonl", self._spec, send)

    def _outcome(self, reports: Reports) -> Message:
        return super()._outcome(reports) if self._rank == 0 else RankDone()

    def _checkpoints(self, assigned: RunTrial) -> Path:
        """One for all ranks, which rank 0 makes before it says where the store is."""
        if self._rank == 0:
            return super()._checkpoints(assigned)
        return attempt_folder(self._paths.checkpoint(assigned.index), assigned.attempt)

    def _environment(self, assigned: RunTrial, params_file: Path, report: Path, checkpoint: Path) -> dict[str, str]:
        environment = super()._environment(assigned, params_file, report, checkpoint)
        self._store = hosted(self._invitation(assigned))
        return environment | variables(
            self._rank,
            self._spec.launch,
            num_here=assigned.local_size,
            attempt=assigned.attempt,
            run=f"{self._paths.id}.{assigned.index}",
            address=(self._store.host, self._store.port),
            given=environment,
        )

    def _invitation(self, assigned: RunTrial) -> RendezvousRequest:
        """Return the invitation to the store."""
        launch, host = self._spec.launch, assigned.host
        return RendezvousRequest(
            folder=self._meeting,
            whose=f"trial {assigned.index}, attempt {assigned.attempt}, of {self._paths.id}, by {assigned.writer[:8]}",
            rank=self._rank,
            world_size=launch.num_ranks,
            host=host,
            join_s=max(_JOIN_S if host == LOOPBACK else _FAR_JOIN_S, launch.import_timeout_s),
            answer_s=launch.answer_s,
        )


def variables(
    rank: int,
    launch: Launch,
    *,
    num_here: int,
    attempt: int,
    run: str,
    address: tuple[str, int],
    given: Mapping[str, str],
) -> dict[str, str]:
    """What torchrun would set for a rank, over what is `given`; as many ranks as here are on each machine.

    Ranks are numbered node by node. An attempt counts as a restart, as after one the program finds a checkpoint.
    """
    here, ranks = num_here, launch.num_ranks
    host, port = address
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank % here,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": here,
        "GROUP_RANK": rank // here,
        "GROUP_WORLD_SIZE": ranks // here,
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": ranks,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": attempt,
        "TORCHELASTIC_MAX_RESTARTS": max(attempt, _budget(launch.retries)),
    }
    texts = {
        "ROLE_NAME": "default",
        "MASTER_ADDR": host,
        "TORCHELASTIC_RUN_ID": run,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": given.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }
    return texts | {name: str(number) for name, number in numbers.items()} | _interface(host, given)


def _budget(retries: Retries) -> int:
    return retries.error + retries.signal + retries.memory + retries.timeout + retries.unknown


def _interface(host: str, given: Mapping[str, str]) -> dict[str, str]:
    """Have gloo listen on loopback alone when that is where all ranks are; else it asks the machine's name."""
    name = "GLOO_SOCKET_IFNAME"
    return {name: "lo"} if host == LOOPBACK and name not in given else {}


def server(
    paths: SweepPaths, spec: SweepSpec, at_end: contextlib.ExitStack, meeting: Path
) -> Callable[[Channel], None]:
    """What serves one rank of a command sweep's trials in a worker process. Ranks find each other in `meeting`."""
    ready, folder = prepared(spec, at_end)
    return lambda channel: RankRunner(paths, ready, channel, folder, meeting).serve()
