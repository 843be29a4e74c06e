"""Pods that the Job controller cannot create, and children that the API server refuses.

Cases called `real` have the essential fields of what Kubernetes v1.35 wrote when the case was made on a node. The
others cannot be made on one small node; their words are those of the documentation or source that the case names.
"""

import pytest
from tests.operator.obstacles.conftest import EARLIER, NOON, event

from kubetune_operator.obstacles import inquiries, not_created, refusal

REFUSED = [
    (
        "real: a quota that is used up",
        'pods "bot-a1-1-67v6j" is forbidden: exceeded quota: team-gpus, requested: requests.cpu=10m, used: '
        "requests.cpu=10m, limited: requests.cpu=10m",
        "QuotaExceeded",
        "pods cannot be created: exceeded quota: team-gpus, requested: requests.cpu=10m, used: requests.cpu=10m, "
        "limited: requests.cpu=10m. It goes on as soon as there is room: free some of the quota, have it raised, or "
        "ask for less.",
    ),
    (
        "real: a quota that wants limits",
        'pods "bot-a1-0-bxqg6" is forbidden: failed quota: team: must specify limits.memory for: main',
        "QuotaExceeded",
        "must specify limits.memory for: main. The quota counts only pods that say what they need",
    ),
    (
        "real: Pod Security",
        'pods "bot-a1-0-2nhjr" is forbidden: violates PodSecurity "restricted:latest": privileged',
        "AdmissionDenied",
        'pods cannot be created: violates PodSecurity "restricted:latest": privileged. Have the',
    ),
    (
        "real: a LimitRange",
        'pods "bot-a1-0-jwcfx" is forbidden: maximum memory usage per Container is 64Mi, but limit is 128Mi',
        "AdmissionDenied",
        "A LimitRange of the namespace bounds it",
    ),
    (
        "real: a LimitRange whose default limit is too small",
        'Pod "kubetune-stage-2912-mdtvb" is invalid: spec.containers[0].resources.requests: Invalid value: "256Mi": '
        "must be less than or equal to memory limit of 16Mi",
        "AdmissionDenied",
        'pods cannot be created: spec.containers[0].resources.requests: Invalid value: "256Mi": must be less',
    ),
    (
        "real: no such ServiceAccount",
        'pods "bot-a1-0-" is forbidden: error looking up service account team/no: serviceaccount "no" not found',
        "AdmissionDenied",
        "Create the ServiceAccount, or name one that exists.",
    ),
    (
        "real: no such PriorityClass",
        'pods "bot-a1-0-" is forbidden: no PriorityClass with name nothing was found',
        "AdmissionDenied",
        "Create the PriorityClass",
    ),
    (
        "a webhook that says no (docs: Dynamic Admission Control)",
        'admission webhook "policy.example.com" denied the request: no label team',
        "AdmissionDenied",
        'pods cannot be created: admission webhook "policy.example.com" denied the request: no label team. Ask whoever',
    ),
    (
        "a webhook that does not answer (docs: Dynamic Admission Control)",
        'Internal error occurred: failed calling webhook "policy.example.com": connect: connection refused',
        "AdmissionDenied",
        "The webhook does not answer: whoever runs it must repair it.",
    ),
]


@pytest.mark.parametrize(("words", "reason", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_why_the_job_controller_cannot_create_pods(attempt_job, job, words, reason, says):
    child = attempt_job(job(), 1, startTime=EARLIER)
    asked, _ = inquiries(child, 1, [], NOON)
    older = event("FailedCreate", "something else", at="11:00:00")
    found = not_created(child, {asked[0]: [event("FailedCreate", f"Error creating: {words}"), older]})
    assert found.reason == reason
    assert says in found.told


def test_a_child_that_the_api_server_refuses_is_told_alike():
    """Real: a quota on Jobs."""
    words = (
        'jobs.batch "bot-a1" is forbidden: exceeded quota: few-jobs, requested: count/jobs.batch=1, used: 0, limited: 0'
    )
    found = refusal(words)
    assert (found.reason, found.message) == ("QuotaExceeded", words.partition("forbidden: ")[2])


def test_a_job_without_such_an_event_only_takes_its_time(attempt_job, job):
    child = attempt_job(job(), 1, startTime=EARLIER)
    asked, _ = inquiries(child, 1, [], NOON)
    assert not_created(child, {asked[0]: [event("SuccessfulCreate", "Created pod", "Normal")]}) is None
