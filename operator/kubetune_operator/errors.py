"""The operator's own errors.

OperatorError
└── InvalidJob      a FineTuneJob that cannot work, found before anything was created
"""

from collections.abc import Iterable


class OperatorError(Exception):
    """Base of all errors that the operator raises itself."""


class InvalidJob(OperatorError):
    """The FineTuneJob cannot work. `problems` has one sentence for each field, spelt as in the manifest."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))
