"""Children are created, kept, shared, suspended and deleted, and never taken from anybody."""

from typing import Any

import pytest
from aiohttp import web

from kubetune_operator import build, names, stagers
from kubetune_operator.cluster import group_of, stage_group, worker_group
from kubetune_operator.connection import path_of
from kubetune_operator.contents import contents
from kubetune_operator.errors import ApiError, NameTaken

Object = dict[str, Any]


def stage_job_of(job, settings):
    """The staging Job of the model."""
    return stagers.stage_job(job, contents(job.spec)[0], settings)


JOBS = "/apis/batch/v1/namespaces/team/jobs"


def refused(status: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "status": "Failure", "message": message}, status=status)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (("Job", "team", "a"), "/apis/batch/v1/namespaces/team/jobs/a"),
        (("Job",), "/apis/batch/v1/jobs"),
        (("Pod", "team"), "/api/v1/namespaces/team/pods"),
        (("FineTuneJob", "team", "a", "status"), "/apis/kubetune.io/v1alpha1/namespaces/team/finetunejobs/a/status"),
    ],
)
def test_paths_are_the_apis(arguments, path):
    assert path_of(*arguments) == path


def test_worker_jobs_and_pods_are_grouped_by_their_finetunejob(job, attempt_job, pod):
    owner = attempt_job(job(), 3)
    assert group_of(owner) == group_of(pod(owner)) == worker_group("team", "bot")


def test_staging_pods_are_grouped_by_their_job(job, stage_job, pod):
    owner = stage_job(job())
    assert group_of(owner) == group_of(pod(owner)) == stage_group("team", owner["metadata"]["name"])


# ---------------------------------------------------------------- children


async def test_a_child_is_created_under_our_field_manager(cluster, server, job, settings):
    await cluster.create(build.worker_job(job(), 1, settings))
    assert server.requests == [("POST", JOBS)]
    assert server.queries == [{"fieldManager": "kubetune", "fieldValidation": "Strict"}]
    assert cluster.jobs.get("team", "bot-a1")["metadata"]["uid"] == "uid-11", "it is known before its event comes"


async def test_a_job_that_is_already_ours_is_left_as_it_is(cluster, server, job, settings):
    """A restarted operator, or a plan made before the event came: its template cannot be changed anyway."""
    manifest = build.worker_job(job(), 1, settings)
    server.put(f"{JOBS}/bot-a1", {**manifest, "spec": {"as": "before"}})
    await cluster.create(manifest)
    assert [method for method, _ in server.requests] == ["POST", "GET"]
    assert cluster.jobs.get("team", "bot-a1")["spec"] == {"as": "before"}


async def test_a_service_that_is_already_ours_is_brought_up_to_date(cluster, server, job):
    path = "/api/v1/namespaces/team/services/bot"
    server.put(path, {**build.service(job()), "spec": {"old": True}})
    await cluster.create(build.service(job()))
    assert server.requests[-1] == ("PATCH", path)
    assert server.types[-1] == "application/apply-patch+yaml"
    assert server.queries[-1] == {"fieldManager": "kubetune", "force": "true"}


OTHERS = [
    ("nobody", None),
    ("another FineTuneJob", [{"apiVersion": "kubetune.io/v1alpha1", "kind": "FineTuneJob", "name": "b", "uid": "b"}]),
    ("another kind of the name", [{"apiVersion": "apps/v1", "kind": "Deployment", "name": "bot", "uid": "b"}]),
]


@pytest.mark.parametrize("owners", [case[1] for case in OTHERS], ids=[case[0] for case in OTHERS])
async def test_a_name_that_belongs_to_somebody_else_is_not_taken_over(cluster, server, job, owners):
    path = "/api/v1/namespaces/team/services/bot"
    metadata = {"name": "bot", "namespace": "team", **({"ownerReferences": owners} if owners else {})}
    theirs = server.put(path, {"metadata": metadata, "spec": {"theirs": True}})
    with pytest.raises(NameTaken, match=r'Service "bot" exists in namespace team and does not belong.*another name'):
        await cluster.create(build.service(job()))
    assert server.objects[path] == theirs


