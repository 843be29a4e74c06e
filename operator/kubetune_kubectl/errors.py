"""The plugin's own errors. Each message says what was wrong and what to do.

PluginError
├── NoKubectl        there is no kubectl to ask with
├── Refused          the API server, or kubectl itself, said no
│   ├── NoCrd        the cluster knows no FineTuneJobs
│   ├── NoRights     the caller may not do it
│   └── NotFound     there is no such object
├── Unreachable      the API server gave no answer
├── NoSuchJob        there is no FineTuneJob of this name
├── JobGone          the job that was followed was deleted
├── InvalidManifest  the file cannot become a FineTuneJob
├── NameInUse        a FineTuneJob of this name is there, and it is another one
├── NotPossible      the job's state does not allow it
└── NothingThere     there are no logs, or no files, to show
"""

from collections.abc import Iterable


class PluginError(Exception):
    """Base of all errors that end a command with the exit code 2."""


class NoKubectl(PluginError):
    """There is no kubectl on PATH."""


class Refused(PluginError):
    """The API server, or kubectl itself, said no."""


class NoCrd(Refused):
    """The cluster knows no FineTuneJobs."""


class NoRights(Refused):
    """The caller may not do it."""


class NotFound(Refused):
    """There is no such object."""


class Unreachable(PluginError):
    """The API server gave no answer: the same request may work later."""


class NoSuchJob(PluginError):
    """There is no FineTuneJob of this name."""


class JobGone(PluginError):
    """The job that was followed was deleted."""


class InvalidManifest(PluginError):
    """The file cannot become a FineTuneJob. `problems` has one sentence for each field, spelt as in the manifest."""

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([f"{source} cannot work:", *(f"  {problem}" for problem in self.problems)]))


class NameInUse(PluginError):
    """A FineTuneJob of this name is there, and it is another one."""


class NotPossible(PluginError):
    """The job's state does not allow it."""


class NothingThere(PluginError):
    """There are no logs, or no files, to show."""
