"""Every error a user can meet, with the exit code of the command for each.

    FedgraftError                 1
      ConfigError                 2   the YAML file or an override is wrong (all problems of a file together)
      DataError                   2   a dataset file, a field, a partition
      ModelError                  2   a model folder, a family, a target that matches nothing
      MethodError                 2   a method's name, its file, its options
      ResultsError                2   results cannot be read, or do not go together
      ClusterError                3   Ray cannot give what was asked for
      ReplicaError                3   a replica cannot go on; it is replaced and its task run again
      GroupViolation              4   a private or frozen tensor was about to be sent, or a frozen one changed
      BudgetViolation             4   a method gave a client more experts than its budget allows
      UpdateError                 4   a client's reply does not fit the round (names, shapes, dtypes, finite values)
      QuorumError                 5   fewer clients than ``federation.min_clients`` answered
      CheckpointError             6   a checkpoint is torn, tampered with, or belongs to another run
      StorageError                8   a file of the run cannot be written, e.g. as the disk is full; the run can be resumed
      RunInterrupted            130   Ctrl-C or SIGTERM; the run can be resumed

(7 is ``fedgraft verify``'s, where two runs differ: an outcome, no error.)

Messages say what was being done, what was expected, what came, and what to do next. All values go to
``super().__init__`` so that every error survives the trip between processes.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "BudgetViolation",
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "DataError",
    "FedgraftError",
    "GroupViolation",
    "MethodError",
    "ModelError",
    "Problem",
    "QuorumError",
    "ReplicaError",
    "ResultsError",
    "RunInterrupted",
    "StorageError",
    "UpdateError",
]


class FedgraftError(Exception):
    """Base of all errors that fedgraft raises on purpose.

    Args:
        message: What was being done, what was expected, what came.
        hint: What to do next; printed on its own line. May be empty.
    """

    exit_code: int = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  what to do: {self.hint}" if self.hint else self.message


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One wrong place of a configuration: key path, the value found, what was expected, and what to do."""

    path: str
    value: str
    expected: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.path}: got {self.value}; expected {self.expected}"
        return f"{text} ({self.hint})" if self.hint else text


class ConfigError(FedgraftError):
    """A configuration that cannot run, with all its problems at once.

    Args:
        source: The file, or ``<overrides>`` or ``<dict>``.
        problems: At least one, in the order of the file's key paths.
    """

    exit_code = 2

    def __init__(self, source: str, problems: tuple[Problem, ...]) -> None:
        super().__init__(source)
        self.args = (source, problems)
        self.source = source
        self.problems = problems

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [f"{self.source}: {count} problem{'s' if count != 1 else ''}"]
        lines += [f"  {problem}" for problem in self.problems]
        return "\n".join(lines)


class DataError(FedgraftError):
    """A dataset cannot be read, lacks a field, or cannot be partitioned as asked."""

    exit_code = 2


class ModelError(FedgraftError):
    """A model folder, a family or a target does not fit."""

    exit_code = 2


class MethodError(FedgraftError):
    """A method is unknown, its file cannot be loaded, or it broke its contract."""

    exit_code = 2


class ResultsError(FedgraftError):
    """Results cannot be read (no such run, a torn file), or those that were named do not go together."""

    exit_code = 2


class ClusterError(FedgraftError):
    """Ray cannot be started or joined, or cannot give the resources asked for."""

    exit_code = 3


class ReplicaError(FedgraftError):
    """A replica's process cannot go on, e.g. with half a step in sharded buffers; a new one takes over its task."""

    exit_code = 3


class GroupViolation(FedgraftError):
    """A tensor was about to leave its parameter group: private or frozen sent, or frozen changed."""

    exit_code = 4


class BudgetViolation(FedgraftError):
    """A method gave a client more experts than its budget allows, or changed more in one local step."""

    exit_code = 4


class UpdateError(FedgraftError):
    """A client's reply does not fit the round: names, shapes, dtypes, or values that are not finite."""

    exit_code = 4


class QuorumError(FedgraftError):
    """Fewer clients than the configured minimum answered in a round."""

    exit_code = 5


class CheckpointError(FedgraftError):
    """A checkpoint cannot be used: torn, tampered with, or of another run."""

    exit_code = 6


class StorageError(FedgraftError):
    """A file of the run cannot be written, e.g. on a full disk; nothing torn is left, and what was finished stays."""

    exit_code = 8


class RunInterrupted(FedgraftError):
    """The user stopped the run; the hint says how to go on."""

    exit_code = 130
