"""Where files come from elsewhere: repositories of the Hugging Face hub, what its errors mean, and words for people."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kubetune_contract.exit_codes import ExitCode, JobError


class SourceDeniedError(JobError):
    """The repository does not exist, or this token may not read it."""

    exit_code = ExitCode.SOURCE_DENIED


class SourceUnavailableError(JobError):
    """The hub cannot be reached or does not work now. What was downloaded stays; a retry goes on from there."""

    exit_code = ExitCode.SOURCE_UNAVAILABLE


@dataclass(frozen=True)
class Words:
    """How errors name the places where their reader can change something."""

    authorize: str
    """How to give a token, as in `name a secret with ...`."""
    revision: str
    """Where the revision stands."""
    place: str = ""
    """Where the source stands."""
    region: str = ""
    """Where the bucket's region stands."""
    full: str = ""
    """What helps where there is not enough room."""
    read_only: str = ""
    """What to make writable, and why."""


@dataclass(frozen=True)
class Repository:
    """A repository of the hub at a revision, and which of its files are not wanted."""

    name: str
    revision: str = "main"
    ignore_patterns: tuple[str, ...] = ()
    """Shell patterns."""

    def __str__(self) -> str:
        return f"{self.name} at revision {self.revision}"


@contextmanager
def hub_errors(source: Repository, words: Words) -> Iterator[None]:
    """Errors of the Hugging Face hub become SourceDeniedError or SourceUnavailableError; OSError of files passes."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP client in this hub version

    try:
        yield
    except errors.HFValidationError as error:
        raise SourceDeniedError(f"{source.name!r} is no repository of the Hugging Face hub: {error}") from error
    except errors.GatedRepoError as error:
        raise SourceDeniedError(
            f"{source} is gated: accept its terms on the hub with the account of your token, "
            f"and {words.authorize.format(which='that token')}"
        ) from error
    except errors.RevisionNotFoundError as error:
        text = f"{source.name} has no revision {source.revision}: correct {words.revision}"
        raise SourceDeniedError(text) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(source, words, error.response.status_code, error) from error
    except (HTTPError, errors.LocalEntryNotFoundError, errors.XetDownloadError, ConnectionError, TimeoutError) as error:
        text = f"the hub cannot be reached for {source}: {error.__cause__ or error}"
        raise SourceUnavailableError(text) from error
    except OSError as error:
        if error.errno is not None:
            raise
        # The hub's own: a file without its metadata, or one that ended too early.
        raise SourceUnavailableError(f"the download of {source} failed: {error}") from error


def _refusal(source: Repository, words: Words, status: int, error: Exception) -> JobError:
    if status in (401, 403, 404):
        return SourceDeniedError(
            f"{source} does not exist or this token may not read it (HTTP {status}): check the name, "
            f"and {words.authorize.format(which='a token that may')}"
        )
    return SourceUnavailableError(f"the hub does not serve {source} now (HTTP {status}): {error}")


def literal(name: str) -> str:
    """The pattern that fits this name only."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
