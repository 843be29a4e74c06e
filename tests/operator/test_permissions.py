"""What a FineTuneJob may ask for only where the settings allow it."""

import pytest

from kubetune_operator.permissions import refusals
from kubetune_operator.plan import Observed, plan

ASKED = {
    "nothing": ({}, {}, []),
    "an account": (
        {"serviceAccountName": "admin"},
        {},
        [
            "spec.workers.serviceAccountName: ServiceAccount admin is not allowed by the operator's setting "
            "KUBETUNE_ALLOW_SERVICE_ACCOUNTS: take it out, or ask who installed the operator to allow it"
        ],
    ),
    "an account beside those that are allowed": (
        {"serviceAccountName": "admin"},
        {"allow_service_accounts": ["trainer"]},
        ["spec.workers.serviceAccountName: ServiceAccount admin is not allowed"],
    ),
    "an allowed account": ({"serviceAccountName": "trainer"}, {"allow_service_accounts": ["a", "trainer"]}, []),
    "any account where all are allowed": ({"serviceAccountName": "x"}, {"allow_service_accounts": ["*"]}, []),
    "the nodes' network": (
        {"hostNetwork": True},
        {},
        ["spec.workers.hostNetwork: the nodes' own network is not allowed by the operator's setting "],
    ),
    "the nodes' network where it is allowed": ({"hostNetwork": True}, {"allow_host_network": True}, []),
    "pinned memory": (
        {"rdma": True},
        {"allow_host_network": True},
        ["spec.workers.rdma: the capability IPC_LOCK is not allowed by the operator's setting KUBETUNE_ALLOW_RDMA"],
    ),
    "pinned memory where it is allowed": ({"rdma": True}, {"allow_rdma": True}, []),
    "everything": (
        {"serviceAccountName": "x", "hostNetwork": True, "rdma": True},
        {},
        ["spec.workers.serviceAccountName", "spec.workers.hostNetwork", "spec.workers.rdma"],
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_a_job_that_asks_for(job, settings, case):
    workers, allowed, expected = ASKED[case]
    found = list(refusals(job(workers=workers), settings.model_copy(update=allowed)))
    assert len(found) == len(expected)
    for told, beginning in zip(found, expected, strict=True):
        assert told.startswith(beginning)


def test_the_job_fails_before_anything_is_created(job, settings, now):
    decided = plan(job(workers={"hostNetwork": True}), Observed(), settings, now, "")
    failed = next(condition for condition in decided.status.conditions if condition.type == "Failed")
    assert (failed.status, failed.reason) == ("True", "InvalidConfig")
    assert "KUBETUNE_ALLOW_HOST_NETWORK" in failed.message
    assert decided.apply == []


def test_what_runs_goes_on_where_a_setting_is_taken_back(job, settings, now, attempt_job):
    running = {
        "attempt": 1,
        "attemptStartTime": "2030-01-01T11:00:00Z",
        "staged": {"path": "models/llama", "architecture": "Llama", "parameters": 1, "bytes": 1},
    }
    one = job(workers={"hostNetwork": True}, status=running)
    decided = plan(one, Observed(attempt_jobs={1: attempt_job(one)}), settings, now, "")
    assert decided.status.state == "Starting"
