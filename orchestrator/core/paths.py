"""Every file name of a sweep, in one place.

A sweep is a folder; nothing outside this module joins a path inside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["SweepPaths"]


@dataclass(frozen=True, slots=True)
class SweepPaths:
    """The files of the sweep whose folder is `root`.

    Args:
        root: the sweep's folder, `<runs>/<name>-<hash>`; absolute, so that it means the same in every process.
    """

    root: Path

    @property
    def id(self) -> str:
        """The sweep's id: its folder's name."""
        return self.root.name

    @property
    def sweep_file(self) -> Path:
        """The sweep file as the user gave it."""
        return self.root / "sweep.yaml"

    @property
    def plan(self) -> Path:
        """Header and one line per trial; written once."""
        return self.root / "plan.jsonl"

    @property
    def code(self) -> Path:
        """Snapshot of the user's code, read-only."""
        return self.root / "code"

    @property
    def origin(self) -> Path:
        """A file that names the folder of the sweep file: where workers run, so that relative data paths are found."""
        return self.root / "origin"

    @property
    def sbatch(self) -> Path:
        """Folder of the scripts that were handed to sbatch."""
        return self.root / "sbatch"

    def script(self, name: str) -> Path:
        """A script handed to sbatch, by its name without ending, such as `workers-0`."""
        return self.sbatch / f"{name}.sh"

    @property
    def submissions(self) -> Path:
        """The ledger: an intent line before each submission, what came of it after."""
        return self.root / "submissions.jsonl"

    @property
    def submit_lock(self) -> Path:
        """Keeps two commands of one user from submitting at once; no correctness rests on it."""
        return self.root / ".submit.lock"

    @property
    def cancelled(self) -> Path:
        """The durable cancel mark; holds the number of the submission epoch that it ends."""
        return self.root / "cancelled"

    @property
    def claims(self) -> Path:
        """Folder of claims."""
        return self.root / "claims"

    def claim(self, first: int, last: int, epoch: int) -> Path:
        """Claim file of the block of trials `first..last` (both included), `epoch` counting takeovers from 0."""
        return self.claims / f"{first}-{last}.{epoch}"

    @property
    def records(self) -> Path:
        """Folder of record files."""
        return self.root / "records"

    def record(self, writer: str) -> Path:
        """Record file of one process start; `writer` is 32 hexadecimal digits."""
        return self.records / f"{writer}.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of resume state, one folder a trial."""
        return self.root / "checkpoints"

    def checkpoint(self, index: int) -> Path:
        """Resume state of one trial."""
        return self.checkpoints / str(index)

    def program_report(self, index: int, attempt: int, name: str) -> Path:
        """What a program reports in an attempt; `name` tells copies of the attempt apart."""
        return self.checkpoints / f"{index}.{attempt}.{name}.jsonl"

    def report_note(self, index: int, attempt: int) -> Path:
        """Which file the reports of an attempt are in, and which attempt it goes on from."""
        return self.checkpoints / f"{index}.{attempt}.reports"

    @property
    def models(self) -> Path:
        """Folder of the weights kept because they rank."""
        return self.root / "models"

    def model(self, index: int, sha256: str) -> Path:
        """Weights of one trial, by the sha256 of the file's bytes."""
        return self.models / f"{index}-{sha256[:16]}.safetensors"

    @property
    def summary(self) -> Path:
        """The reduced summary; derived, and byte for byte a function of plan and outcomes."""
        return self.root / "summary.json"

    @property
    def fold_cache(self) -> Path:
        """What the last fold knew; derived, and deleting it loses nothing but time."""
        return self.root / "fold.cache"

    @property
    def parts(self) -> Path:
        """Folder of what reducers leave for the next level; derived, and there only while they work."""
        return self.root / "reduce"

    def part(self, first: int, last: int) -> Path:
        """What is known of the trials `first..last`, both included."""
        return self.parts / f"{first}-{last}.json"

    def rendezvous(self, name: str) -> Path:
        """Folder where the ranks of one job step meet; there only until they have."""
        return self.root / f".rendezvous-{name}"

    @property
    def logs(self) -> Path:
        """Folder of what workers print."""
        return self.root / "logs"

    def slot_log(self, submission: str, worker: int, slot: int) -> Path:
        """What the worker in one slot of a supervisor with several prints; `worker` is the supervisor's number."""
        return self.logs / f"slot-{submission[:8]}-{worker}-{slot}.log"

    def rank_log(self, submission: str, worker: int, slot: int, rank: int) -> Path:
        """What a rank that doesn't speak for its trial prints; `worker` is the supervisor's number."""
        return self.logs / f"rank-{submission[:8]}-{worker}-{slot}.{rank}.log"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder that a new sweep starts with."""
        return (self.root, self.sbatch, self.claims, self.records, self.checkpoints, self.models, self.logs)
