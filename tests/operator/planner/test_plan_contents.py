"""The staging of a model and of data, side by side."""

import pytest

from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.staging import StagedData, StagedModel
from kubetune_operator.contents import contents

CHATS = {"repo": "acme/chats", "revision": "v2"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = StagedModel(
    path="models/llama", architecture="LlamaForCausalLM", parameters=134515008, bytes=269_000_000, revision=COMMIT
)


@pytest.fixture
def world(world):
    """A job with data of the hub, and a bucket with more of them."""
    data = {"huggingFace": CHATS, "mixture": [{"s3": {"uri": "s3://acme/more/chats"}}]}
    return world.with_spec(dataset={"volumePath": None, **data})


@pytest.fixture
def data(message):
    """data("acme--chats", bytes): the last word of a container that staged data."""

    def make(size: int = 12_000_000, revision: str | None = COMMIT) -> str:
        staged = StagedData(path="reported", files=2, bytes=size, revision=revision)
        return message("Done", "staged", stagedData=staged)

    return make


@pytest.fixture
def complete(world):
    return world.make.condition("Complete", "True", "CompletionsReached")


def paths(world):
    return [content.path for content in contents(world.job.spec)]


def test_model_and_data_are_staged_at_the_same_time(world, told):
    decided = world.plan()
    assert len({item["metadata"]["name"] for item in decided.apply}) == len(decided.apply) == 3
    assert told(decided, "Staged") == (
        "False",
        "Staging",
        'Checking the model at models/llama on claim "models": the staging pod is starting; '
        'downloading the data acme/chats (v2) to claim "models": the staging pod is starting; '
        'downloading the data s3://acme/more/chats to claim "models": the staging pod is starting.',
    )


def test_what_is_there_already_is_counted(world, message, complete, data, told):
    model = message("Done", "staged", staged=MODEL)
    world.staging(complete).stage_pod("Succeeded", state=world.make.terminated(0, message=model))
    world.data_staging(0, ready=True).data_staging(1, phase="Pending")
    decided = world.plan()
    assert told(decided, "Staged")[2] == (
        'Downloading the data acme/chats (v2) to claim "models"; '
        'downloading the data s3://acme/more/chats to claim "models": the staging pod is starting. 1 of 3 are there.'
    )
    assert decided.status.staged == MODEL
    assert decided.apply == []
    assert decided.status.state == "Staging"


def test_data_that_are_there_are_not_staged_again(world, complete, data):
    world.next()
    world.data_staging(0, complete, word=data())
    world.next()
    assert [one["path"] for one in world.status["stagedData"]] == [paths(world)[1]]
    names = [item["metadata"]["name"] for item in world.plan().apply]
    assert len(names) == 2, "the data's own Job may go: what it found is in the status"


def test_the_workers_come_when_everything_is_there(world, message, complete, data, told, kinds):
    model = message("Done", "staged", staged=MODEL)
    world.staging(complete).stage_pod("Succeeded", state=world.make.terminated(0, message=model))
    world.data_staging(0, complete, word=data()).data_staging(1, complete, word=data(3000, None))
    decided = world.plan()
    hub, bucket = paths(world)[1:]
    assert told(decided, "Staged") == (
        "True",
        "Staged",
        "LlamaForCausalLM with 134,515,008 parameters (269 MB, commit 0123456789ab) is at models/llama on claim "
        f'"models". The data acme/chats (v2) (12 MB, commit 0123456789ab) are at {hub}. '
        f"The data s3://acme/more/chats (3.0 kB) are at {bucket}.",
    )
    assert kinds(decided)[-1] == "Job/bot-a1"
    assert world.job.status.staged is None
    assert {one.path: one.revision for one in decided.status.staged_data} == {hub: COMMIT, bucket: None}


def test_the_run_reads_the_staged_data_where_they_were_put(world):
    from kubetune_operator.build import run_config

    config = run_config(world.job)
    assert [config.dataset.path, config.dataset.mixture[0].path] == [
        f"/kubetune/models/{path}" for path in paths(world)[1:]
    ]


def test_the_same_data_twice_are_staged_once(world):
    world.with_spec(dataset={"volumePath": None, "huggingFace": CHATS}, validation={"huggingFace": CHATS})
    assert len(world.plan().apply) == 2


def test_data_on_the_volume_and_a_share_of_them_are_not_staged(world):
    world.with_spec(dataset={"volumePath": "data/train.jsonl"}, validation={"fraction": 0.1})
    assert len(world.plan().apply) == 1


def test_a_dataset_that_may_not_be_read_ends_the_job_and_the_other_downloads(world, message, told):
    word = message(ExitCode.SOURCE_DENIED.reason, "acme/chats at revision v2 is gated")
    failed = world.make.condition("Failed", "True", "PodFailurePolicy", lastTransitionTime="2030-01-01T12:00:00Z")
    world.staging().stage_pod(ready=True)
    world.data_staging(0, failed, phase="Failed", state=world.make.terminated(69, message=word))
    world.data_staging(1, ready=True)
    decided = world.plan()
    assert told(decided, "Failed") == ("True", "SourceDenied", "acme/chats at revision v2 is gated.")
    world.next()
    assert {item.uid for item in world.plan().delete} == {"stage-uid", "data-stage-1"}


def test_suspending_stops_all_of_them(world, told):
    world.with_spec(suspend=True).staging().stage_pod(ready=True)
    world.data_staging(0, ready=True).data_staging(1, phase="Pending")
    decided = world.plan()
    assert len(decided.suspend) == 3
    assert told(decided, "Suspended")[1:] == ("Suspending", "3 staging pods are stopping.")


def test_an_obstacle_of_one_of_them_is_told(world, told):
    world.staging().stage_pod(ready=True).data_staging(0, ready=True)
    waiting = world.make.waiting("CreateContainerConfigError", 'secret "bucket" not found')
    world.data_staging(1, phase="Pending", state=waiting)
    assert told(world.plan(), "Staged")[1] == "SecretMissing"
