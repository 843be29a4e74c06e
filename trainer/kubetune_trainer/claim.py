"""The claim of one run on its output folder: what decides the run stands there, and another run is refused."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_contract.paths import CHECKPOINTS_DIR, METRICS_FILE, RESULT_FILE, SAMPLES_FILE
from kubetune_trainer.checkpoint import is_complete, write_file
from kubetune_trainer.failures import as_output_error

IDENTITY_FILE: Final = "identity.json"
"""In the output folder: what decides the run."""
_DIGEST_EDGE: Final = 1 << 20


class OtherRunError(JobError):
    """The output folder belongs to a run with other settings."""

    exit_code = ExitCode.INVALID_CONFIG


def claim(output: Path, identity: Mapping[str, Any], first: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Makes the folder this run's and returns what the run's first start wrote as `first()`, now or earlier.

    Rank 0 only; both are JSON. A folder with a checkpoint or result of another identity is refused with OtherRunError;
    one in which no checkpoint was reached is taken over. Raises OutputError where it cannot be written.
    """
    with _refused_writes(output):
        output.mkdir(parents=True, exist_ok=True)
        known = _read_identity(output)
        if known is not None and not (different := differences(known["identity"], identity)):
            return dict(known["first"])
        if known is not None and _has_results(output):
            raise OtherRunError(
                f"{output} belongs to a run with other settings: {'; '.join(different)}. "
                "Choose another output_dir, take the settings back, or remove that folder"
            )
        for name in (METRICS_FILE, SAMPLES_FILE):
            (output / name).unlink(missing_ok=True)
        known = {"identity": identity, "first": first()}
        write_file(output / IDENTITY_FILE, json.dumps(known, indent=1).encode())
        return dict(known["first"])


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The leaves that differ, such as `training.seed was 1, now 2`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        below = [differences(old.get(key), new.get(key), f"{path}.{key}".lstrip(".")) for key in sorted({*old, *new})]
        return [one for found in below for one in found]
    return [] if old == new else [f"{path} was {old}, now {new}"]


def digest_files(folder: Path, names: Iterable[str]) -> str:
    """Tells model folders apart at little cost: of each file the name, the size, the first and the last MiB."""
    digest = sha256()
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            size = (folder / name).stat().st_size
            digest.update(f"{name} {size}".encode() + file.read(_DIGEST_EDGE))
            file.seek(max(0, size - _DIGEST_EDGE))
            digest.update(file.read())
    return digest.hexdigest()


@contextmanager
def _refused_writes(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise as_output_error(error, output) or error from error


def _read_identity(output: Path) -> dict[str, Any] | None:
    try:
        known: dict[str, Any] = json.loads((output / IDENTITY_FILE).read_bytes())
    except FileNotFoundError:
        return None
    return known


def _has_results(output: Path) -> bool:
    checkpoints = output / CHECKPOINTS_DIR
    return (output / RESULT_FILE).exists() or (checkpoints.is_dir() and any(map(is_complete, checkpoints.iterdir())))
