"""Children are created, kept, shared, suspended and deleted, and never taken from anybody."""

from typing import Any

import pytest
from aiohttp import web

from kubetune_operator import build, names
from kubetune_operator.cluster import group_of, stage_group, worker_group
from kubetune_operator.connection import path_of
from kubetune_operator.errors import ApiError, NameTaken

Object = dict[str, Any]
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
    assert server.queries == [{"fieldManager": "kubetune"}]
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


@pytest.mark.parametrize("owners", [None, [{"uid": "another", "kind": "FineTuneJob", "name": "bot"}]])
async def test_a_name_that_belongs_to_somebody_else_is_not_taken_over(cluster, server, job, owners):
    path = "/api/v1/namespaces/team/services/bot"
    metadata = {"name": "bot", "namespace": "team", **({"ownerReferences": owners} if owners else {})}
    theirs = server.put(path, {"metadata": metadata, "spec": {"theirs": True}})
    with pytest.raises(NameTaken, match=r'Service "bot" exists in namespace team and does not belong.*another name'):
        await cluster.create(build.service(job()))
    assert server.objects[path] == theirs


async def test_a_child_that_vanishes_while_it_is_looked_at_is_tried_again(cluster, server, job):
    server.answers = [refused(409, "already exists"), refused(404, "not found")]
    with pytest.raises(ApiError, match="409: Service bot was deleted"):
        await cluster.create(build.service(job()))


async def test_a_refused_child_says_why(cluster, server, job):
    server.answers = [refused(403, 'services is forbidden: exceeded quota "team"')]
    with pytest.raises(ApiError, match="403: services is forbidden: exceeded quota"):
        await cluster.create(build.service(job()))


async def test_a_child_is_kept_with_one_write_as_long_as_it_does_not_change(cluster, server, job):
    manifest = build.service(job())
    for _ in range(3):
        await cluster.keep(manifest)
    assert len(server.requests) == 1
    await cluster.keep({**manifest, "spec": {"changed": True}})
    assert len(server.requests) == 2


async def test_a_child_just_created_needs_no_write_to_be_kept(cluster, server, job):
    await cluster.create(build.service(job()))
    await cluster.keep(build.service(job()))
    assert len(server.requests) == 1


async def test_what_was_applied_is_forgotten_with_its_job(cluster, server, job):
    await cluster.keep(build.service(job()))
    cluster.forget("team", ["bot"])
    await cluster.keep(build.service(job()))
    assert len(server.requests) == 2


async def test_a_shared_child_is_applied_under_a_manager_of_its_own(cluster, server, job, settings):
    manifest = build.stage_job(job(), settings)
    await cluster.share(manifest, names.stage_manager(job()))
    assert server.queries == [{"fieldManager": f"kubetune-{job().uid}", "force": "true"}]
    assert cluster.jobs.get("team", manifest["metadata"]["name"]) is not None


async def test_suspending_names_the_uid(cluster, server, job, settings):
    """A Job of the same name that came later must not be suspended."""
    server.put(f"{JOBS}/bot-a1", build.worker_job(job(), 1, settings))
    await cluster.suspend("team", "bot-a1", "uid-11", True)
    assert server.bodies[-1] == {"metadata": {"uid": "uid-11"}, "spec": {"suspend": True}}
    assert server.types[-1] == "application/merge-patch+json"
    assert cluster.jobs.get("team", "bot-a1")["spec"]["suspend"] is True


async def test_deleting_names_the_uid_and_leaves_the_rest_to_the_collector(cluster, server, job, settings):
    server.put(f"{JOBS}/bot-a1", build.worker_job(job(), 1, settings))
    await cluster.delete("Job", "team", "bot-a1", "uid-11")
    assert server.bodies[-1] == {"propagationPolicy": "Background", "preconditions": {"uid": "uid-11"}}
    assert server.objects == {}


@pytest.mark.parametrize("uid", ["uid-11", "another"], ids=["gone", "a namesake"])
async def test_deleting_what_is_gone_is_done(cluster, server, job, settings, uid):
    if uid == "another":
        server.put(f"{JOBS}/bot-a1", build.worker_job(job(), 1, settings))
    await cluster.delete("Job", "team", "bot-a1", uid)


async def test_deleting_may_be_forbidden(cluster, server):
    server.answers = [refused(403, "no")]
    with pytest.raises(ApiError):
        await cluster.delete("Job", "team", "bot-a1", "uid-11")
