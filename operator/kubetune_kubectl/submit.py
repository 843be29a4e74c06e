"""`kubectl finetune submit FILE`: check a FineTuneJob, apply it on the server's side, and follow it if asked."""

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, TextIO

from kubetune_kubectl import jobs, manifest_file, watch
from kubetune_kubectl.check import problems_of
from kubetune_kubectl.errors import InvalidManifest, NameInUse, NotFound, Refused
from kubetune_kubectl.jobs import Job
from kubetune_kubectl.kubectl import Kubectl, Object
from kubetune_kubectl.words import age

_FIXED: Final = re.compile(r"(spec\.\w+) cannot be changed")
_OWNED: Final = re.compile(r"Apply failed with \d+ conflict.*?(?=\nPlease review|\Z)", re.DOTALL)
_FIELD: Final = re.compile(r"\.(spec\.[\w.]+)")


def run(
    kubectl: Kubectl,
    source: str,
    settings: Sequence[str] = (),
    *,
    dry_run: bool = False,
    then_watch: bool = False,
    as_json: bool = False,
    stream: TextIO | None = None,
) -> int:
    """Submit the job. With `then_watch` the exit code is the watch's, else 0."""
    body = prepared(source, settings, kubectl.namespace)
    kubectl = kubectl.within(body["metadata"].get("namespace") or kubectl.default_namespace())
    before = _present(kubectl, body["metadata"]["name"])
    job = jobs.read(_apply(kubectl, body, before, dry_run))
    told = _told(job, before, dry_run)
    follow = before is None and not (dry_run or then_watch)
    hint = f" Follow it: kubectl finetune watch {job.name} -n {job.namespace}" if follow else ""
    print(told + hint, file=sys.stderr)
    if as_json:
        print(json.dumps(job.body, indent=2), file=stream or sys.stdout)
    if dry_run or not then_watch:
        return 0
    return watch.run(kubectl, job.name, stream)


def prepared(source: str, settings: Sequence[str], namespace: str | None) -> Object:
    """The manifest as it will be applied. Raises InvalidManifest with all problems at once."""
    body = manifest_file.read(source)
    problems = manifest_file.set_values(body, settings)
    made = manifest_file.settle_name(body)
    if made is not None:
        print(f"metadata.generateName gives the name {made}.", file=sys.stderr)
    own = body["metadata"].get("namespace")
    if namespace is not None and own not in (None, namespace):
        problems.append(f"metadata.namespace: it is {own}, but --namespace says {namespace}: leave one of them out")
    problems += problems_of(body)
    if problems:
        raise InvalidManifest("standard input" if source == manifest_file.STDIN else source, problems)
    body.pop("status", None)  # of `kubectl get -o yaml`: it is the operator's
    return body


def _present(kubectl: Kubectl, name: str) -> Job | None:
    try:
        return jobs.read(kubectl.document("get", jobs.RESOURCE, name))
    except NotFound:
        return None


def _apply(kubectl: Kubectl, body: Object, before: Job | None, dry_run: bool) -> Object:
    options = ["--server-side", "--validate=strict", *(["--dry-run=server"] if dry_run else [])]
    try:
        return kubectl.change("apply", *options, "--filename=-", stdin=json.dumps(body))
    except Refused as error:
        fields = _differing(str(error))
        if before is None or not fields:
            raise
        raise NameInUse(_in_use(before, fields)) from error


def _differing(words: str) -> list[str]:
    """The fields in which the job that is there is another one; none where it was refused for another reason."""
    owned = _OWNED.search(words)
    fields = [*_FIXED.findall(words), *(_FIELD.findall(owned[0]) if owned else [])]
    return list(dict.fromkeys(fields))


def _in_use(before: Job, fields: list[str]) -> str:
    there = f"FineTuneJob {before.name} is there already ({before.state}, {age(before.created, datetime.now(UTC))} old)"
    other = f"--set metadata.name={before.name}-2"
    delete = f"`kubectl delete finetunejob {before.name} --namespace {before.namespace}`"
    if fields == ["spec.suspend"]:
        return f"{there}, and spec.suspend was set by others: use `kubectl finetune suspend` or `resume`"
    return (
        f"{there}, and the file differs from it in {', '.join(fields)}, which cannot be changed: "
        f"give this one another name ({other}), or remove that one first ({delete})"
    )


def _told(job: Job, before: Job | None, dry_run: bool) -> str:
    what = f"FineTuneJob {job.namespace}/{job.name}"
    if dry_run:
        return f"{what} would be {'created' if before is None else 'accepted; it is there already'} (dry run)."
    if before is None:
        return f"{what} was created."
    if before.body["metadata"].get("generation") != job.body["metadata"].get("generation"):
        return f"{what} was changed."
    again = f"; for another run give another name: --set metadata.name={job.name}-2" if job.finished else ""
    return f"{what} is there already and as in the file ({job.state}){again}."
