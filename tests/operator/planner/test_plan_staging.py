"""The staging phase, case by case, and what comes before it."""

from datetime import timedelta

import pytest
from tests.operator.planner.conftest import stamp

from kubetune_contract.progress import TerminationMessage
from kubetune_operator.errors import InvalidJob
from kubetune_operator.plan import refuse


@pytest.fixture
def done(message):
    """The last word of a staging pod that did its work."""
    staged = {"path": "models/llama", "architecture": "LlamaForCausalLM", "parameters": 134515008, "bytes": 269000000}
    return message("Done", "staged", staged=staged)


@pytest.fixture
def complete(world):
    """Conditions of a complete Job."""
    return world.make.condition("Complete", "True", "CompletionsReached")


@pytest.fixture
def failed(world):
    """failed(ago): conditions of a failed Job."""

    def make(ago: float = 0.0, kind: str = "Failed", reason: str = "PodFailurePolicy", message: str = ""):
        time = (world.now - timedelta(seconds=ago)).strftime("%Y-%m-%dT%H:%M:%SZ")
        return world.make.condition(kind, "True", reason, message, lastTransitionTime=time)

    return make


# ---------------------------------------------------------------- a new job


def test_a_new_job_starts_with_the_staging_of_its_model(world, told):
    decided = world.plan()
    assert [item["kind"] for item in decided.apply] == ["Job"]
    assert decided.apply[0]["metadata"]["name"].startswith("kubetune-stage-")
    what = 'Checking the model at models/llama on claim "models": the staging pod is starting.'
    assert told(decided, "Staged") == ("False", "Staging", what)
    assert decided.status.state == "Staging"
    assert decided.status.observed_generation == 1


def test_a_download_is_called_a_download(world, told):
    world.with_spec(model={"volumePath": None, "huggingFace": {"repo": "meta-llama/Llama-3.1-8B", "revision": "v2"}})
    assert told(world.plan(), "Staged")[2].startswith('Downloading meta-llama/Llama-3.1-8B (v2) to claim "models"')


def test_a_suspended_new_job_creates_nothing(world, told):
    decided = world.with_spec(suspend=True).plan()
    assert decided.apply == []
    assert decided.status.state == "Suspended"
    assert told(decided, "Suspended")[2] == "Nothing was started yet."


def test_a_resumed_new_job_starts_staging(world, told):
    world.with_spec(suspend=True).next().with_spec(suspend=False)
    decided = world.plan()
    assert len(decided.apply) == 1
    assert told(decided, "Suspended")[:2] == ("False", "Resumed")
    assert decided.status.state == "Staging"


INVALID = [
    (
        "an unknown field",
        {"training": {"epocs": 3}},
        "spec.training.epocs: unknown field; did you mean epochs?",
    ),
    (
        "a rule between two fields",
        {"method": "Full", "adapter": {"rank": 4}},
        "adapter does not go with method Full",
    ),
    (
        "several problems at once",
        {"training": {"epochs": 0}, "checkpoint": {"keep": 0}},
        "; spec.checkpoint.keep",
    ),
]


@pytest.mark.parametrize(("changes", "says"), [case[1:] for case in INVALID], ids=[case[0] for case in INVALID])
def test_a_configuration_that_cannot_work_fails_before_anything_is_created(world, told, changes, says):
    decided = world.with_spec(**changes).plan()
    status, reason, message = told(decided, "Failed")
    assert (status, reason) == ("True", "InvalidConfig")
    assert says in message
    assert (decided.apply, decided.status.state, decided.requeue_after) == ([], "Failed", None)
    assert [event.reason for event in decided.events] == ["Failed"]


def test_a_spec_that_cannot_be_read_is_refused(world, told):
    """The CRD's schema refuses it first, unless somebody replaced it."""
    error = InvalidJob(["spec.model: a value is required", "spec.storage: a value is required"])
    decided = refuse(world.job, error.problems, world.settings, world.now)
    assert told(decided, "Failed")[2] == "spec.model: a value is required; spec.storage: a value is required"


