"""From a key to writes: what is written, in what order, and what is not."""

import pytest
from aiohttp import web
from tests.operator.reconciler.conftest import versioned

from kubetune_contract.progress import Progress, ProgressReport, Result, TerminationMessage


async def test_a_new_job_is_three_writes(stage, body):
    """The staging Job, the status; a new staging is no event yet."""
    stage = await stage(body())
    await stage.reconcile()
    assert [line.split("-")[0] for line in stage.api.written] == [
        "POST jobs",
        "PATCH finetunejobs/bot/status",
    ]
    assert stage.status["state"] == "Staging"
    assert stage.store.get("team/bot")["status"]["state"] == "Staging", "the own write is known before its event"


async def test_a_staged_job_gets_its_children_then_its_status(stage, staged_body):
    stage = await stage(staged_body())
    await stage.reconcile()
    assert stage.api.written == [
        "POST configmaps",
        "POST services",
        "POST jobs",
        "PATCH finetunejobs/bot/status",
    ]
    assert stage.status["attempt"] == 1
    assert stage.api.writes[0][2]["data"]["ca.crt"] == "PEM"


def mounted(folder, serial, text):
    """What the kubelet does with a Secret: a new folder, and a link that points to it at once."""
    (folder / str(serial)).mkdir()
    (folder / str(serial) / "ca.crt").write_text(text)
    (folder / "next").symlink_to(str(serial))
    (folder / "next").rename(folder / "..data")


def rewritten(folder, serial, text):
    """What others do."""
    (folder / "ca.crt").write_text(text)


@pytest.mark.parametrize("renew", [mounted, rewritten])
async def test_a_renewed_authority_reaches_the_workers_and_is_read_once(
    stage, staged_body, job, attempt_job, tmp_path, monkeypatch, renew
):
    stage = await stage(staged_body())
    authority = tmp_path / "ca.crt"
    if renew is mounted:
        authority.unlink()
        authority.symlink_to("..data/ca.crt")
        mounted(tmp_path, 1, "PEM")
    reads = []
    read = type(authority).read_text

    def counted(path, *arguments, **options):
        reads.extend([path] if path == authority else [])
        return read(path, *arguments, **options)

    monkeypatch.setattr(type(authority), "read_text", counted)
    await stage.reconcile()
    stage.add(stage.cluster.jobs, attempt_job(job(), 1))
    for _ in range(3):
        await stage.reconcile()
    assert reads == [authority]
    renew(tmp_path, 2, "NEW")
    for _ in range(3):
        await stage.reconcile()
    maps = [body["data"]["ca.crt"] for _, what, body in stage.api.writes if what.startswith("configmaps")]
    assert (maps, reads) == (["PEM", "NEW"], [authority] * 2)


async def test_a_written_status_is_planned_from_again(stage, body, settings):
    """Its own event is no news, and a new status may make the next step possible."""
    stage = await stage(body(suspend=True))
    assert await stage.reconcile() == settings.debounce_seconds
    assert await stage.reconcile() is None


async def test_nothing_is_written_when_nothing_changes(stage, staged_body, job, attempt_job, pod):
    stage = await stage(staged_body())
    owner = stage.add(stage.cluster.jobs, attempt_job(job(), 1))
    for index in (0, 1):
        stage.add(stage.cluster.pods, pod(owner, index, ready=True))
    await stage.reconcile()
    assert stage.status["state"] == "Running"
    before = len(stage.api.writes)
    for _ in range(3):
        await stage.reconcile()
    assert len(stage.api.writes) == before


async def test_a_worker_more_is_written_together_with_what_comes_next(
    stage, staged_body, job, attempt_job, pod, settings
):
    stage = await stage(staged_body())
    owner = stage.add(stage.cluster.jobs, attempt_job(job(), 1))
    await stage.reconcile()
    before = len(stage.api.writes)
    stage.add(stage.cluster.pods, pod(owner, 0, ready=True))
    assert 0 < await stage.reconcile() <= settings.progress_write_seconds
    assert len(stage.api.writes) == before
    stage.add(stage.cluster.pods, pod(owner, 1, ready=True))
    await stage.reconcile()
    assert stage.api.written[before:] == ["PATCH finetunejobs/bot/status"]
    assert (stage.status["state"], stage.status["workers"]["ready"]) == ("Running", 2)


async def test_no_job_is_created_for_a_finetunejob_that_is_gone(stage, staged_body):
    """The event of its deletion may still be under way."""
    stage = await stage(staged_body())
    stage.api.body = None
    assert await stage.reconcile() == 0
    assert stage.api.written == []
    assert stage.store.get("team/bot") is None
    assert await stage.reconcile() is None


async def test_no_job_is_created_from_an_old_body(stage, staged_body):
    """Somebody has suspended it a moment ago."""
    stage = await stage(staged_body())
    newer = versioned(staged_body(), 90)
    newer["spec"] = {**newer["spec"], "suspend": True}
    stage.api.body = newer
    assert await stage.reconcile() == 0
    assert stage.api.written == []
    await stage.reconcile()
    assert stage.api.written == ["PATCH finetunejobs/bot/status", "POST events"]
    assert stage.status["state"] == "Suspended"


