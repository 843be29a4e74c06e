"""The vocabulary of the drills: what is done, what is waited for, what must be left."""

import json
from collections.abc import Callable
from typing import Any

from tests.drills.drill import Object, Step, condition_of
from tests.drills.scene import PATIENCE, Scene, active, is_ready

from kubetune_operator.__main__ import LOST

LONG: Object = {"training": {"maxSteps": 20000}, "checkpoint": {"everySteps": 20}}
"""Of a job that runs until the drill is over."""
KILL = """
n=0
until kill -9 $(cat /proc/1/task/*/children) 2>/dev/null; do
  n=$((n+1)); [ $n -lt 300 ] || { echo "there is no training process" >&2; exit 1; }
  sleep 0.2
done
"""
"""Kills the training process as soon as there is one; the launcher, the container's first process, says so and ends."""


# ---------------------------------------------------------------- what is waited for


def state(name: str) -> Step:
    """Until the job's state has that name."""
    return lambda scene: _ignore(scene.until(lambda status: status.get("state") == name, f"state {name}"))


def says(kind: str, reason: str, word: str = "") -> Step:
    """Until a condition has that reason, and its message that word."""

    def reached(status: Object) -> bool:
        found = condition_of(status, kind)
        return found.get("reason") == reason and word in found["message"]

    return lambda scene: _ignore(scene.until(reached, f"{kind} with reason {reason} {word}"))


def holds(kind: str) -> Step:
    """Until a condition is True."""
    reached = lambda status: condition_of(status, kind).get("status") == "True"  # noqa: E731
    return lambda scene: _ignore(scene.until(reached, kind))


def checkpoint(step: int) -> Step:
    """Until a checkpoint of that step or a later one is known."""
    reached = lambda status: (status.get("checkpoint") or {}).get("step", 0) >= step  # noqa: E731
    return lambda scene: _ignore(scene.until(reached, f"a checkpoint of step {step}"))


def all_ready(count: int = 1) -> Step:
    """Until so many workers run."""
    reached = lambda pods: sum(map(is_ready, pods)) == count  # noqa: E731
    return lambda scene: _ignore(scene.until_pods(reached, f"{count} ready workers"))


def all_pending(count: int = 1) -> Step:
    """Until so many workers wait."""
    reached = lambda pods: sum(pod["status"].get("phase") == "Pending" for pod in pods) == count  # noqa: E731
    return lambda scene: _ignore(scene.until_pods(reached, f"{count} pending workers"))


def staging_runs(scene: Scene) -> None:
    """Until the staging container runs."""
    scene.until_stage_pods(lambda pods: any(map(is_ready, pods)), "a staging pod that runs")


def staging_pod(scene: Scene) -> None:
    """Until the staging pod is there."""
    scene.until_stage_pods(lambda pods: bool(active(pods)), "a staging pod")


def runs_again(attempt: int = 2) -> Step:
    """Until that attempt runs."""
    reached = lambda status: (status.get("state"), status.get("attempt")) == ("Running", attempt)  # noqa: E731
    return lambda scene: _ignore(scene.until(reached, f"attempt {attempt} runs"))


def staging_done(scene: Scene) -> None:
    """Until the staging Job is complete, whatever the operator makes of it."""
    scene.until_stage_pods(lambda pods: any(pod["status"].get("phase") == "Succeeded" for pod in pods), "staging done")


def workers_end(phase: str) -> Step:
    """Until the first worker is in that phase, whatever the operator makes of it."""
    reached = lambda pods: any(pod["status"].get("phase") == phase for pod in pods)  # noqa: E731
    return lambda scene: _ignore(scene.until_pods(reached, f"a worker that {phase}"))


def gone(scene: Scene) -> None:
    """Until the job, its Jobs and their pods are gone."""
    nothing = lambda found: None if scene.owned(found.values()) else True  # noqa: E731
    for watch in (scene.site.jobs_of_users, scene.site.child_jobs, scene.site.pods):
        watch.until(nothing, PATIENCE, f"{scene.name} is gone")


def then(_: Scene) -> None:
    """Nothing is done: the next thing follows from what is there."""


def _ignore(_: object) -> None:
    """A step has no value."""


# ---------------------------------------------------------------- what is done


def kubectl(*words: str) -> Step:
    """Run kubectl in the drill's namespace; {name}, {worker}, {worker1} and {stage} are filled in."""
    return lambda scene: _ignore(scene.kubectl(*(filled(word, scene) for word in words)))


def filled(word: str, scene: Scene) -> str:
    """The word with names filled in."""
    names: dict[str, Callable[[], str]] = {
        "{name}": lambda: scene.name,
        "{worker}": scene.worker,
        "{worker1}": lambda: scene.worker(1),
        "{stage}": scene.until_stage_job,
        "{attempt}": lambda: f"{scene.name}-a{max(1, scene.status().get('attempt', 1))}",
    }
    for name, value in names.items():
        if name in word:
            word = word.replace(name, value())
    return word