def test_a_finished_job_is_not_refused_again(world):
    world.with_condition("Succeeded", "True", "Done").with_status(state="Succeeded", observedGeneration=1)
    decided = refuse(world.job, ["spec: anything"], world.settings, world.now)
    assert (decided.status.state, decided.events) == ("Succeeded", [])


# ---------------------------------------------------------------- at work


def test_a_staging_pod_that_starts_is_told(world, told):
    world.staging().stage_pod("Pending")
    assert told(world.plan(), "Staged")[2].endswith('on claim "models": the staging pod is starting.')


def test_a_staging_pod_at_work_is_told(world, told):
    decided = world.staging().stage_pod(ready=True).plan()
    assert told(decided, "Staged")[2] == 'Checking the model at models/llama on claim "models".'
    assert decided.apply == []


def test_an_owned_staging_job_is_not_applied_again(world):
    """Its template may differ from what this version of the operator would build."""
    assert world.staging().plan().apply == []


def test_another_jobs_staging_is_joined(world):
    decided = world.staging(owned=False).plan()
    assert [item["metadata"]["ownerReferences"][0]["uid"] for item in decided.apply] == [world.job.uid]
    assert "spec" not in decided.apply[0]


def test_a_staging_whose_pod_has_succeeded_is_not_joined_any_more(world):
    """The Job controller is about to write its end: each change of the Job meanwhile makes it try again later."""
    met = world.make.condition("SuccessCriteriaMet", "True", "CompletionsReached")
    assert world.staging(met, owned=False).plan().apply == []


def test_the_staging_pod_that_cannot_be_scheduled_is_told_in_the_schedulers_words(world, told):
    words = world.make.condition("PodScheduled", "False", "Unschedulable", "0/1 nodes are available: 1 Too many pods.")
    decided = world.staging().stage_pod("Pending", conditions=(words,)).plan()
    assert told(decided, "Staged") == (
        "False",
        "Unschedulable",
        "The staging pod cannot be scheduled: 0/1 nodes are available: 1 Too many pods. "
        "Wait for other pods to end, or add nodes.",
    )
    assert decided.status.state == "Staging"


def test_the_staging_pod_without_its_secret_is_told(world, told):
    waiting = world.make.waiting("CreateContainerConfigError", 'secret "hub" not found')
    decided = world.staging().stage_pod("Pending", state=waiting).plan()
    assert told(decided, "Staged")[1:] == (
        "SecretMissing",
        'The staging pod cannot start its container: secret "hub" not found. '
        'Create Secret "hub" in this namespace, or name one that exists. The pod then starts by itself.',
    )


def test_a_models_claim_that_stays_missing_ends_the_job(world, told):
    words = world.make.condition("PodScheduled", "False", "Unschedulable", 'persistentvolumeclaim "models" not found')
    world.staging().stage_pod("Pending", conditions=(words,), creationTimestamp="2030-01-01T12:00:00Z")
    early = world.later(14).plan()
    assert (early.status.state, told(early, "Staged")[1], early.requeue_after) == ("Staging", "VolumeMissing", 1)
    decided = world.later(1).plan()
    assert decided.status.state == "Failed"
    assert told(decided, "Failed")[2].startswith(
        'PersistentVolumeClaim "models" (spec.storage.models.claimName) does not exist in namespace team: create it'
    )


def test_one_claim_for_both_names_both_fields(world, told):
    world.with_spec(storage={"models": {"claimName": "all"}, "output": {"claimName": "all"}})
    words = world.make.condition("PodScheduled", "False", "Unschedulable", 'persistentvolumeclaim "all" not found')
    world.staging().stage_pod("Pending", conditions=(words,), creationTimestamp="2030-01-01T11:00:00Z")
    assert "(spec.storage.models.claimName and spec.storage.output.claimName)" in told(world.plan(), "Failed")[2]


def test_a_try_that_failed_is_told_while_the_job_tries_again(world, told):
    """The Job waits ever longer between its tries: nobody should have to look at its pods."""
    word = TerminationMessage(reason="SourceUnavailable", message="the hub does not answer").to_json()
    world.staging().stage_pod("Failed", state=world.make.terminated(82, message=word))
    message = told(world.plan(), "Staged")[2]
    assert message.endswith(" One try has failed: The staging pod ended with exit code 82: the hub does not answer.")
    world.stage_pod("Failed", state=world.make.terminated(1, message="boom")).stage_pod(ready=True)
    assert (
        "2 tries have failed, the last one so: The staging pod ended with exit code" in told(world.plan(), "Staged")[2]
    )


