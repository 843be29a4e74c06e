"""`kubectl finetune logs NAME`: the log of the pod that matters now."""

import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from typing import Final, NamedTuple

from kubetune_kubectl import jobs
from kubetune_kubectl.errors import NotFound, NothingThere, Unreachable
from kubetune_kubectl.follow import LOST_SECONDS, RETRY_SECONDS, follow, in_order
from kubetune_kubectl.jobs import Job, why
from kubetune_kubectl.kubectl import Kubectl, Object
from kubetune_kubectl.losses import has_started
from kubetune_operator.diagnosis import culprit, ended_container, index_of
from kubetune_operator.names import ATTEMPT_LABEL, CONTAINER, JOB_LABEL, ROLE_LABEL, STAGE, job_name

JOB_NAME_LABEL: Final = "batch.kubernetes.io/job-name"
LOOK_TICKS: Final = 8
"""Ticks of the watch after which pods are listed again without news: staging pods are not watched."""


class Wanted(NamedTuple):
    """Which log is meant."""

    rank: int | None = None
    """A rank of the whole gang; None is rank 0, or the one that failed."""
    attempt: int | None = None
    """None is the present one."""
    previous: bool = False
    """The attempt before that one."""


class Choice(NamedTuple):
    """The pod whose log is shown, and what it is."""

    pod: Object
    what: str


def run(kubectl: Kubectl, name: str, wanted: Wanted, go_on: bool) -> int:
    """Show the log; with `go_on` also what comes, in later attempts too."""
    job = jobs.get(kubectl, name)
    kubectl = kubectl.within(job.namespace)
    if not go_on:
        _show(kubectl, choose(kubectl, job, wanted))
        return 0
    shown: set[str] = set()
    while (choice := _next(kubectl, name, wanted, shown)) is not None:
        _follow(kubectl, choice)
        shown.add(choice.pod["metadata"]["uid"])
        if wanted.attempt is not None or wanted.previous:
            break
    return 0


def choose(kubectl: Kubectl, job: Job, wanted: Wanted) -> Choice:
    """The pod to look at. Raises NothingThere with the reason."""
    if job.status.attempt == 0 and wanted == Wanted():
        return _of_staging(kubectl, job)
    attempt = _attempt(job, wanted)
    pods = _workers(kubectl, job, attempt)
    if not pods and wanted == Wanted() and attempt > 1:
        attempt -= 1  # the next attempt waits for its time: what ended the last one is what matters
        pods = _workers(kubectl, job, attempt)
    if wanted.rank is not None:
        return _of_rank(job, wanted.rank, attempt, pods)
    if not pods:
        raise NothingThere(_no_pods(job, attempt))
    failed = _culprit(kubectl, job, attempt, pods)
    if failed is not None:
        return Choice(failed, f"worker {index_of(failed)} of attempt {attempt}, which failed first")
    return Choice(pods[0], f"worker {index_of(pods[0])} of attempt {attempt}")


def _attempt(job: Job, wanted: Wanted) -> int:
    present = job.status.attempt
    attempt = (present if wanted.attempt is None else wanted.attempt) - wanted.previous
    if not 1 <= attempt <= present:
        had = {0: "none has started yet", 1: "there is one only, number 1"}.get(present, f"there are 1 to {present}")
        raise NothingThere(f"FineTuneJob {job.name} has no attempt {attempt}: {had}")
    return attempt


def _workers(kubectl: Kubectl, job: Job, attempt: int) -> list[Object]:
    """The worker pods of an attempt by rank, of each rank the newest."""
    found = kubectl.items("pods", f"--selector={JOB_LABEL}={job.name},{ATTEMPT_LABEL}={attempt}")
    newest = {index_of(pod): pod for pod in sorted(found, key=_created)}
    return in_order(newest.values())


def _created(pod: Object) -> str:
    return str(pod["metadata"].get("creationTimestamp", ""))


