"""A stand-in for the interpreter in a rendered script: takes the supervisor's arguments and writes down every signal.

It stays until it is killed, as a worker does that never reaches a safe point.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

HEARD = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT, signal.SIGINT, signal.SIGHUP}
signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)


def note(file: int, what: str) -> None:
    line = {"what": what, "at": time.time(), "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0)}
    os.write(file, json.dumps(line).encode() + b"\n")


def touch(variable: str) -> None:
    if variable in os.environ:
        Path(os.environ[variable]).touch()


folder = Path(sys.argv[sys.argv.index("--dir") + 1])
log = os.open(folder / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
note(log, "start")
touch("ORC_READY")
while True:
    note(log, signal.Signals(signal.sigwaitinfo(HEARD).si_signo).name.removeprefix("SIG"))
    touch("ORC_ACK")
