"""kubectl as a process: one request, or a watch. The only place that reads kubectl's words for errors."""

import codecs
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from subprocess import DEVNULL, PIPE
from typing import IO, Any, Final, NamedTuple, Self

from kubetune_kubectl.errors import NoCrd, NoKubectl, NoRights, NotFound, PluginError, Refused, Unreachable

Object = dict[str, Any]

FIELD_MANAGER: Final = "kubectl-finetune"
REQUEST_TIMEOUT: Final = "--request-timeout=30s"
"""Of every request that is not a stream."""

_NOISE: Final = re.compile(r"^[EWI]\d{4} \d\d:\d\d:")
"""Lines of client-go's own log, which repeat what the last line says."""
_PREFIX: Final = re.compile(r"^(error: |Error from server( \(\w+\))?: |The connection )?", re.IGNORECASE)
_NO_RIGHTS: Final = re.compile(r'User "[^"]*" cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)"')
_INSTALL: Final = (
    "the cluster knows no FineTuneJobs: install Kubetune's chart "
    "(`helm upgrade --install kubetune charts/kubetune --namespace kubetune-system --create-namespace`), "
    "or choose another cluster with --context"
)
_KNOWN: Final[tuple[tuple[str, type[PluginError], str], ...]] = (
    (
        r"doesn't have a resource type \"(finetunejobs|ftj)|no matches for kind \"FineTuneJob\"",
        NoCrd,
        _INSTALL,
    ),
    (
        r"You must be logged in|asked for the client to provide credentials|\(Unauthorized\)",
        NoRights,
        "{words}: the cluster does not know you; log in again as for kubectl",
    ),
    (
        r"context .*(does not exist|not found)|Error in configuration|^error: stat ",
        Refused,
        "{words}; `kubectl config get-contexts` shows the contexts",
    ),
    (
        r"localhost:8080",
        Unreachable,
        "no cluster is chosen: set KUBECONFIG, or give --kubeconfig and --context",
    ),
    (r"\(NotFound\)", NotFound, "{words}"),
    (
        r"was refused|Unable to connect|connection (refused|reset|lost)|i/o timeout|TLS handshake timeout|no such host"
        r"|context deadline exceeded|Client\.Timeout|unexpected EOF|: EOF|http2: |\((ServiceUnavailable|InternalError"
        r"|TooManyRequests|ServerTimeout|Timeout|Expired|Gone)\)|currently unable to handle|etcdserver|too old resource"
        r"|net/http: |error dialing backend|no route to host|network is unreachable",
        Unreachable,
        "the cluster does not answer: {words}",
    ),
)
"""What is found in kubectl's words, the error that it is, and what is said. The first that fits counts."""


@dataclass(frozen=True)
class Kubectl:
    """kubectl with the cluster and the namespace that the command line chose."""

    context: str | None = None
    kubeconfig: str | None = None
    namespace: str | None = None
    """None is the one that the context names."""

    def within(self, namespace: str) -> Self:
        """The same cluster, in that namespace."""
        return replace(self, namespace=namespace)

    def command(self, *words: str) -> list[str]:
        """The whole command line. Raises NoKubectl."""
        program = shutil.which("kubectl")
        if program is None:
            raise NoKubectl("kubectl is not on PATH: install it, `kubectl finetune` asks the cluster through it")
        chosen = {"--context": self.context, "--kubeconfig": self.kubeconfig, "--namespace": self.namespace}
        return [program, *(f"{flag}={value}" for flag, value in chosen.items() if value is not None), *words]

    def run(self, *words: str, stdin: str | None = None) -> str:
        """One request; returns what kubectl printed. Raises Refused or Unreachable."""
        return self._finished([*words, REQUEST_TIMEOUT], stdin)

    def change(self, *words: str, stdin: str | None = None) -> Object:
        """One request that writes; returns the object as the server then has it. Raises Refused or Unreachable."""
        return self.document(*words, f"--field-manager={FIELD_MANAGER}", stdin=stdin)

    def document(self, *words: str, stdin: str | None = None) -> Object:
        """The object that a request answers with."""
        found: Object = json.loads(self.run(*words, "--output=json", stdin=stdin))
        return found

    def items(self, kind: str, *selectors: str) -> list[Object]:
        """The objects of a kind."""
        found: list[Object] = self.document("get", kind, *selectors)["items"]
        return found

    def _finished(self, words: list[str], stdin: str | None) -> str:
        feed: dict[str, Any] = {"stdin": DEVNULL} if stdin is None else {"input": stdin}
        done: subprocess.CompletedProcess[str] = subprocess.run(
            self.command(*words), check=False, capture_output=True, text=True, **feed
        )
        if done.returncode != 0:
            raise as_error(done.stderr, done.returncode)
        return done.stdout

    def pass_through(self, *words: str) -> None:
        """kubectl with our own standard output, until it ends. Raises Refused or Unreachable."""
        done = subprocess.run(self.command(*words), check=False, stdin=DEVNULL, stderr=PIPE)
        if done.returncode != 0:
            raise as_error(done.stderr.decode(errors="replace"), done.returncode)

    def stream(self, *words: str) -> "Process":
        """kubectl with its output to be read as it comes."""
        # A file takes its complaints: a second pipe that nobody reads would stop it.
        complaints = tempfile.TemporaryFile()  # noqa: SIM115 - the process's own; it goes with it
        process = subprocess.Popen(self.command(*words), stdin=DEVNULL, stdout=PIPE, stderr=complaints)
        return Process(process, complaints)

    def watch(self, kind: str, *selectors: str) -> "Watch":
        """What happens to objects, from their present state on."""
        return Watch(self.stream("get", kind, *selectors, "--watch", "--output-watch-events", "--output=json"))

    def default_namespace(self) -> str:
        """The namespace that is meant."""
        if self.namespace is not None:
            return self.namespace
        return self._finished(["config", "view", "--minify", "--output=jsonpath={..namespace}"], None) or "default"


