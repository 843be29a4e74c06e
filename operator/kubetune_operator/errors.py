"""The operator's own errors.

OperatorError
├── InvalidJob      a FineTuneJob that cannot work, found before anything was created
│   └── UnknownFields   its spec has fields of a newer CRD: this operator cannot judge it
├── NameTaken       a name that a child needs belongs to somebody else
├── ApiError        the API server refused a request
├── Unreachable     the API server gave no answer
├── Deposed         this replica is not the leader, so it does not write
└── Expired         a watch cannot go on from where it was: list again
"""

from collections.abc import Iterable


class OperatorError(Exception):
    """Base of all errors that the operator raises itself."""


class InvalidJob(OperatorError):
    """The FineTuneJob cannot work. `problems` has one sentence for each field, spelt as in the manifest."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


class UnknownFields(InvalidJob):
    """The spec has fields that this operator does not know, so the CRD that let them through is newer than it."""


class NameTaken(OperatorError):
    """An object of the name is there and is not ours. The message says what to do."""


class ApiError(OperatorError):
    """The API server refused a request: HTTP code, its words, and the seconds that it wants us to wait."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        self.status = status
        self.message = message
        self.retry_after = retry_after
        super().__init__(f"{status}: {message}")


class Unreachable(OperatorError):
    """The API server gave no answer, or half a one."""


class Deposed(OperatorError):
    """This replica is not the leader, or not surely any more: another one may be at work, so nothing is written."""


class Expired(OperatorError):
    """The resource version is too old to watch from (410)."""


def retry_after(error: OperatorError) -> float:
    """Seconds that the API server wants us to wait; 0 where it said nothing of that."""
    return (error.retry_after or 0.0) if isinstance(error, ApiError) else 0.0