async def test_a_name_that_was_taken_is_read_before_it_is_asked_for_again(cluster, server, job):
    """A person may need a day to free it: until then nothing is written."""
    path = "/api/v1/namespaces/team/services/bot"
    server.put(path, {"metadata": {"name": "bot", "namespace": "team"}})
    for _ in range(3):
        with pytest.raises(NameTaken):
            await cluster.create(build.service(job()))
    assert [method for method, _ in server.requests].count("POST") == 1
    del server.objects[path]
    await cluster.create(build.service(job()))
    assert server.objects[path]["metadata"]["ownerReferences"]


async def test_what_an_earlier_job_of_the_name_left_is_waited_for(cluster, server, job):
    """The collector removes it within a moment: that is no conflict to tell anybody of."""
    earlier = build.service(job(metadata={"uid": "earlier-0000"}))
    server.put("/api/v1/namespaces/team/services/bot", earlier)
    with pytest.raises(ApiError, match="409: Service bot of a deleted FineTuneJob bot is still to be collected"):
        await cluster.create(build.service(job()))


async def test_a_child_that_vanishes_while_it_is_looked_at_is_tried_again(cluster, server, job):
    server.answers = [refused(409, "already exists"), refused(404, "not found")]
    with pytest.raises(ApiError, match="409: Service bot was deleted"):
        await cluster.create(build.service(job()))


async def test_a_refused_child_says_why(cluster, server, job):
    server.answers = [refused(403, 'services is forbidden: exceeded quota "team"')]
    with pytest.raises(ApiError, match="403: services is forbidden: exceeded quota"):
        await cluster.create(build.service(job()))


SERVICE = "/api/v1/namespaces/team/services/bot"
LONG = 300.0


async def test_a_child_is_looked_at_once_and_then_trusted(cluster, server, job):
    server.put(SERVICE, build.service(job()))
    for _ in range(3):
        await cluster.keep(build.service(job()), LONG)
    assert server.requests == [("GET", SERVICE)]


async def test_a_child_that_has_what_we_want_and_more_is_not_written(cluster, server, job):
    """The server adds defaults, and other people's labels are theirs."""
    found = build.service(job())
    found["spec"] |= {"type": "ClusterIP"}
    found["metadata"]["labels"] = {**found["metadata"]["labels"], "team": "ml"}
    server.put(SERVICE, found)
    await cluster.keep(build.service(job()), LONG)
    assert [method for method, _ in server.requests] == ["GET"]


CHANGED = {
    "a value": {"clusterIP": "10.0.0.1"},
    "a list": {"ports": []},
    "a part that is gone": {"selector": {}},
    "another type": {"ports": {}, "selector": "none"},
}


@pytest.mark.parametrize("case", CHANGED)
async def test_a_child_that_somebody_has_changed_is_brought_back(cluster, server, job, case):
    found = build.service(job())
    found["spec"] |= CHANGED[case]
    server.put(SERVICE, found)
    await cluster.keep(build.service(job()), LONG)
    assert server.requests[-1] == ("PATCH", SERVICE)


async def test_a_child_that_somebody_has_deleted_is_created_again(cluster, server, job):
    await cluster.create(build.service(job()))
    del server.objects[SERVICE]
    await cluster.keep(build.service(job()), LONG)
    assert SERVICE not in server.objects, "the last look was a moment ago"
    await cluster.keep(build.service(job()), 0.0)
    assert SERVICE in server.objects


async def test_a_child_whose_name_somebody_took_is_not_kept(cluster, server, job):
    await cluster.create(build.service(job()))
    server.put(SERVICE, {"metadata": {"name": "bot", "namespace": "team"}, "spec": {"theirs": True}})
    with pytest.raises(NameTaken, match=r'Service "bot" exists'):
        await cluster.keep(build.service(job()), 0.0)
    assert server.objects[SERVICE]["spec"] == {"theirs": True}


