"""What the fuzz tests share: how many examples, limits of time and memory for one, and how valid input is spoilt.

`HYPOTHESIS_PROFILE=long` takes minutes for each target; without it each has a few examples, the same ones every time.
"""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_CHECKS: Final = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
_EXAMPLES: Final = {"short": 60, "long": int(os.environ.get("KUBETUNE_FUZZ_EXAMPLES", "20000"))}
PROFILE: Final = os.environ.get("HYPOTHESIS_PROFILE", "short")
SECONDS: Final = 5.0
"""CPU time after which an example hangs."""
MEMORY: Final = 512 << 20
"""Bytes of address space that an example may take on top of what is there: a thread's heap alone reserves 128 MiB."""

fuzz: Final = settings(
    max_examples=_EXAMPLES[PROFILE],
    deadline=None,  # contained() measures CPU time: the wall clock belongs to whoever else is on the machine
    derandomize=PROFILE == "short",
    database=None,
    suppress_health_check=_CHECKS,
)


class Hang(BaseException):
    """An example took too long. No Exception: nobody may catch it on the way."""


@contextmanager
def contained(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Raises Hang or MemoryError where what is inside takes too much of either."""

    def ring(*_: Any) -> None:
        raise Hang(f"more than {seconds} s of CPU time")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGVTALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


# --- values -----------------------------------------------------------------------------------------------------------

ODD_TEXTS: Final = (
    "",
    "\0",
    "a\0b",
    "\ud800",
    "../../etc/passwd",
    "/",
    "..",
    "nan",
    "1e999",
    "{x}",
    "{0}",
    "%s",
    "\U0001f642" * 9,
)
ODD_NUMBERS: Final = (0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.5, 1e308, 1e-320)
SCALARS: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(ODD_NUMBERS),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=12),
)
VALUES: Final = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=6), below, max_size=3),
    max_leaves=8,
)
"""What JSON can hold."""

Place = tuple[Any, Any]
"""A container and the key or index in it."""


def _places(value: Any) -> Iterator[Place]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in pairs:
        yield value, key
        yield from _places(below)


@st.composite
def spoilt(draw: st.DrawFn, valid: Any, values: st.SearchStrategy[Any] = VALUES, most: int = 3) -> Any:
    """A copy of the document in which up to `most` places are changed, removed, doubled or added."""
    holder = [deepcopy(valid)]
    for _ in range(draw(st.integers(1, most))):
        container, key = draw(st.sampled_from(list(_places(holder))))
        match draw(st.sampled_from(("change", "change", "remove", "add", "swap"))):
            case "change":
                container[key] = draw(values)
            case "remove" if container is not holder:
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.text(max_size=8) | st.sampled_from(list(container)))] = draw(values)
            case "add" if container is not holder:
                container.append(draw(values))
            case _:
                other, place = draw(st.sampled_from(list(_places(holder))))
                container[key] = deepcopy(other[place])
    return holder[0]


# --- bytes ------------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, valid: bytes, most: int = 4) -> bytes:
    """The bytes with up to `most` damages: flipped, overwritten, cut out, put in twice or truncated."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(0, 16))
        match draw(st.sampled_from(("flip", "write", "write", "cut", "double", "end"))):
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[place : place + length]
            case "double":
                data[place:place] = data[place : place + length]
            case "end":
                del data[place:]
            case _:
                extreme = st.sampled_from((b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"[" * 12, b'{"a":' * 4))
                data[place : place + length] = draw(st.binary(max_size=8) | extreme)
    return bytes(data)


def nested(levels: int, opening: str = "[", closing: str = "]") -> str:
    """Brackets in brackets."""
    return opening * levels + closing * levels


def in_words(error: BaseException, *names: str) -> str:
    """The error's text, which must not be empty and must name each of `names`, whoever reads it."""
    text = str(error)
    assert text
    for name in names:
        assert name in text, text
    text.encode()  # it goes to logs and to the API server: no halves of characters
    return text
