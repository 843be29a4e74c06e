"""One process at a time, on one machine or on a shared file system."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, task: str) -> Iterator[bool]:
    """Holds the lock on the file `path`; yields whether there is one. Whoever waits says `task`.

    The kernel gives the lock back, also of a killed process. A file system that knows no locks is used without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        held = True
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that {task}", flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            held = False
        yield held