def delete(what: str, *options: str) -> Step:
    """Delete an object of the drill's namespace, as a person would."""
    return kubectl("delete", what, "--wait=false", *options)


def kill(index: int = 0) -> Step:
    """Kill a worker's training process."""
    return lambda scene: _ignore(scene.kubectl("exec", scene.worker(index), "--", "sh", "-c", KILL))


def freeze(scene: Scene) -> None:
    """Stop the first worker's training process without ending it. Its pod is killed when the drill is over."""
    pod = scene.worker()
    scene.kubectl("exec", pod, "--", "sh", "-c", "kill -STOP $(cat /proc/1/task/*/children)")
    end = ["delete", "pod", pod, "--ignore-not-found", "--force", "--grace-period=0"]
    scene.undo.append(lambda: scene.kubectl(*end))


def patch(**spec: Any) -> Step:
    """Change fields of the spec; a refusal is kept."""
    return lambda scene: scene.patch(spec)


suspend = patch(suspend=True)
resume = patch(suspend=False)


def remove(scene: Scene) -> None:
    """Delete the FineTuneJob."""
    scene.kubectl("delete", "finetunejob", scene.name, "--wait=false")


def evict(scene: Scene) -> None:
    """Evict a worker through the API, as `kubectl drain` does."""
    pod = scene.worker()
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": scene.namespace}}
    path = f"/api/v1/namespaces/{scene.namespace}/pods/{pod}/eviction"
    scene.kube.kubectl("create", "--raw", path, "--filename", "-", stdin=json.dumps(eviction))


def make(manifest: Callable[[Scene], Object]) -> Step:
    """Create an object that is not the job's; it goes when the drill is over."""
    return lambda scene: scene.make(manifest(scene))


def offer(resource: str, amount: int) -> Step:
    """Let the node offer so much of a resource of that name, until the drill is over."""

    def step(scene: Scene) -> None:
        name = f"{scene.name}-{resource}"
        scene.site.offer(name, amount)
        scene.undo.append(lambda: scene.site.withdraw(name))

    return step


def try_to(*words: str) -> Step:
    """Run kubectl and keep its refusal."""
    return lambda scene: scene.try_to(*(filled(word, scene) for word in words))


# ---------------------------------------------------------------- what must be left


def nothing_held(scene: Scene) -> None:
    """No worker or staging pod is pending or running."""
    scene.until_pods(lambda pods: not active(pods), "no worker pod is held")
    if scene.stage_jobs():
        scene.until_stage_pods(lambda pods: not active(pods), "no staging pod is held")


def counted(**fields: int) -> Step:
    """Numbers of the status, such as attempt=2, restarts=1."""

    def check(scene: Scene) -> None:
        found = {name: scene.status().get(name, 0) for name in fields}
        assert found == fields, f"{found} in place of {fields}"

    return check


def left(**kinds: int) -> Step:
    """So many children of these kinds, such as job=1, configmap=1; those that have to go get half a minute."""

    def check(scene: Scene) -> None:
        for kind in (kind for kind, count in kinds.items() if count == 0):
            for child in scene.children():
                if child.startswith((f"{kind}/", f"{kind}.")):
                    scene.kubectl("wait", "--for=delete", child, "--timeout=30s")
        children = [child.partition("/")[0].partition(".")[0] for child in scene.children()]
        found = {kind: children.count(kind) for kind in kinds}
        assert found == kinds, f"{found} in place of {kinds}"

    return check


def still(state_name: str, seconds: float = 5) -> Step:
    """The state stays what it is for so long: no event of these seconds changes it."""

    def check(scene: Scene) -> None:
        changed = lambda job: (job or {}).get("status", {}).get("state") != state_name  # noqa: E731
        sight = scene.site.jobs_of_users.seen(scene.key, changed, scene.site.now(), seconds)
        assert sight is None, f"{state_name} did not last: {scene.told()}"

    return check


def note_operator(scene: Scene) -> None:
    """Keep in mind which pods the operator has, and how often they were started."""
    scene.notes["operator"] = scene.site.operator_lives()


def only_left_the_lead(scene: Scene) -> None:
    """The operator's pods are those that were noted. What was started anew had ended by itself, for want of its Lease.

    A container that its liveness probe ends gets SIGTERM, upon which the operator exits with 0.
    """
    before, now = scene.notes["operator"], scene.site.operator_lives()
    assert set(now) == set(before), f"pods {sorted(now)} in place of {sorted(before)}"
    ended = {name: code for name, (starts, code) in now.items() if starts != before[name][0]}
    assert set(ended.values()) <= {LOST}, f"the operator's exit codes are {ended}"


def event(reason: str, most: int = 1) -> Step:
    """The job has an event of that reason, and not more than so many."""

    def check(scene: Scene) -> None:
        which = f"--field-selector=involvedObject.uid={scene.job()['metadata']['uid']},reason={reason}"
        found = json.loads(scene.kubectl("get", "events", which, "--output=json"))["items"]
        told = sum(item.get("count") or 1 for item in found)
        assert 1 <= told <= most, f"{told} events {reason}"

    return check
