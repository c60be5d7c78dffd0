"""What can go wrong, as one tree.

    OrcError                     exit 1: our fault, or the machine's
      UsageError                 exit 2: the command line or the configuration is wrong
        SweepFileError           every problem of a sweep file, each with line and column
        ProgramError             the user's program can't be imported, or its signatures don't fit
        FolderError              a sweep folder that is unsafe, foreign, or of another schema
          Vanished               (`fold.table`) a record that was read is no longer there
        SbatchRejected           sbatch said no; its own words are in the text
        DataError                a file of data that is missing, damaged, or not the one that was meant
      PeerLost, RendezvousFailed           (`dist`, `roll`) a rank is gone or silent; the ranks did not find each other
      OutOfStep, NoGradient      (`agreement`, `replica`) ranks do different things; a loss that they can't share
      CheckpointError            (`checkpoint`) a checkpoint can't be written or read, or is of another number of ranks
        Gone                     its folder has vanished: someone else has finished the trial
        Misfit                   (`capture`) it doesn't fit what the job has built
      TooLong, Unrecordable      (`store`, `records`) a line that is longer than its readers take; nothing is written
      NothingMatched             exit 3: no such sweep, trial or model
      TrialsFailed               exit 4: the command worked, some trials did not
      SlurmUnreachable           exit 5: no Slurm, or its controller does not answer
      Preempted                  exit 75: asked to leave; the work goes on later

The command line turns an `OrcError` into its text on stderr and its exit code; nothing else is ever shown without a
traceback, so anything that is a user's mistake must be raised as one of these.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "DataError",
    "FolderError",
    "NothingMatched",
    "OrcError",
    "Preempted",
    "ProgramError",
    "SbatchRejected",
    "SlurmUnreachable",
    "SweepFileError",
    "TrialsFailed",
    "UsageError",
]


class OrcError(Exception):
    """Root of every error that this package raises on purpose. The text says what, where, and the remedy."""

    exit_code: ClassVar[int] = 1


class UsageError(OrcError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class SweepFileError(UsageError):
    """A sweep file with problems: all of them at once.

    Args:
        problems: one line each, `file:line:col: key: what was found, what is allowed`.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ProgramError(UsageError):
    """The user's program can't be imported, has no such function, or doesn't take the sweep's parameters."""


class FolderError(UsageError):
    """A sweep folder that can't be used: not writable, unsafe, of another schema, or not a sweep at all."""


class SbatchRejected(UsageError):
    """sbatch refused the job; the text carries sbatch's own message."""


class DataError(UsageError):
    """A file of data that is missing, can't be read, or is not what it should be; nothing is ever downloaded."""


class NothingMatched(OrcError):
    """No sweep, trial or model of that name."""

    exit_code = 3


class TrialsFailed(OrcError):
    """Some trials failed, or are missing; the command itself did its work."""

    exit_code = 4


class SlurmUnreachable(OrcError):
    """Slurm's commands are missing, or the controller does not answer in time."""

    exit_code = 5


class Preempted(OrcError):
    """Asked to leave before the work was done; it goes on later."""

    exit_code = 75
