"""What keeps a job from starting and stands in no pod's status, told by a real API server and its controllers."""

from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.integration
Object = dict[str, Any]


class Case(NamedTuple):
    """One object that is in the way, and what the job says of it."""

    name: str
    kind: str
    spec: Object
    reason: str
    says: str


CASES = [
    Case(
        "a quota without room for a pod",
        "ResourceQuota",
        {"hard": {"pods": "0"}},
        "QuotaExceeded",
        "Pods cannot be created: exceeded quota: obstacle, requested: pods=1, used: pods=0, limited: pods=0. It goes",
    ),
    Case(
        "a quota without room for a Job",
        "ResourceQuota",
        {"hard": {"count/jobs.batch": "0"}},
        "QuotaExceeded",
        "Exceeded quota: obstacle, requested: count/jobs.batch=1, used: count/jobs.batch=0, limited: ",
    ),
    Case(
        "a LimitRange that the pod does not keep",
        "LimitRange",
        {"limits": [{"type": "Pod", "max": {"memory": "16Mi"}}]},
        "AdmissionDenied",
        "Pods cannot be created: maximum memory usage per Pod is 16Mi",
    ),
    Case(
        "a claim of a StorageClass that does not exist",
        "PersistentVolumeClaim",
        {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "1Mi"}},
            "storageClassName": "no-such-class",
        },
        "VolumeNotBound",
        'PersistentVolumeClaim "models" is not bound: storageclass.storage.k8s.io "no-such-class" not found. Name a',
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_an_obstacle_is_told_and_the_job_goes_on_without_it(drill, case):
    drill = drill()
    claim = case.kind == "PersistentVolumeClaim"
    name = "models" if claim else "obstacle"
    version = "v1"
    drill.kubectl(
        "create",
        "-f",
        "-",
        stdin={"apiVersion": version, "kind": case.kind, "metadata": {"name": name}, "spec": case.spec},
    )
    if case.kind == "ResourceQuota":  # it refuses nothing before it has counted
        counted = lambda found: all("used" in item.get("status", {}) for item in found.values())  # noqa: E731
        drill.watch("resourcequotas", drill.every, reached=lambda found: bool(found) and counted(found))
    drill.submit()
    told = lambda status: drill.condition(status, "Staged").get("reason") == case.reason  # noqa: E731
    status = drill.until("job", told)
    said = lambda status: case.says in drill.condition(status, "Staged")["message"]  # noqa: E731
    status = drill.until("job", said)
    assert status["state"] == "Staging"
    drill.kubectl("delete", case.kind, name, "--wait=false")
    if not claim:
        drill.stage()
        drill.workers()