def _of_rank(job: Job, rank: int, attempt: int, pods: list[Object]) -> Choice:
    each, count = job.processes_per_node, job.processes_per_node * job.nodes
    if not 0 <= rank < count:
        raise NothingThere(f"--rank {rank}: FineTuneJob {job.name} has the ranks 0 to {count - 1}")
    pod = next((pod for pod in pods if index_of(pod) == rank // each), None)
    if pod is None:
        raise NothingThere(_no_pods(job, attempt))
    first = rank // each * each
    shared = f", shared by the ranks {first} to {first + each - 1}" if each > 1 else ""
    return Choice(pod, f"worker {index_of(pod)} of attempt {attempt}{shared}")


def _culprit(kubectl: Kubectl, job: Job, attempt: int, pods: list[Object]) -> Object | None:
    """The pod that failed first, where the attempt is over and did not succeed."""
    if attempt == job.status.attempt and (not job.finished or job.succeeded):
        return None
    try:
        child = kubectl.document("get", "jobs.batch", job_name(job.name, attempt))
    except NotFound:
        child = {"metadata": {}}
    return culprit(child, pods)


def _of_staging(kubectl: Kubectl, job: Job) -> Choice:
    children = kubectl.items("jobs.batch", f"--selector={ROLE_LABEL}={STAGE}")
    owned = [child["metadata"]["name"] for child in children if _is_owner(job, child)]
    pods = kubectl.items("pods", f"--selector={JOB_NAME_LABEL} in ({','.join(owned)})") if owned else []
    if not pods:
        told = why(job, datetime.now(UTC))
        raise NothingThere(f"FineTuneJob {job.name} is {job.state} and has no pod yet{f': {told}' if told else ''}")
    return Choice(max(pods, key=_created), "the staging pod")


def _is_owner(job: Job, child: Object) -> bool:
    return any(owner["uid"] == job.uid for owner in child["metadata"].get("ownerReferences") or [])


def _no_pods(job: Job, attempt: int) -> str:
    told = why(job, datetime.now(UTC))
    what = f"attempt {attempt} of FineTuneJob {job.name} ({job.state}) has no pods"
    cleaned = job.status.clean_up_time is not None
    reason = "cleanPodPolicy All removed them" if cleaned else "they were removed, or are still to come"
    return f"{what}: {reason}.{f' The job says: {told}' if told else ''}"


def _show(kubectl: Kubectl, choice: Choice) -> None:
    name = choice.pod["metadata"]["name"]
    print(f"# {choice.what} (pod {name})", file=sys.stderr)
    if not has_started(choice.pod):
        raise NothingThere(f"the container of pod {name} has not started: `kubectl finetune status` says why")
    kubectl.pass_through("logs", name, f"--container={CONTAINER}")


def _next(kubectl: Kubectl, name: str, wanted: Wanted, shown: set[str]) -> Choice | None:
    """Wait for a pod with a log that was not shown; None once the job is over without one."""
    quiet = 0
    with closing(follow(kubectl, name)) as sights:
        for sight in sights:
            quiet = 0 if sight.news else quiet + 1
            if sight.trouble or quiet % LOOK_TICKS:
                continue
            try:
                choice = choose(kubectl, sight.job, wanted)
            except NothingThere:
                if sight.job.finished or wanted != Wanted():
                    raise
                continue
            if choice.pod["metadata"]["uid"] not in shown and has_started(choice.pod):
                return choice
            if sight.job.finished:
                return None
    raise AssertionError("follow ends by an error only")


def _follow(kubectl: Kubectl, choice: Choice) -> None:
    """The log until the container has ended, also over a lost connection."""
    name = choice.pod["metadata"]["name"]
    print(f"# {choice.what} (pod {name})", file=sys.stderr)
    since: list[str] = []
    while True:
        try:
            kubectl.pass_through("logs", name, f"--container={CONTAINER}", "--follow", *since)
        except NotFound:
            return
        except Unreachable as error:
            print(f"# the log was interrupted: {error}", file=sys.stderr)
        since = [f"--since-time={datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"]
        if not _goes_on(kubectl, name):
            return


def _goes_on(kubectl: Kubectl, name: str) -> bool:
    """Whether the container still runs; waits for an API server that does not answer. Raises Unreachable."""
    deadline = time.monotonic() + LOST_SECONDS
    while True:
        try:
            pods = kubectl.items("pods", f"--field-selector=metadata.name={name}")
        except Unreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_SECONDS[-1])
        else:
            return any(ended_container(pod) is None for pod in pods)