async def test_new_content_is_written_at_once(cluster, server, job):
    await cluster.create(build.service(job()))
    await cluster.keep({**build.service(job()), "spec": {"changed": True}}, LONG)
    assert server.objects[SERVICE]["spec"] == {"changed": True}


async def test_a_child_just_created_needs_no_look_to_be_kept(cluster, server, job):
    await cluster.create(build.service(job()))
    await cluster.keep(build.service(job()), LONG)
    assert len(server.requests) == 1


async def test_a_child_that_was_just_created_is_not_created_again_because_another_one_failed(cluster, server, job):
    for _ in range(2):
        await cluster.create(build.service(job()))
    assert [method for method, _ in server.requests] == ["POST"]


async def test_what_was_applied_is_forgotten_with_its_job(cluster, server, job):
    await cluster.create(build.service(job()))
    cluster.forget("team", ["bot"])
    await cluster.keep(build.service(job()), LONG)
    assert server.requests[-1] == ("GET", SERVICE)


async def test_a_shared_child_is_created_under_a_manager_of_its_own(cluster, server, job, settings):
    manifest = stage_job_of(job(), settings)
    await cluster.share(manifest, names.stage_manager(job()))
    assert server.requests == [("POST", JOBS)]
    assert server.queries == [{"fieldManager": f"kubetune-{job().uid}", "fieldValidation": "Strict"}]
    assert cluster.jobs.get("team", manifest["metadata"]["name"]) is not None


async def test_a_shared_child_that_another_job_has_just_created_is_joined_and_not_changed(
    cluster, server, job, settings
):
    manifest = stage_job_of(job(), settings)
    server.put(f"{JOBS}/{manifest['metadata']['name']}", {**manifest, "spec": {"as": "before"}})
    await cluster.share(manifest, names.stage_manager(job()))
    assert [method for method, _ in server.requests] == ["POST", "GET", "PATCH"]
    assert set(server.bodies[-1]) == {"apiVersion", "kind", "metadata"}
    assert set(server.bodies[-1]["metadata"]) == {"name", "namespace", "ownerReferences"}
    assert server.queries[-1] == {"fieldManager": f"kubetune-{job().uid}", "force": "true"}


async def test_a_shared_child_s_name_that_belongs_to_somebody_else_is_not_taken_over(cluster, server, job, settings):
    manifest = stage_job_of(job(), settings)
    name = manifest["metadata"]["name"]
    theirs = server.put(f"{JOBS}/{name}", {"metadata": {"name": name, "namespace": "team"}, "spec": {"theirs": True}})
    with pytest.raises(NameTaken, match=f'Job "{name}" exists in namespace team and was not made by Kubetune'):
        await cluster.share(manifest, names.stage_manager(job()))
    assert server.objects[f"{JOBS}/{name}"] == theirs


async def test_a_shared_child_that_vanishes_while_it_is_looked_at_is_tried_again(cluster, server, job, settings):
    server.answers = [refused(409, "already exists"), refused(404, "not found")]
    with pytest.raises(ApiError, match=r"409: Job kubetune-stage-.* was deleted"):
        await cluster.share(stage_job_of(job(), settings), names.stage_manager(job()))


async def test_joining_alone_is_one_apply(cluster, server, job, settings):
    server.put(f"{JOBS}/{stage_job_of(job(), settings)['metadata']['name']}", stage_job_of(job(), settings))
    await cluster.share(stagers.stage_adoption(job(), contents(job().spec)[0]), names.stage_manager(job()))
    assert [method for method, _ in server.requests] == ["PATCH"]


async def test_stopping_names_the_uid_and_leaves_the_job(cluster, server, job, settings):
    server.put(f"{JOBS}/bot-a1", build.worker_job(job(), 1, settings))
    await cluster.stop("team", "bot-a1", "uid-11")
    assert server.bodies[-1] == {"metadata": {"uid": "uid-11"}, "spec": {"activeDeadlineSeconds": 1}}
    assert server.types[-1] == "application/merge-patch+json"


