"""Exit codes of every Kubetune container, and what follows from them.

64-78: the user must change something, a retry cannot help. 80-89: a retry helps. Anything else that is not 0: a crash.
The pod failure policy of the Jobs and the planner both read this table.
"""

from enum import IntEnum
from typing import Final

USER_ERRORS: Final = range(64, 79)
RETRYABLE: Final = range(80, 90)


class ExitCode(IntEnum):
    """Why a container ended."""

    DONE = 0
    CRASH = 1
    INVALID_CONFIG = 64
    INVALID_DATA = 65
    INVALID_MODEL = 66
    DOES_NOT_FIT = 67
    OUTPUT_NOT_WRITABLE = 68
    SOURCE_DENIED = 69
    NON_FINITE_LOSS = 70
    STORAGE_FULL = 71
    OUT_OF_MEMORY = 72
    SAVED = 80
    PEER_LOST = 81
    SOURCE_UNAVAILABLE = 82

    @property
    def reason(self) -> str:
        """The code as a condition's reason, such as `InvalidData`."""
        return "".join(word.capitalize() for word in self.name.split("_"))


def reason_of(code: int) -> str:
    """The reason of any exit status; `Crash` for one that is not ours."""
    return ExitCode(code).reason if code in list(ExitCode) else ExitCode.CRASH.reason


class JobError(Exception):
    """An error that ends the run with one of the contract's codes. It says what was wrong, where, and what to do."""

    exit_code: ExitCode = ExitCode.CRASH
