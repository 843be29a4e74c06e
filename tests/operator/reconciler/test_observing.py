"""What belongs to a FineTuneJob among all that is seen, and what holds when an answer or an event does not come."""

from typing import Any

import pytest
from tests.operator.reconciler.conftest import versioned

from kubetune_contract.progress import Progress, ProgressReport
from kubetune_operator.errors import Unreachable

Object = dict[str, Any]


async def test_children_of_a_deleted_namesake_are_not_ours(stage, body, job, attempt_job, pod):
    """Its Job may be about to be collected; only its live pods hold the next gang up."""
    stage = await stage(body())
    theirs = attempt_job(job(metadata={"uid": "earlier-0000"}), 1)
    stage.add(stage.cluster.jobs, theirs)
    stage.add(stage.cluster.pods, pod(theirs, 0, "Running"))
    stage.add(stage.cluster.pods, pod(theirs, 1, "Failed"))
    observed = stage.reconciler.observe(job())
    assert observed.attempt_jobs == {}
    assert [item["metadata"]["name"] for item in observed.pods] == ["bot-a1-0-x0"]


async def test_the_last_sight_of_a_pod_counts_if_its_job_was_ours(stage, body, job, attempt_job, pod):
    stage = await stage(body())
    owner = stage.add(stage.cluster.jobs, attempt_job(job(), 1))
    gone = stage.add(stage.cluster.pods, pod(owner, 0))
    stage.cluster.pods._remove(gone)
    assert len(stage.reconciler.observe(job()).gone_pods) == 1
    stage.cluster.jobs._remove(owner)
    assert len(stage.reconciler.observe(job()).gone_pods) == 1, "also when the Job is gone"


def view(stage, job):
    """The one staging Job as the planner sees it."""
    (found,) = stage.reconciler.observe(job()).stages.values()
    return found


async def test_a_staging_job_is_shared_while_another_job_waits_for_it(stage, body, job, stage_job):
    stage = await stage(body())
    staging = stage_job(job())
    staging["metadata"]["ownerReferences"].append({"kind": "FineTuneJob", "name": "other", "uid": "other-uid"})
    stage.add(stage.cluster.jobs, staging)
    assert not view(stage, job).shared
    stage.store.offer(body("other", metadata={"uid": "other-uid"}))
    assert view(stage, job).shared


async def test_pods_of_an_earlier_staging_job_of_the_name_tell_nothing(stage, body, job, stage_job, pod):
    stage = await stage(body())
    earlier = stage_job(job())
    earlier["metadata"]["uid"] = "earlier"
    stage.add(stage.cluster.pods, pod(earlier))
    stage.add(stage.cluster.jobs, stage_job(job()))
    assert view(stage, job).pods == []


async def test_the_events_of_a_status_whose_answer_was_lost_are_posted_once_it_is_seen(stage, body):
    stage = await stage(body(suspend=True))
    write = stage.cluster.write_status

    async def lose(known: Object, status: Object) -> Object:
        stage.cluster.write_status = write
        await write(known, status)
        raise Unreachable("connection reset")

    stage.cluster.write_status = lose
    with pytest.raises(Unreachable):
        await stage.reconcile()
    assert stage.api.written == ["PATCH finetunejobs/bot/status"]
    stage.store.offer(stage.api.body)
    await stage.reconcile()
    assert stage.api.written == ["PATCH finetunejobs/bot/status", "POST events"]
    await stage.reconcile()
    assert len(stage.api.written) == 2


async def test_an_attempt_is_not_given_up_because_its_watch_is_late(stage, staged_body, job, attempt_job):
    stage = await stage(staged_body(attempt=1, attemptStartTime="2030-01-01T12:00:00Z"))
    stage.api.jobs["bot-a1"] = versioned(attempt_job(job(), 1), 50)
    await stage.reconcile()
    assert stage.status.get("restarts", 0) == 0
    assert stage.cluster.jobs.get("team", "bot-a1") is not None


async def test_an_attempt_whose_job_is_gone_is_lost(stage, staged_body):
    stage = await stage(staged_body(attempt=1, attemptStartTime="2030-01-01T12:00:00Z"))
    await stage.reconcile()
    assert (stage.status["attempt"], stage.status["restarts"]) == (2, 1)


async def test_nothing_of_a_job_is_told_of_its_namesake(stage, staged_body, job, attempt_job, pod):
    """It was deleted and created again before anybody looked."""
    stage = await stage(staged_body(attempt=1, attemptStartTime="2030-01-01T12:00:00Z"))
    stage.add(stage.cluster.jobs, attempt_job(job(), 1))
    report = ProgressReport(progress=Progress(step=40, total_steps=50, epoch=0.8, percentage=80))
    stage.progress.put("team/bot", 1, "uid", report, now=0)
    await stage.reconcile()
    assert stage.status["progress"]["step"] == 40
    again = versioned(staged_body(attempt=1, attemptStartTime="2030-01-01T12:00:00Z"), 900)
    again["metadata"]["uid"] = "another-uid"
    stage.api.body = again
    stage.store.offer(again)
    later = attempt_job(job(metadata={"uid": "another-uid"}), 1)
    later["metadata"] |= {"resourceVersion": "901", "uid": "another-job"}
    stage.add(stage.cluster.jobs, later)
    await stage.reconcile()
    assert "progress" not in stage.status
