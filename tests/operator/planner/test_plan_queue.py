"""Jobs in a queue of Kueue: it alone suspends and resumes them, and the status says what they wait for."""

import pytest

from kubetune_operator.names import QUEUE_LABEL

QUEUE = {"name": "research"}
NO_QUOTA = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor h100"


@pytest.fixture
def queued(world):
    """A job in a queue whose Job was made and is held by Kueue."""
    return world.with_spec(queue=QUEUE).staged().attempt(1)


def say(world, decided, reason, message, at="2030-01-01T11:00:00Z"):
    """Kueue posts an Event on the Workload that the plan asked about."""
    (about,) = decided.inquiries
    event = {"reason": reason, "message": message, "lastTimestamp": at, "metadata": {}}
    world.events[about] = (*world.events.get(about, ()), event)


def admitted(world):
    world.jobs[1]["spec"]["suspend"] = False
    return world.worker(0, ready=True).worker(1, ready=True)


def test_the_job_is_made_suspended_and_kueue_resumes_it(world):
    made = world.with_spec(queue=QUEUE).staged().plan().apply[-1]
    assert (made["kind"], made["spec"]["suspend"], made["metadata"]["labels"][QUEUE_LABEL]) == ("Job", True, "research")


def test_nobody_but_kueue_resumes_a_job_that_waits(queued, told):
    decided = queued.plan()
    assert (decided.suspend, decided.delete) == ([], [])
    assert told(decided, "Started") == (
        "False",
        "WaitingForQuota",
        'Job bot-a1 waits for quota in queue "research": Kueue has not admitted it yet. If it stays so, see whether '
        "Kueue runs and the LocalQueue exists: kubectl -n team describe localqueue research.",
    )
    assert decided.status.state == "Starting"


def test_what_it_waits_for_is_told_in_kueues_words(queued, told):
    decided = queued.plan()
    say(queued, decided, "Pending", "older", at="2030-01-01T10:00:00Z")
    say(queued, decided, "Pending", NO_QUOTA)
    say(queued, decided, "CreatedWorkload", "not about waiting", at="2030-01-01T12:00:00Z")
    message = told(queued.plan(), "Started")[2]
    assert message == f'Job bot-a1 waits for quota in queue "research": {NO_QUOTA}.'


def test_kueues_object_is_asked_about_by_the_name_that_kueue_gives_it(queued):
    (about,) = queued.plan().inquiries
    assert about.kind == "Workload"
    assert about.name == "job-bot-a1-d6940"


def test_once_admitted_it_runs_like_any_other(queued, told):
    queued.next()
    decided = admitted(queued).plan()
    assert told(decided, "Running")[:2] == ("True", "Running")
    assert (decided.inquiries, decided.suspend) == ((), [])


def test_waiting_for_quota_counts_against_no_deadline(queued):
    queued.with_spec(activeDeadlineSeconds=60, failurePolicy={"startupDeadlineSeconds": 60})
    assert queued.next().later(3600).plan().status.state == "Starting"


def test_a_preempted_gang_saves_and_stops_first(queued, told):
    admitted(queued.next()).next()
    queued.jobs[1]["spec"]["suspend"] = True
    decided = queued.plan()
    assert told(decided, "Started") == (
        "False",
        "WaitingForQuota",
        "Kueue takes the quota back: the workers save and stop, 2 worker pods still to end.",
    )
    assert told(decided, "Running")[0] == "False"
    assert (decided.suspend, decided.delete) == ([], [])


def test_a_preempted_gang_goes_on_in_the_same_attempt(queued, told):
    admitted(queued.next()).reports(12, checkpoint=10).next()
    queued.jobs[1]["spec"]["suspend"] = True
    queued.pods.clear()
    status = queued.next().plan().status
    assert (status.attempt, status.restarts, status.disruptions, status.progress.step) == (1, 0, 0, 10)
    assert told(admitted(queued).plan(), "Running")[0] == "True"


# --- our own suspension -----------------------------------------------------------------------------------------------


def test_suspending_is_written_down_before_the_job_is_deleted(queued, told):
    decided = admitted(queued.next()).with_spec(suspend=True).plan()
    assert (decided.suspend, decided.delete) == ([], [])
    assert (decided.status.attempt, decided.status.attempt_start_time) == (2, None)
    assert told(decided, "Suspended")[:2] == ("False", "Suspending")


def test_then_the_job_is_deleted_and_gives_its_quota_back(queued, told):
    decided = admitted(queued.next()).with_spec(suspend=True).next().plan()
    assert [deletion.name for deletion in decided.delete] == ["bot-a1"]
    assert told(decided, "Suspended")[:2] == ("False", "Suspending")


def test_it_is_suspended_when_its_pods_have_gone(queued, told):
    admitted(queued.next()).with_spec(suspend=True).next()
    queued.jobs.clear()
    queued.pods.clear()
    decided = queued.plan()
    assert (decided.status.state, decided.status.restarts) == ("Suspended", 0)
    assert decided.apply == []


def test_a_job_that_waits_for_quota_leaves_the_queue_too(queued):
    decided = queued.next().with_spec(suspend=True).next().plan()
    assert [deletion.name for deletion in decided.delete] == ["bot-a1"]


def test_resuming_queues_anew_once_the_old_pods_have_gone(queued):
    admitted(queued.next()).with_spec(suspend=True).next().next()
    queued.with_spec(suspend=False)
    assert queued.plan().apply == []  # the old gang may still write
    queued.jobs.clear()
    queued.pods.clear()
    made = queued.plan().apply[-1]
    assert (made["metadata"]["name"], made["spec"]["suspend"]) == ("bot-a2", True)


def test_an_operator_that_dies_between_the_two_writes_counts_no_crash(queued):
    """Whoever deletes the Job, the status already says that its attempt is over."""
    admitted(queued.next()).with_spec(suspend=True).next()
    queued.jobs.clear()
    queued.pods.clear()
    status = queued.with_spec(suspend=False).plan().status
    assert (status.restarts, status.attempt) == (0, 2)


def test_a_job_that_ended_while_it_was_suspended_is_judged_first(queued):
    admitted(queued.next()).with_spec(suspend=True).fails()
    queued.ends(0, 65, '{"reason": "InvalidData", "message": "bad"}')
    assert queued.plan().status.state == "Failed"


# --- staging in a queue -----------------------------------------------------------------------------------------------


@pytest.fixture
def stage_queue(world):
    world.settings = world.settings.model_copy(update={"stage_queue": "small"})
    return world


def held(world):
    world.staging()
    world.stage["metadata"]["labels"][QUEUE_LABEL] = "small"
    world.stage["spec"]["suspend"] = True
    return world


def test_staging_queues_where_the_settings_say_so(stage_queue):
    (made,) = stage_queue.plan().apply
    assert made["metadata"]["labels"][QUEUE_LABEL] == "small"
    assert "suspend" not in made["spec"]  # Kueue's webhook suspends it


def test_staging_waits_for_quota(stage_queue, told):
    decided = held(stage_queue).plan()
    assert (decided.suspend, decided.delete) == ([], [])
    reason, message = told(decided, "Staged")[1:]
    assert reason == "WaitingForQuota"
    assert 'waits for quota in queue "small"' in message


def test_suspended_staging_leaves_the_queue(stage_queue):
    decided = held(stage_queue).with_spec(suspend=True).plan()
    assert ([deletion.kind for deletion in decided.delete], decided.suspend) == (["Job"], [])
