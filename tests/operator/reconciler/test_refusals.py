"""What the API server refuses and what the operator cannot read: told, and tried again where that may help."""

import pytest
from aiohttp import web
from tests.operator.reconciler.conftest import versioned

from kubetune_operator.errors import ApiError


async def test_a_spec_that_cannot_be_read_fails_with_every_problem(stage, body):
    stage = await stage(body(model=None, workers={"nodes": 0}))
    await stage.reconcile()
    assert stage.condition("Failed")["reason"] == "InvalidConfig"
    assert "spec.model: a value is required" in stage.condition("Failed")["message"]
    assert "spec.workers.nodes: input should be greater" in stage.condition("Failed")["message"]


async def test_a_new_job_with_fields_of_a_newer_crd_is_told_and_not_failed(stage, body):
    stage = await stage(body(epochs=3))
    await stage.reconcile()
    assert stage.condition("Staged")["reason"] == "OperatorOutdated"
    assert "spec.epochs: unknown field" in stage.condition("Staged")["message"]


async def test_a_running_job_that_got_fields_of_a_newer_crd_is_left_alone(stage, staged_body):
    """The CRD of an upgrade, with its defaults, is there before the new operator."""
    running = staged_body()
    running["spec"]["epochs"] = 3
    stage = await stage(running)
    await stage.reconcile()
    assert stage.api.writes == []


async def test_a_taken_name_is_told_and_given_up_when_it_is_free(stage, staged_body):
    stage = await stage(staged_body())
    stage.api.refuse["services"] = web.json_response({"message": "exists"}, status=409)
    await stage.reconcile()
    started = stage.condition("Started")
    assert started["reason"] == "NameConflict"
    assert 'Service "bot" exists in namespace team and does not belong to this FineTuneJob' in started["message"]
    assert "POST jobs" not in stage.api.written
    stage.api.is_taken = False
    await stage.reconcile()
    assert "POST jobs" in stage.api.written
    await stage.reconcile()
    assert stage.condition("Started")["reason"] != "NameConflict"


async def test_a_refusal_of_anything_but_a_new_job_is_tried_again(stage, staged_body, attempt_job, job):
    """Such as a suspension: nobody would look again after an answer that only stands in the status."""
    stage = await stage(staged_body(attempt=1, attemptStartTime="2030-01-01T12:00:00Z"))
    stage.store.offer(versioned({**stage.api.body, "spec": {**stage.api.body["spec"], "suspend": True}}, 90))
    stage.add(stage.cluster.jobs, attempt_job(job(), 1, startTime="2030-01-01T12:00:00Z"))
    stage.api.refuse["jobs/bot-a1"] = web.json_response({"message": "not allowed"}, status=403)
    with pytest.raises(ApiError, match="not allowed"):
        await stage.reconcile()


REFUSALS = [
    ("a quota on Jobs", 403, "jobs.batch is forbidden: exceeded quota: few", "QuotaExceeded"),
    ("a webhook that says no", 400, 'admission webhook "a" denied the request: no', "AdmissionDenied"),
    ("a webhook that does not answer", 500, 'Internal error: failed calling webhook "a"', "AdmissionDenied"),
]


@pytest.mark.parametrize(("status", "words", "reason"), [case[1:] for case in REFUSALS], ids=[c[0] for c in REFUSALS])
async def test_a_child_that_is_refused_is_told_and_tried_again(stage, body, settings, status, words, reason):
    stage = await stage(body())
    for _ in range(2):
        stage.api.refuse["jobs"] = web.json_response({"message": words}, status=status)
        last = await stage.reconcile()
    assert stage.condition("Staged")["reason"] == reason
    assert last == settings.restart_backoff_seconds
    await stage.reconcile()
    assert stage.condition("Staged")["reason"] == "Staging"
