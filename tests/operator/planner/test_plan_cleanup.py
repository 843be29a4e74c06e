"""After the end: what still runs is stopped, what is kept and what goes, and when the FineTuneJob itself goes."""

import pytest

LABEL = "kubetune.io/job"


def failed(world, **spec):
    """A job that has failed while its workers run on."""
    world.with_spec(**spec).running()
    world.status["conditions"] = []
    return world.with_status(completionTime="2030-01-01T12:00:00Z").with_condition("Failed", "True", "DeadlineExceeded")


def done(plan):
    """What a plan removes: deleted, removed by name, stopped."""
    return (
        [f"{item.kind}/{item.name}" for item in plan.delete],
        [f"{item.kind}/{item.name}" for item in plan.remove],
        [item.name for item in plan.stop],
    )


RUNNING = {
    "Running": (["Job/bot-a1"], [], []),
    "All": (["Job/bot-a1"], ["ConfigMap/bot-kubetune", "Service/bot"], []),
    "None": ([], [], ["bot-a1"]),
}


@pytest.mark.parametrize("policy", RUNNING)
def test_no_policy_lets_workers_run_on(world, policy):
    assert done(failed(world, cleanPodPolicy=policy).plan()) == RUNNING[policy]


OVER = {
    "Running": ([], [], []),
    "All": (["Job/bot-a1"], ["ConfigMap/bot-kubetune", "Service/bot"], []),
    "None": ([], [], []),
}
HOW = {"complete": lambda world: world.completes(), "failed": lambda world: world.fails()}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("policy", OVER)
def test_an_attempt_that_is_over_goes_with_all_only(world, policy, how):
    HOW[how](failed(world, cleanPodPolicy=policy))
    assert done(world.plan()) == OVER[policy]


@pytest.mark.parametrize("policy", RUNNING)
def test_a_suspended_attempt_is_deleted_under_every_policy(world, policy):
    """Whoever resumes its Job would start workers."""
    failed(world, cleanPodPolicy=policy).jobs[1]["spec"]["suspend"] = True
    deleted, _, stopped = done(world.plan())
    assert (deleted, stopped) == (["Job/bot-a1"], [])


def test_an_attempt_that_was_stopped_is_left_to_end(world):
    failed(world, cleanPodPolicy="None").fails("DeadlineExceeded", target=True)
    assert done(world.plan()) == ([], [], [])


def test_all_is_carried_out_once(world):
    """ConfigMap and Service are not watched: the status says that they are gone."""
    failed(world, cleanPodPolicy="All").fails().next()
    assert world.status["cleanUpTime"] == "2030-01-01T12:00:00Z"
    world.jobs.clear()
    assert done(world.later(300).plan()) == ([], [], [])


def test_a_late_attempt_is_removed_after_the_clean_up_too(world):
    failed(world, cleanPodPolicy="All").fails().next()
    world.attempt(2, seen=False)
    assert done(world.plan())[0] == ["Job/bot-a2"]


def test_the_earlier_attempt_goes_with_all_too(world):
    failed(world, cleanPodPolicy="All").fails().attempt(2).fails()
    assert done(world.plan())[0] == ["Job/bot-a1", "Job/bot-a2"]


def test_a_job_that_is_already_being_deleted_is_not_deleted_again(world):
    failed(world).jobs[1]["metadata"]["deletionTimestamp"] = "2030-01-01T12:00:30Z"
    assert done(world.plan()) == ([], [], [])


def test_nothing_is_removed_before_the_status_says_why(world):
    world.running().with_spec(activeDeadlineSeconds=1, cleanPodPolicy="All").next()
    decided = world.later(1).plan()
    assert decided.status.state == "Failed"
    assert done(decided) == ([], [], [])
    assert done(world.next().plan())[0] == ["Job/bot-a1"]


def test_a_clean_job_is_left_alone_for_ever(world):
    failed(world).fails()
    world.pods.clear()
    world.next()
    decided = world.later(86400).plan()
    assert (done(decided), decided.requeue_after) == (([], [], []), None)
    assert decided.status.to_dict() == world.status


# ---------------------------------------------------------------- time to live


def test_a_finished_job_is_deleted_when_its_time_has_come(world):
    failed(world, ttlSecondsAfterFinished=100).fails()
    before = world.later(60).plan()
    assert (done(before), before.requeue_after) == (([], [], []), 40)
    (deletion,) = world.later(40).plan().delete
    assert deletion == ("FineTuneJob", "bot", "0a1b2c3d-0000-4000-8000-000000000001")


def test_a_job_that_lives_no_second_after_its_end_goes_after_its_status(world):
    world.running().with_spec(ttlSecondsAfterFinished=0).completes(ago=10)
    decided = world.plan()
    assert (decided.status.state, decided.delete) == ("Succeeded", [])
    assert [item.kind for item in world.next().plan().delete] == ["FineTuneJob"]


ALIVE = {
    "has no such time": lambda world: failed(world).fails(),
    "is not over": lambda world: world.running().with_spec(ttlSecondsAfterFinished=0),
    "is being deleted": lambda world: deleting(failed(world, ttlSecondsAfterFinished=0)),
    "has just got more time": lambda world: failed(world, ttlSecondsAfterFinished=100000).fails(),
    "is suspended": lambda world: world.staged().with_spec(suspend=True, ttlSecondsAfterFinished=0),
}


def deleting(world):
    world.metadata = {"deletionTimestamp": "2030-01-01T12:00:00Z"}
    return world


@pytest.mark.parametrize("case", ALIVE)
def test_a_job_is_not_deleted_that(world, case):
    ALIVE[case](world)
    assert world.later(3600).plan().delete == []


def test_a_job_that_could_not_work_is_deleted_too(world):
    world.with_spec(ttlSecondsAfterFinished=10, dataset={"volumePath": "d.jsonl", "packed": True, "shuffle": 3}).next()
    assert world.status["state"] == "Failed"
    assert [item.kind for item in world.later(10).plan().delete] == ["FineTuneJob"]
