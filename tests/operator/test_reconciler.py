"""From a key to writes: a reconciler with a real client against a small HTTP server."""

import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio import client as kubernetes

from kubetune_contract.progress import Progress, ProgressReport, Result, TerminationMessage
from kubetune_contract.staging import StagedModel
from kubetune_operator.cluster import Cluster
from kubetune_operator.connection import Connection
from kubetune_operator.errors import ApiError, Unreachable
from kubetune_operator.metrics import Metrics
from kubetune_operator.progress import ProgressStore
from kubetune_operator.reconciler import Reconciler
from kubetune_operator.store import Store

Object = dict[str, Any]
STAGED = StagedModel(path="models/llama", architecture="LlamaForCausalLM", parameters=1, bytes=1)
CONDITION = {"lastTransitionTime": "2030-01-01T12:00:00Z", "reason": "Why", "message": ""}


def versioned(body: Object, version: int) -> Object:
    return {**body, "metadata": {**body["metadata"], "resourceVersion": str(version)}}


class Api:
    """Just enough of the API server for one FineTuneJob: what was written is in `writes`."""

    def __init__(self, body: Object) -> None:
        self.body: Object | None = body
        self.writes: list[tuple[str, str, Object]] = []
        self.refuse: dict[str, web.Response] = {}
        self.version = 100
        self.jobs: dict[str, Object] = {}
        """Jobs that can be read, by name."""
        self.is_taken = True
        """Whether the Service of the name is somebody else's."""
        self.events: list[Object] = []
        self.events_read = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        return app

    async def handle(self, request: web.Request) -> web.Response:
        text = await request.text()
        body = json.loads(text) if text else {}
        last = request.path.rsplit("/", 1)[-1]
        if request.method == "GET":
            return await self.read(request.path)
        what = request.path.split("/namespaces/team/")[-1]
        self.writes.append((request.method, what, body))
        if what in self.refuse:
            return self.refuse.pop(what)
        self.version += 1
        if last == "status":
            assert self.body is not None
            self.body = versioned({**self.body, "status": body["status"]}, self.version)
            return web.json_response(self.body)
        manifest = {"spec": {}, **body}
        manifest["metadata"] = {"uid": f"uid-{self.version}", **manifest.get("metadata", {})}
        return web.json_response(versioned(manifest, self.version))

    async def read(self, path: str) -> web.Response:
        if "finetunejobs" in path and self.body is not None:
            return web.json_response(self.body)
        if path.endswith("/events"):
            self.events_read += 1
            return web.json_response({"items": self.events})
        if "/jobs/" in path and path.rsplit("/", 1)[-1] in self.jobs:
            return web.json_response(self.jobs[path.rsplit("/", 1)[-1]])
        if path.endswith("/services/bot") and self.is_taken:
            return web.json_response({"metadata": {"name": "bot", "uid": "theirs"}})
        return web.json_response({"message": "not found"}, status=404)

    @property
    def written(self) -> list[str]:
        """The writes, in short."""
        return [f"{method} {what}" for method, what, _ in self.writes]


class Stage:
    """A reconciler between an API server and caches that the test fills by hand."""

    def __init__(self, api: Api, cluster: Cluster, settings: Any) -> None:
        self.api = api
        self.cluster = cluster
        self.store = Store()
        self.progress = ProgressStore(settings.progress_write_seconds)
        self.metrics = Metrics()
        self.reconciler = Reconciler(cluster, self.store, self.progress, settings, self.metrics)
        if api.body is not None:
            self.store.offer(api.body)

    async def reconcile(self) -> float | None:
        return await self.reconciler.reconcile("team/bot")

    @property
    def status(self) -> Object:
        assert self.api.body is not None
        return self.api.body.get("status", {})

    def condition(self, kind: str) -> Object:
        return next(item for item in self.status["conditions"] if item["type"] == kind)

    def add(self, cache: Any, manifest: Object) -> Object:
        manifest["metadata"].setdefault("resourceVersion", "50")
        cache._put(manifest)
        return manifest


@pytest.fixture
async def stage(settings, tmp_path):
    """stage(body): a reconciler for that FineTuneJob."""
    (tmp_path / "ca.crt").write_text("PEM")
    chosen = settings.model_copy(update={"ca_file": tmp_path / "ca.crt"})
    cleanups = []

    async def make(body: Object) -> Stage:
        api = Api(body)
        server = TestServer(api.app())
        await server.start_server()
        configuration = kubernetes.Configuration()
        configuration.host = str(server.make_url("")).rstrip("/")
        cluster = Cluster(Connection(kubernetes.ApiClient(configuration)), None, lambda _: None)
        cleanups.extend([cluster.close, server.close])
        return Stage(api, cluster, chosen)

    yield make
    for cleanup in cleanups:
        await cleanup()


@pytest.fixture
def staged_body(body):
    """A FineTuneJob whose model is staged."""

    def make(**more: Any) -> Object:
        status = {
            "observedGeneration": 1,
            "staged": STAGED.to_dict(),
            "conditions": [{"type": "Staged", "status": "True", **CONDITION}],
            **more,
        }
        return body(status=status)

    return make


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


# ---------------------------------------------------------------- what is refused


async def test_a_refusal_of_anything_but_a_new_job_is_tried_again(stage, staged_body, attempt_job, job):
    """Such as a suspension: nobody would look again after an answer that only stands in the status."""
    stage = await stage(staged_body(attempt=1, attemptStartTime="2030-01-01T12:00:00Z"))
    stage.store.offer(versioned({**stage.api.body, "spec": {**stage.api.body["spec"], "suspend": True}}, 90))
    stage.add(stage.cluster.jobs, attempt_job(job(), 1, startTime="2030-01-01T12:00:00Z"))
    stage.api.refuse["jobs/bot-a1"] = web.json_response({"message": "not allowed"}, status=403)
    with pytest.raises(ApiError, match="not allowed"):
        await stage.reconcile()


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


# ---------------------------------------------------------------- answers that do not come, and namesakes


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
