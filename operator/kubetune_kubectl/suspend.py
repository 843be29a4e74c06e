"""`kubectl finetune suspend NAME` and `resume NAME`."""

import json
import sys
from datetime import UTC, datetime
from typing import TextIO

from kubetune_kubectl import jobs
from kubetune_kubectl.errors import NotPossible
from kubetune_kubectl.follow import follow
from kubetune_kubectl.jobs import Job
from kubetune_kubectl.kubectl import Kubectl
from kubetune_kubectl.live import headline
from kubetune_operator.status import is_true


def run(
    kubectl: Kubectl, name: str, *, suspended: bool, wait: bool, as_json: bool = False, stream: TextIO | None = None
) -> int:
    """Set spec.suspend and, if asked, wait until the workers are gone, or run again. 1 if the job failed meanwhile."""
    job = jobs.get(kubectl, name)
    verb = "suspended" if suspended else "resumed"
    if job.finished:
        raise NotPossible(f"FineTuneJob {name} has {job.state.lower()}: it can no longer be {verb}")
    changed = bool(job.spec.get("suspend")) != suspended
    if changed:
        patch = json.dumps({"spec": {"suspend": suspended}})
        job = jobs.read(kubectl.change("patch", jobs.RESOURCE, name, "--type=merge", f"--patch={patch}"))
    told = ("will be suspended" if suspended else "will go on") if changed else f"was {verb} already"
    print(f"FineTuneJob {name} {told}.", file=sys.stderr)
    if wait:
        job = _wait(kubectl, name, suspended)
    if as_json:
        print(json.dumps(job.body, indent=2), file=stream or sys.stdout)
    return 1 if job.finished and not job.succeeded else 0


def _wait(kubectl: Kubectl, name: str, suspended: bool) -> Job:
    """Until it is so, or the job has ended; each change of state is told."""
    said = ""
    for sight in follow(kubectl, name):
        line = headline(sight.job, datetime.now(UTC))
        if line != said:
            print(line, file=sys.stderr)
            said = line
        if sight.job.finished or _is_so(sight.job, suspended):
            return sight.job
    raise AssertionError("follow ends by an error only")


def _is_so(job: Job, suspended: bool) -> bool:
    if suspended:
        return is_true(job.status, "Suspended")
    return is_true(job.status, "Running") and not is_true(job.status, "Suspended")
