"""What runs on each further node of a job: it starts workers there, passes on what they say, and decides nothing.

The supervisor on the job's first node tells it what to do; see `supervisor.remote_nodes`. Notices reach every process
of a job's step; what they mean is that supervisor's affair, so here they are ignored. When the connection to it ends,
the workers of this node are ended, whatever they do.
"""

from __future__ import annotations

import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.core.atomic import JsonObject
from orchestrator.core.channel import Channel
from orchestrator.core.liveness import Member, Vital, Watch
from orchestrator.core.signals import Signals
from orchestrator.errors import OrcError, ProgramError
from orchestrator.results.records import Cause
from orchestrator.supervisor.remote_nodes import BEAT_S
from orchestrator.supervisor.worker_pool import Children, Exited, Post, memory_kills

__all__ = ["Outpost"]

LOOK_S = 1.0
"""How often to look at the workers, in seconds."""


@dataclass(slots=True)
class _Watched:
    """A rank at work, how its messages begin, and how often memory had run out before it was."""

    member: Member
    watch: Watch
    name: JsonObject
    memory_kills: int


class Outpost:
    """Serves the supervisor until it hangs up.

    Args:
        children: to start workers with; not opened yet.
        line: to the supervisor.
        signals: of this process.
        silent_s: how long a worker may be stopped, in seconds.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        children: Children,
        line: Channel,
        signals: Signals,
        *,
        silent_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._children = children
        self._line = line
        self._signals = signals
        self._silent_s = silent_s
        self._clock = clock
        self._watched: dict[Post, _Watched] = {}
        self._looked_s = clock()
        self._watched_s = 0.0
        self._is_ready = False
        self._next_beat_s = 0.0
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Serve; returns when the supervisor has hung up and nothing is left running."""
        try:
            self._children.open()
            for source, react in (
                (self._line, self._on_line),
                (self._signals, self._on_signals),
                (self._children.channel, self._on_children),
            ):
                self._selector.register(source, selectors.EVENT_READ, react)
            while not self._line.closed:
                for key, _ in self._selector.select(LOOK_S):
                    key.data()
                self._look()
        except ProgramError as error:
            self._line.send({"broken": str(error)})
        except OrcError as error:
            self._line.send({"lost": str(error)})
        finally:
            self._children.stop()
            self._line.close()

    # What the supervisor says

    def _on_line(self) -> None:
        for message in self._line.receive():
            if "start" in message:
                self._start(Post.of(message["start"]))
            elif "kill" in message:
                self._children.kill(Post.of(message["kill"]))
            elif "to" in message or "tell" in message:
                self._pass_on(message)

    def _start(self, post: Post) -> None:
        channel = self._children.start(post).channel
        self._selector.register(channel, selectors.EVENT_READ, lambda: self._on_worker(post, channel))

    def _pass_on(self, message: JsonObject) -> None:
        worker = self._children.workers.get(Post.of(message["to"] if "to" in message else message["tell"]))
        if worker is None:
            return  # it has just ended, which is on its way
        if "to" in message:
            inner = message["message"]
            assert isinstance(inner, dict)
            worker.channel.send(inner)
        else:
            worker.tell(str(message["word"]))

    # What happens here

    def _on_signals(self) -> None:
        self._signals.take()
        for exited in list(self._children.reap()):
            self._on_exit(exited)

    def _on_children(self) -> None:
        for exited in self._children.poll():
            self._on_exit(exited)
        if self._children.ready and not self._is_ready:
            self._is_ready = True
            self._line.send({"ready": True})
        if self._children.channel.closed:
            self._selector.unregister(self._children.channel)

    def _on_worker(self, post: Post, channel: Channel) -> None:
        if channel.closed:
            return
        for message in channel.receive():
            self._relay(post, message)
        if channel.closed:
            self._selector.unregister(channel)

    def _relay(self, post: Post, message: JsonObject) -> None:
        if "pid" in message:
            member = Member.of(post.rank, int(str(message["pid"])))
            name: JsonObject = {"index": message["index"], "attempt": message["attempt"]}
            watch = Watch([member], silent_s=self._silent_s, clock=lambda: self._watched_s)
            self._watched[post] = _Watched(member, watch, name, memory_kills())
            message = {**name, "member": member.as_json()}
        self._line.send({"from": list(post), "message": message})

    def _on_exit(self, exited: Exited) -> None:
        channel = self._children.workers[exited.post].channel
        if not channel.closed:
            for message in channel.receive_rest():
                self._relay(exited.post, message)
            self._selector.unregister(channel)
        self._children.forget(exited.post)
        watched = self._watched.pop(exited.post, None)
        if watched is not None and exited.status == signal.SIGKILL and memory_kills() > watched.memory_kills:
            found = {"end": Cause.MEMORY.value, "detail": "killed by SIGKILL"}
            self._line.send({"from": list(exited.post), "message": {**watched.name, **found}})
        self._line.send({"exited": list(exited.post), "status": exited.status})

    def _look(self) -> None:
        """Tell of workers that are stopped. Time in which nobody looked is not held against them."""
        now = self._clock()
        if now >= self._next_beat_s:
            self._next_beat_s = now + BEAT_S
            self._line.send({"beat": True})
        self._watched_s += min(now - self._looked_s, 2 * LOOK_S)
        self._looked_s = now
        for post, one in list(self._watched.items()):
            text = one.watch.look().get(post.rank)
            if text is not None and one.member.vital() is Vital.STOPPED:
                del self._watched[post]
                self._line.send({"from": list(post), "message": {**one.name, "stopped": text}})