@pytest.mark.parametrize("status", [404, 409, 422])
async def test_stopping_what_is_gone_is_done(cluster, server, status):
    server.answers = [refused(status, "gone")]
    await cluster.stop("team", "bot-a1", "uid-11")


async def test_stopping_may_be_forbidden(cluster, server):
    server.answers = [refused(403, "no")]
    with pytest.raises(ApiError):
        await cluster.stop("team", "bot-a1", "uid-11")


async def test_what_is_ours_is_removed_by_its_name(cluster, server, job):
    server.put(SERVICE, build.service(job()))
    await cluster.remove("Service", "team", "bot", job().uid)
    assert server.objects == {}
    assert server.bodies[-1]["preconditions"] == {"uid": "uid-11"}


async def test_what_is_not_ours_is_not_removed(cluster, server, job):
    server.put(SERVICE, {"metadata": {"name": "bot", "namespace": "team"}})
    await cluster.remove("Service", "team", "bot", job().uid)
    assert SERVICE in server.objects


async def test_removing_what_is_gone_is_done(cluster, server, job):
    await cluster.remove("Service", "team", "bot", job().uid)
    assert server.requests == [("GET", SERVICE)]


async def test_joining_what_has_just_gone_is_tried_again(cluster, server, job):
    """The server takes the apply for a creation without a template: that is no fault of the user's."""
    server.answers = [refused(422, "spec.template.spec.containers: Required value")]
    joined = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "s", "namespace": "team"}}
    with pytest.raises(ApiError, match="409: Job s was deleted while it was looked at"):
        await cluster.share(joined, "manager")


async def test_suspending_names_the_uid(cluster, server, job, settings):
    """A Job of the same name that came later must not be suspended."""
    server.put(f"{JOBS}/bot-a1", build.worker_job(job(), 1, settings))
    await cluster.suspend("team", "bot-a1", "uid-11", True)
    assert server.bodies[-1] == {"metadata": {"uid": "uid-11"}, "spec": {"suspend": True}}
    assert server.types[-1] == "application/merge-patch+json"
    assert cluster.jobs.get("team", "bot-a1")["spec"]["suspend"] is True


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "not found"), (409, "conflict"), (422, "metadata.uid: field is immutable")],
    ids=["gone", "changed", "a namesake"],
)
async def test_suspending_what_is_gone_is_left_to_the_next_look(cluster, server, status, message):
    server.answers = [refused(status, message)]
    await cluster.suspend("team", "bot-a1", "uid-11", True)


async def test_suspending_may_be_refused(cluster, server):
    server.answers = [refused(422, "spec.suspend: says the queue")]
    with pytest.raises(ApiError):
        await cluster.suspend("team", "bot-a1", "uid-11", True)


async def test_deleting_names_the_uid_and_leaves_the_rest_to_the_collector(cluster, server, job, settings):
    server.put(f"{JOBS}/bot-a1", build.worker_job(job(), 1, settings))
    await cluster.delete("Job", "team", "bot-a1", "uid-11")
    assert server.bodies[-1] == {"propagationPolicy": "Background", "preconditions": {"uid": "uid-11"}}
    assert server.objects == {}


async def test_deleting_may_name_the_version_too(cluster, server):
    server.answers = [refused(409, "the ResourceVersion in the precondition does not match")]
    await cluster.delete("FineTuneJob", "team", "bot", "uid-1", "77")
    assert server.bodies[-1]["preconditions"] == {"uid": "uid-1", "resourceVersion": "77"}


@pytest.mark.parametrize("uid", ["uid-11", "another"], ids=["gone", "a namesake"])
async def test_deleting_what_is_gone_is_done(cluster, server, job, settings, uid):
    if uid == "another":
        server.put(f"{JOBS}/bot-a1", build.worker_job(job(), 1, settings))
    await cluster.delete("Job", "team", "bot-a1", uid)


async def test_deleting_may_be_forbidden(cluster, server):
    server.answers = [refused(403, "no")]
    with pytest.raises(ApiError):
        await cluster.delete("Job", "team", "bot-a1", "uid-11")