# ---------------------------------------------------------------- its end


def test_a_staging_that_ended_after_the_job_came_is_taken_as_it_is(world, done, complete, kinds):
    """The join was late, on a busy API server: what the Job says is as new as a second one would be."""
    world.with_condition("Staged", "False", "Staging").staging(complete, owned=False)
    world.stage["status"]["completionTime"] = stamp(world.now)
    world.stage_pod("Succeeded", state=world.make.terminated(0, message=done))
    decided = world.plan()
    assert decided.delete == []
    assert kinds(decided)[-1] == "Job/bot-a1"


def test_an_old_staging_is_not_removed_before_those_who_joined_it_have_read_it(world, done, complete):
    world.with_condition("Staged", "False", "Staging").staging(complete, owned=False)
    world.stage["status"]["completionTime"] = stamp(world.now - timedelta(seconds=60))
    world.stage_pod("Succeeded", state=world.make.terminated(0, message=done))
    world.stage_shared = True
    assert (world.plan().delete, world.plan().status.staged) == ([], None)
    world.stage_shared = False
    assert [item.name for item in world.plan().delete] == [world.stage["metadata"]["name"]]


def test_a_complete_staging_is_told_and_the_workers_are_created_at_once(world, done, complete, told, kinds):
    world.staging(complete).stage_pod("Succeeded", state=world.make.terminated(0, message=done))
    decided = world.plan()
    assert told(decided, "Staged") == (
        "True",
        "Staged",
        'LlamaForCausalLM with 134,515,008 parameters (269 MB) is at models/llama on claim "models".',
    )
    assert decided.status.staged.parameters == 134515008
    assert kinds(decided)[-1] == "Job/bot-a1"
    assert decided.events == [], "the conditions tell what was expected"


def test_a_report_that_is_not_seen_yet_is_waited_for(world, complete):
    decided = world.staging(complete, completionTime="2030-01-01T11:59:58Z").plan()
    assert (decided.delete, decided.requeue_after, decided.status.staged) == ([], 1, None)


def test_a_staging_whose_report_is_lost_is_done_again(world, complete):
    """Its pod was removed before anybody read it. What is on the volume is only checked."""
    decided = world.staging(complete, completionTime="2030-01-01T11:59:55Z").plan()
    assert [item.uid for item in decided.delete] == ["stage-uid"]
    assert decided.status.state == "Staging"


def test_a_staging_that_was_complete_before_we_joined_is_done_again(world, complete, done):
    """The volume may have changed since: a claim of the same name may be a new one."""
    world.staging(complete, owned=False).stage_pod("Succeeded", state=world.make.terminated(0, message=done))
    decided = world.plan()
    assert [item.uid for item in decided.delete] == ["stage-uid"]
    assert (decided.status.staged, decided.requeue_after) == (None, 1)


def test_a_staging_that_failed_for_another_job_is_done_again(world, failed):
    """The user has repaired what was wrong."""
    decided = world.staging(failed(), owned=False).plan()
    assert [item.uid for item in decided.delete] == ["stage-uid"]
    assert decided.status.state == "Staging"


def test_a_staging_job_on_its_way_out_is_waited_for(world):
    world.staging()
    world.stage["metadata"]["deletionTimestamp"] = "2030-01-01T12:00:00Z"
    decided = world.plan()
    assert (decided.apply, decided.delete, decided.requeue_after) == ([], [], 1)


def test_a_staging_job_deleted_by_a_person_is_created_again(world):
    world.next()
    assert len(world.plan().apply) == 1


def test_an_error_of_the_user_in_staging_ends_the_job_with_its_sentence(world, failed, told):
    word = TerminationMessage(reason="InvalidModel", message="models/llama is no Llama: its architecture is Qwen2.")
    world.staging(failed()).stage_pod("Failed", state=world.make.terminated(66, message=word.to_json()))
    decided = world.plan()
    assert told(decided, "Failed") == ("True", "InvalidModel", word.message)
    assert told(decided, "Staged") == ("False", "InvalidModel", word.message)
    assert decided.apply == []