class Process:
    """A running kubectl."""

    def __init__(self, process: "subprocess.Popen[bytes]", complaints: IO[bytes]) -> None:
        assert process.stdout is not None
        self.stdout = process.stdout
        self._process = process
        self._complaints = complaints

    def fileno(self) -> int:
        """Of its output, for select."""
        return self.stdout.fileno()

    def end(self) -> None:
        """Wait for its end. Raises what it complained of, if it failed."""
        code = self._process.wait()
        self._complaints.seek(0)
        words = self._complaints.read().decode(errors="replace")
        self.close()
        if code != 0:
            raise as_error(words, code)

    def close(self) -> None:
        """End it if it runs."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        self.stdout.close()
        self._complaints.close()


class Event(NamedTuple):
    """What a watch tells of an object."""

    type: str
    object: Object


class Watch:
    """A watch as its events arrive. `select` says when there is something to read."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._documents = Documents()

    def fileno(self) -> int:
        """Of the events, for select."""
        return self._process.fileno()

    def read(self) -> list[Event] | None:
        """The events that have arrived; None once it has ended well. Raises Refused or Unreachable."""
        chunk = os.read(self.fileno(), 1 << 16)
        if not chunk:
            self._process.end()
            return None
        found = [Event(document["type"], document["object"]) for document in self._documents.feed(chunk)]
        for event in found:
            if event.type == "ERROR":
                raise Unreachable(f"the watch ended: {event.object.get('message', 'without a reason')}")
        return found

    def close(self) -> None:
        """End it."""
        self._process.close()


class Documents:
    """Takes bytes as they come and gives the JSON documents that are complete."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text = ""

    def feed(self, chunk: bytes) -> Iterator[Object]:
        """The documents that end in this chunk."""
        self._text = (self._text + self._decode(chunk)).lstrip()
        while self._text:
            try:
                document, end = json.JSONDecoder().raw_decode(self._text)
            except ValueError:
                return
            yield document
            self._text = self._text[end:].lstrip()


def as_error(stderr: str, code: int = 1) -> PluginError:
    """The error that kubectl's words stand for, with a remedy. `code` is negative where a signal ended it.

    Raises KeyboardInterrupt where that was Ctrl-C: a terminal sends it to us and to kubectl, in any order.
    """
    if code == -signal.SIGINT:
        raise KeyboardInterrupt
    lines = [line for line in stderr.strip().splitlines() if not _NOISE.match(line)]
    words = "\n".join(lines) or stderr.strip() or "kubectl failed without a word"
    plain = _PREFIX.sub("", words, count=1) or words
    if denied := _NO_RIGHTS.search(words):
        return NoRights(_about_rights(plain, denied))
    if code < 0 and not lines:
        return Unreachable(f"kubectl was ended by signal {-code}")
    for pattern, error, told in _KNOWN:
        if re.search(pattern, words):
            return error(told.format(words=plain))
    return Refused(plain)


def _about_rights(words: str, denied: re.Match[str]) -> str:
    from kubetune_operator.api import GROUP, PLURAL  # half a second, of which `--help` has no need

    verb, resource = denied["verb"], denied["resource"]
    named = f"{resource}.{GROUP}" if resource.startswith(PLURAL) else resource
    return f"{words}\nYou need a role that allows {verb} on {resource}; `kubectl auth can-i {verb} {named}` checks it"
