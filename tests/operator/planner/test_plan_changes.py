"""Workers that were changed while the job was suspended: the old Job goes, then the next one comes."""

import pytest

FOUR = {"workers": {"nodes": 4}}
LARGER = {"workers": {"nodes": 2, "resources": {"limits": {"memory": "32Gi"}}}}


def suspended(world):
    """A suspended job with a checkpoint, whose status was written."""
    world.running().reports(12, checkpoint=10).next()
    world.report = None
    world.with_spec(suspend=True).attempt(1, suspend=True).pods.clear()
    return world.next()


def test_a_change_alone_does_nothing_while_the_job_is_suspended(world):
    suspended(world).with_spec(**FOUR)
    decided = world.plan()
    assert (decided.apply, decided.suspend, decided.delete) == ([], [], [])
    assert (decided.status.state, decided.status.attempt) == ("Suspended", 1)


def test_on_resumption_the_next_attempt_takes_over_and_nothing_is_counted(world, told):
    decided = suspended(world).with_spec(suspend=False, **FOUR).plan()
    assert decided.suspend == [], "the old Job is not resumed, not even for a moment"
    assert (decided.apply, decided.delete) == ([], []), "the status is written first"
    status = decided.status
    assert (status.attempt, status.restarts, status.disruptions, status.state) == (2, 0, 0, "Restarting")
    assert told(decided, "Started") == (
        "False",
        "WorkersChanged",
        "The workers have changed from 2 to 4 processes, which see the same batches but draw dropout anew and round "
        "sums in another order: attempt 2 goes on from the checkpoint of step 10.",
    )
    assert [event[:2] for event in decided.events] == [("Normal", "WorkersChanged")]


def test_the_next_attempt_waits_until_the_old_job_is_gone(world, kinds):
    """Never two live attempts: the old Job is suspended, and still somebody could resume it."""
    suspended(world).with_spec(suspend=False, **FOUR).next()
    decided = world.plan()
    assert [item.name for item in decided.delete] == ["bot-a1"]
    assert (decided.apply, decided.requeue_after) == ([], 1)
    world.jobs.clear()
    decided = world.plan()
    assert kinds(decided) == ["ConfigMap/bot-kubetune", "Service/bot", "Job/bot-a2"]
    assert decided.apply[2]["spec"]["completions"] == 4
    assert decided.apply[2]["spec"]["suspend"] is False


def test_a_gang_that_was_never_seen_suspended_is_replaced_too(world, kinds):
    """Suspended, changed and resumed while no operator was there to see it: it runs on as it was."""
    world.running().reports(12, checkpoint=10).next()
    decided = world.with_spec(**FOUR).plan()
    assert (decided.status.attempt, decided.status.restarts, decided.status.progress.step) == (2, 0, 10)
    world.report = None
    decided = world.next().plan()
    assert ([item.name for item in decided.delete], decided.apply) == (["bot-a1"], [])
    world.jobs.clear()
    for pod in world.pods:
        pod["metadata"]["deletionTimestamp"] = "2030-01-01T12:02:00Z"
    assert world.plan().apply == [], "its pods still save"
    world.pods.clear()
    assert "Job/bot-a2" in kinds(world.plan())


def test_other_resources_of_as_many_processes_change_no_number(world, told):
    decided = suspended(world).with_spec(suspend=False, **LARGER).plan()
    assert told(decided, "Started")[2] == (
        "The workers have changed (workers.resources, nodes or gpusPerNode): "
        "attempt 2 goes on from the checkpoint of step 10."
    )


def test_nodes_for_gpus_is_a_change_of_the_pods_only(world, told):
    suspended(world.with_spec(workers={"nodes": 2, "gpusPerNode": 2}))
    decided = world.with_spec(suspend=False, workers={"nodes": 1, "gpusPerNode": 4}).plan()
    assert told(decided, "Started")[:2] == ("False", "WorkersChanged")
    assert "processes" not in told(decided, "Started")[2]


def test_a_change_before_the_first_attempt_needs_no_replacement(world):
    world.with_spec(suspend=True).staged().next()
    decided = world.with_spec(suspend=False, **FOUR).plan()
    assert (decided.status.attempt, decided.apply[2]["metadata"]["name"]) == (1, "bot-a1")
    assert decided.apply[2]["spec"]["completions"] == 4


def test_a_change_between_two_attempts_needs_no_replacement(world):
    world.running().ends(0, 1).ends(1, 1).fails().next()
    world.with_spec(suspend=True).later(60).next()
    decided = world.with_spec(suspend=False, **FOUR).plan()
    assert (decided.status.attempt, decided.status.restarts) == (2, 1)
    assert decided.apply[2]["spec"]["completions"] == 4


def test_a_restarted_operator_finds_the_old_job_of_the_same_number(world):
    """It died after the creation and before the status: the Job was made for other workers than the spec has now."""
    world.staged().attempt(1, seen=False)
    decided = world.with_spec(**FOUR).plan()
    assert (decided.status.attempt, decided.apply) == (2, [])


SAME = {
    "an operator of a new version": lambda world: template(world, image="registry.example/trainer:2"),
    "a Job of a version that wrote no such mark": lambda world: world.jobs[1]["metadata"].pop("annotations"),
    "a deadline": lambda world: world.with_spec(activeDeadlineSeconds=100000),
}


def template(world, **container):
    world.jobs[1]["spec"]["template"]["spec"]["containers"][0] |= container


@pytest.mark.parametrize("case", SAME)
def test_no_reason_to_stop_workers(world, case):
    world.running()
    SAME[case](world)
    assert world.plan().status.attempt in (0, 1)
    assert world.plan().delete == []


def test_changed_back_is_not_changed(world):
    suspended(world).with_spec(**FOUR).next()
    decided = world.with_spec(suspend=False, workers={"nodes": 2}).plan()
    assert [tuple(item) for item in decided.suspend] == [("bot-a1", "job-uid-1", False)]
    assert decided.status.attempt == 1
