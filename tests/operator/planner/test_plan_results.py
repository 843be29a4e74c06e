"""Progress while it trains, and what is said and kept at the end."""

import pytest

from kubetune_contract.progress import CheckpointStatus, Result
from kubetune_operator.plan import Plan

# ---------------------------------------------------------------- progress


def test_a_report_is_shown(world):
    decided = world.running().reports(10, checkpoint=8, loss=1.23456).plan()
    status = decided.status
    assert (status.progress.step, status.progress.loss, status.checkpoint.step) == (10, 1.23456, 8)
    assert status.display.to_dict() == {"progress": "20%", "loss": "1.235"}


def test_progress_never_goes_back_within_an_attempt(world):
    world.running().reports(20, checkpoint=15).next().reports(10, checkpoint=5)
    status = world.plan().status
    assert (status.progress.step, status.checkpoint.step) == (20, 15)


def test_progress_goes_back_to_the_checkpoint_when_the_gang_is_lost(world):
    """Steps that no checkpoint holds are done again: the status says so."""
    world.running().reports(23, checkpoint=20, loss=1.0, tokens_per_second=500.0).next()
    progress = world.ends(0, 1).ends(1, 1).fails().plan().status.progress
    assert (progress.step, progress.percentage, progress.loss, progress.tokens_per_second) == (20, 40, None, None)
    assert progress.epoch == pytest.approx(0.4)


def test_without_a_checkpoint_progress_goes_back_to_nothing(world):
    world.running().reports(7).next()
    progress = world.ends(0, 1).ends(1, 1).fails().plan().status.progress
    assert (progress.step, progress.percentage) == (0, 0)


def test_a_checkpoint_saved_on_the_way_out_is_known_from_the_last_word(world, message):
    """The operator may have been down when it was reported."""
    saved = message("Saved", "saved", checkpoint=world.checkpoint(30))
    world.running().reports(25, checkpoint=20).next()
    decided = world.evicted(1).ends(1, 80, saved).evicted(1).ends(0, 80).fails("PodFailurePolicy").plan()
    assert decided.status.checkpoint.step == 30
    assert decided.status.progress.step == 30
    assert "starts from the checkpoint of step 30" in decided.events[0].message


def test_a_checkpoint_is_also_known_from_a_pod_that_is_gone(world, message):
    saved = message("Saved", "saved", checkpoint=world.checkpoint(30))
    world.running().ends(1, 80, saved).deleted(1, ago=3, gone=True).ends(0, 80).fails()
    assert world.plan().status.checkpoint == CheckpointStatus.model_validate(world.checkpoint(30))


# ---------------------------------------------------------------- the end


def test_success_tells_where_the_adapter_is_and_what_was_gained(world, message, told):
    result = Result(
        adapter_path="adapter",
        merged_path="merged",
        final_loss=0.5,
        initial_validation_loss=2.25,
        final_validation_loss=0.75,
        steps=50,
        tokens=9,
    )
    world.running().reports(40).next()
    decided = world.ends(0, 0, message("Done", "done", result=result)).ends(1, 0).completes().plan()
    status = decided.status
    assert told(decided, "Succeeded") == (
        "True",
        "Done",
        'The adapter is at bot-0a1b2c3d/adapter on claim "tuned". Held-out loss 2.250 before, 0.750 after. '
        "Training loss 0.500 after 50 steps.",
    )
    assert (status.result.adapter_path, status.result.merged_path) == ("bot-0a1b2c3d/adapter", "bot-0a1b2c3d/merged")
    assert (status.progress.step, status.progress.percentage, status.progress.loss) == (50, 100, 0.5)
    assert status.state == "Succeeded"
    assert status.completion_time == world.now
    assert told(decided, "Running")[0] == "False"
    assert [event[:2] for event in decided.events] == [("Normal", "Succeeded")]


def test_success_of_full_fine_tuning_tells_where_the_model_is(world, message, told):
    world.with_spec(method="Full").running()
    result = Result(model_path="model", steps=1, tokens=9)
    decided = world.ends(0, 0, message("Done", "done", result=result)).ends(1, 0).completes().plan()
    assert told(decided, "Succeeded")[2] == 'The trained model is at bot-0a1b2c3d/model on claim "tuned".'


def test_a_result_that_is_not_seen_yet_is_waited_for(world):
    decided = world.running().ends(0, 0).ends(1, 0).completes(ago=2).plan()
    assert decided.status.state == "Running"
    assert decided.requeue_after == 1


def test_success_without_a_result_still_says_where_to_look(world, told):
    """The pods were removed before anybody read them."""
    world.running().completes(ago=5).pods.clear()
    decided = world.plan()
    assert told(decided, "Succeeded")[2] == (
        'The adapter is at bot-0a1b2c3d/adapter on claim "tuned". The workers left no report of their losses.'
    )
    assert decided.status.progress.percentage == 100


@pytest.mark.parametrize("end", ["Succeeded", "Failed"])
def test_a_finished_job_is_never_touched_again(world, end):
    """Whoever deletes its children, suspends it or reports progress: it stays as it was."""
    world.running().with_condition(end, "True", "Done").with_status(state=end, observedGeneration=1)
    world.jobs.clear()
    world.pods.clear()
    world.with_spec(suspend=True).reports(3)
    decided = world.plan()
    assert (decided.apply, decided.delete, decided.suspend, decided.events) == ([], [], [], [])
    assert decided.status.to_dict() == world.job.status.to_dict()


def test_a_failed_job_holds_no_workers(world):
    world.running().with_condition("Failed", "True", "VolumeMissing")
    assert [(item.kind, item.name, item.uid) for item in world.plan().delete] == [("Job", "bot-a1", "job-uid-1")]


def test_a_failed_job_keeps_what_has_ended_for_its_logs(world):
    world.running().ends(0, 65).fails().with_condition("Failed", "True", "InvalidData")
    assert world.plan().delete == []


def test_worker_counts_of_a_failed_job_follow_its_last_pods(world):
    world.running().with_condition("Failed", "True", "InvalidData")
    world.with_status(workers={"active": 2, "ready": 2, "succeeded": 0, "failed": 0})
    world.ends(0, 65).fails(target=True)
    world.pods.pop()
    assert world.plan().status.workers.to_dict() == {"active": 0, "ready": 0, "succeeded": 0, "failed": 1}


def test_a_job_being_deleted_is_left_to_its_owner_references(world):
    world.metadata["deletionTimestamp"] = "2030-01-01T12:00:00Z"
    decided = world.staged().plan()
    assert decided == Plan([], [], [], world.job.status, [], None)