async def test_no_job_is_created_for_a_namesake(stage, staged_body):
    stage = await stage(staged_body())
    stage.api.body = versioned(staged_body(), 90)
    stage.api.body["metadata"]["uid"] = "another"
    assert await stage.reconcile() == 0
    assert stage.api.written == []


async def test_a_status_that_somebody_else_changed_is_read_again(stage, body):
    stage = await stage(body(suspend=True))
    stage.api.refuse["finetunejobs/bot/status"] = web.json_response({"message": "modified"}, status=409)
    stage.api.body = versioned(body(suspend=True, metadata={"generation": 2}), 90)
    with pytest.raises(Exception, match="409: modified"):
        await stage.reconcile()
    assert stage.store.get("team/bot")["metadata"]["resourceVersion"] == "90"
    await stage.reconcile()
    assert stage.status["observedGeneration"] == 2


async def test_no_event_is_posted_for_a_status_that_was_not_written(stage, body):
    stage = await stage(body(suspend=True))
    stage.api.refuse["finetunejobs/bot/status"] = web.json_response({"message": "down"}, status=500)
    with pytest.raises(Exception, match="500: down"):
        await stage.reconcile()
    assert stage.api.written == ["PATCH finetunejobs/bot/status"]


async def test_an_event_that_cannot_be_posted_changes_nothing(stage, body, caplog):
    """The namespace may be about to go."""
    stage = await stage(body(suspend=True))
    stage.api.refuse["events"] = web.json_response({"message": "namespace is being terminated"}, status=403)
    await stage.reconcile()
    assert stage.status["state"] == "Suspended"
    assert "cannot post event Suspended: 403" in caplog.text


async def test_the_verdict_is_written_before_workers_are_removed(stage, staged_body, job, attempt_job, pod, condition):
    stage = await stage(staged_body())
    owner = stage.add(stage.cluster.jobs, attempt_job(job(), 1))
    words = condition("PodScheduled", "False", "Unschedulable", 'persistentvolumeclaim "tuned" not found')
    waiting = pod(owner, 0, "Pending", conditions=(words,), creationTimestamp="2020-01-01T00:00:00Z")
    stage.add(stage.cluster.pods, waiting)
    await stage.reconcile()
    assert stage.api.written == ["PATCH finetunejobs/bot/status", "POST events"]
    await stage.reconcile()
    assert stage.api.written[2:] == ["DELETE jobs/bot-a1"]


async def test_a_report_reaches_status(stage, staged_body, job, attempt_job, pod):
    stage = await stage(staged_body(attempt=1, attemptStartTime="2030-01-01T12:00:00Z"))
    owner = stage.add(stage.cluster.jobs, attempt_job(job(), 1))
    stage.add(stage.cluster.pods, pod(owner, 0, ready=True))
    report = ProgressReport(progress=Progress(step=5, total_steps=50, epoch=0.1, percentage=10, loss=2.0))
    stage.progress.put("team/bot", 1, "uid", report, now=0)
    await stage.reconcile()
    assert stage.status["progress"]["step"] == 5
    assert stage.status["display"] == {"progress": "10%", "loss": "2"}


async def test_a_finished_training_is_shown_in_metrics_no_more(
    stage, staged_body, job, attempt_job, pod, condition, terminated
):
    stage = await stage(staged_body(attempt=1, attemptStartTime="2030-01-01T12:00:00Z"))
    stage.metrics.training("team", "bot", Progress(step=5, total_steps=50, epoch=0.1, percentage=10))
    owner = stage.add(stage.cluster.jobs, attempt_job(job(), 1, (condition("Complete"),)))
    word = TerminationMessage(reason="Done", message="done", result=Result(adapter_path="adapter", steps=50, tokens=1))
    stage.add(stage.cluster.pods, pod(owner, 0, "Succeeded", state=terminated(0, message=word.to_json())))
    await stage.reconcile()
    assert stage.status["state"] == "Succeeded"
    labels = {"namespace": "team", "name": "bot"}
    assert stage.metrics.registry.get_sample_value("kubetune_training_step", labels) is None


async def test_events_are_read_before_the_status_is_written(stage, staged_body, attempt_job, job):
    """One status write says why the Job controller creates no pods; looking again writes nothing."""
    stage = await stage(staged_body(attempt=1, attemptStartTime="2030-01-01T12:00:00Z"))
    child = attempt_job(job(), 1, startTime="2020-01-01T12:00:00Z")
    stage.add(stage.cluster.jobs, child)
    stage.api.events = [
        {"reason": "FailedCreate", "message": 'Error creating: pods "bot-a1-0-x" is forbidden: exceeded quota: gpus'}
    ]
    await stage.reconcile()
    assert stage.condition("Started")["reason"] == "QuotaExceeded"
    assert stage.condition("Started")["message"].startswith(
        "0 of 2 workers run: pods cannot be created: exceeded quota"
    )
    written = len(stage.api.writes)
    again = await stage.reconcile()
    assert (len(stage.api.writes), stage.api.events_read) == (written, 1)
    assert 0 < again <= 5