def test_a_staging_that_crashed_too_often_ends_the_job_with_its_log(world, failed, told):
    state = world.make.terminated(1, message="Traceback\nOSError: [Errno 28] No space left on device")
    world.staging(failed(reason="BackoffLimitExceeded")).stage_pod("Failed", state=state)
    decided = world.plan()
    assert told(decided, "Failed")[1] == "Crash"
    assert told(decided, "Failed")[2] == (
        "The staging pod ended with exit code 1.\n"
        "Last lines of its log:\nTraceback\nOSError: [Errno 28] No space left on device"
    )


def test_an_evicted_staging_pod_is_not_the_reason_of_a_later_failure(world, failed, told):
    evicted = world.make.condition("DisruptionTarget", "True", "EvictionByEvictionAPI")
    world.staging(failed(reason="BackoffLimitExceeded"))
    world.stage_pod("Failed", conditions=(evicted,), state=world.make.terminated(143))
    world.stage_pod("Failed", state=world.make.terminated(82, message="hub is down"))
    assert told(world.plan(), "Failed")[1] == "SourceUnavailable"


def test_a_failed_staging_without_a_trace_is_told_by_its_job_after_a_moment(world, failed, told):
    assert world.staging(failed(ago=4)).plan().status.state == "Staging" or world.plan().requeue_after == 1
    world.staging(failed(ago=5, reason="DeadlineExceeded", message="Job was active too long"))
    name = world.stage["metadata"]["name"]
    assert told(world.plan(), "Failed") == (
        "True",
        "DeadlineExceeded",
        f"Job {name} has failed: Job was active too long.",
    )


def test_a_failed_job_removes_a_staging_that_is_at_work_for_nobody_else(world):
    world.staging().stage_pod(ready=True).with_condition("Failed", "True", "VolumeMissing")
    assert [item.uid for item in world.plan().delete] == ["stage-uid"]


def test_a_failed_job_leaves_a_shared_staging_alone(world):
    world.stage_shared = True
    world.staging().stage_pod(ready=True).with_condition("Failed", "True", "VolumeMissing")
    assert world.plan().delete == []


def test_a_failed_job_leaves_what_is_not_its_own_alone(world):
    world.staging(owned=False).with_condition("Failed", "True", "VolumeMissing")
    assert world.plan().delete == []


def test_a_failed_job_keeps_a_staging_that_is_over(world, complete):
    world.staging(complete).with_condition("Failed", "True", "InvalidData")
    assert world.plan().delete == []


# ---------------------------------------------------------------- suspension


def test_suspending_stops_a_staging_of_our_own(world, told):
    decided = world.with_spec(suspend=True).staging().stage_pod(ready=True).plan()
    assert [tuple(item)[1:] for item in decided.suspend] == [("stage-uid", True)]
    assert told(decided, "Suspended") == ("False", "Suspending", "The staging pod is stopping.")


def test_a_stopped_staging_is_suspended(world, told):
    world.with_spec(suspend=True).staging()
    world.stage["spec"]["suspend"] = True
    decided = world.plan()
    assert (decided.suspend, decided.status.state) == ([], "Suspended")
    assert told(decided, "Suspended")[2] == "Staging is stopped; it goes on from there."


def test_suspending_leaves_a_shared_staging_at_work(world):
    world.stage_shared = True
    decided = world.with_spec(suspend=True).staging().stage_pod(ready=True).plan()
    assert (decided.suspend, decided.status.state) == ([], "Suspended")


def test_whoever_needs_a_suspended_staging_resumes_it(world):
    world.staging()
    world.stage["spec"]["suspend"] = True
    assert [tuple(item)[1:] for item in world.plan().suspend] == [("stage-uid", False)]


def test_a_suspended_job_whose_staging_is_complete_creates_no_workers(world, complete, done):
    world.with_spec(suspend=True).staging(complete)
    world.stage_pod("Succeeded", state=world.make.terminated(0, message=done))
    decided = world.plan()
    assert decided.apply == []
    assert decided.status.staged is not None
    assert decided.status.state == "Suspended"
