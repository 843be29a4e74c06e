"""Whether a run fits, told before any GPU is held."""

import re
import time

import pytest

from kubetune_contract.architecture import LlamaSizes
from kubetune_contract.estimate import estimate
from kubetune_contract.staging import StagedModel
from kubetune_operator.build import run_config
from kubetune_operator.memory import MEMORY_LABEL
from kubetune_operator.workers import amount

GIB = 2**30
B8 = LlamaSizes(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)
STAGED = StagedModel(path="m", architecture="LlamaForCausalLM", parameters=8030261248, bytes=16 * 10**9, sizes=B8)


@pytest.fixture
def staged(world):
    """staged(workers, **spec): the world where 8B was staged."""

    def make(workers=None, **spec):
        spec = {"preset": None, "method": "LoRA", **spec}
        gang = {"nodes": 1, "gpusPerNode": 1, **(workers or {})}
        world.with_spec(workers=gang, **spec).with_status(staged=STAGED.to_dict())
        return world.with_condition("Staged", "True", "Staged")

    return make


FULL = {"method": "Full"}
REFUSED = {
    "full fine-tuning on one card": (
        {"gpuMemory": "80Gi"},
        FULL,
        r"A step needs \d+\.\d GiB of memory on each GPU \(optimizer 59\.8 GiB, .*\), but workers.gpuMemory is 80Gi: "
        r"set method to LoRA \(\d+\.\d GiB\), or set workers.gpusPerNode to 4 \(\d+\.\d GiB\)\. "
        r"The estimate may be 5% wrong; it is too large by more than that\.",
    ),
    "the node's label": (
        {"nodeSelector": {MEMORY_LABEL: "81559"}},
        FULL,
        rf"but workers.nodeSelector asks for {re.escape(MEMORY_LABEL)} 81559 MiB: set method to LoRA",
    ),
    "a whole node too small": (
        {"gpuMemory": "16Gi", "gpusPerNode": 8},
        FULL,
        r"and set method to LoRA \(.*\), or .* and set workers.nodes to 4 \(",
    ),
    "packed rows are as long as they may be": (
        {"gpuMemory": "24Gi"},
        {"dataset": {"volumePath": "d", "packed": True, "maxSequenceLength": 8192}},
        r"24Gi: set training.activationCheckpointing to Full \(.*\), or set dataset.maxSequenceLength to 512 \(",
    ),
    "a pod whose memory does not hold the weights": (
        {"gpusPerNode": 0, "resources": {"limits": {"memory": "8Gi"}}},
        {},
        r"memory in each pod \(.*\), but workers.resources.limits.memory is 8Gi: "
        r"raise workers.resources.limits.memory to \d+Gi, or set ",
    ),
}


@pytest.mark.parametrize(("workers", "changes", "pattern"), REFUSED.values(), ids=REFUSED.keys())
def test_a_run_that_cannot_fit_ends_before_a_worker_is_created(workers, changes, pattern, staged, told):
    decided = staged(workers, **changes).plan()
    status, reason, message = told(decided, "Failed")
    assert (status, reason) == ("True", "DoesNotFit")
    assert re.search(pattern, message), message
    assert decided.apply == []
    assert decided.status.estimate.bytes > decided.status.estimate.available


def test_each_remedy_fits_when_it_is_followed(staged, told):
    """The settings are spelt as in the manifest: they are put into it as they are told."""
    world = staged({"gpuMemory": "80Gi"}, **FULL)
    message = told(world.plan(), "Failed")[2]
    for remedy in re.search(r"80Gi: (.*?)\. The estimate", message)[1].split(", or "):
        changed = staged({"gpuMemory": "80Gi"}, **FULL)
        for path, value in re.findall(r"set ([\w.]+) to (\w+)", remedy):
            section, _, name = path.partition(".")
            typed = int(value) if value.isdecimal() else value
            changed.with_spec(**{section: {**changed.spec[section], name: typed} if name else typed})
        decided = changed.plan()
        assert told(decided, "Failed") is None, remedy
        assert decided.status.estimate.bytes * 1.05 <= 80 * GIB


ACCEPTED = {
    "LoRA on a large card": ({"gpuMemory": "80Gi"}, {}),
    "memory that nobody knows": ({}, FULL),
    "a label that is no number": ({"nodeSelector": {MEMORY_LABEL: "large"}}, FULL),
    "another vendor's devices": (
        {"nodeSelector": {MEMORY_LABEL: "1000"}, "gpuResource": "amd.com/gpu"},
        FULL,
    ),
    "too large by less than the estimate may be wrong": ({"gpuMemory": "15Gi"}, {"training": {"batchSize": 1}}),
    "rows that may be short": (
        {"gpuMemory": "24Gi"},
        {"dataset": {"volumePath": "d", "maxSequenceLength": 8192}},
    ),
    "a pod without a limit": ({"gpusPerNode": 0}, FULL),
    "a pod whose memory holds the weights": ({"gpusPerNode": 0, "resources": {"limits": {"memory": "18Gi"}}}, {}),
}


@pytest.mark.parametrize(("workers", "changes"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_may_fit_is_tried(workers, changes, staged, told, kinds):
    decided = staged(workers, **changes).plan()
    assert told(decided, "Failed") is None
    assert kinds(decided)[-1] == "Job/bot-a1"


def test_the_estimate_is_told_by_its_parts(staged):
    world = staged({"gpuMemory": "80Gi"})
    found = world.plan().status.estimate
    expected = estimate(run_config(world.job), B8)
    assert (found.device, found.bytes, found.available) == ("GPU", expected.needed, 80 * GIB)
    parts = found.model_dump(exclude={"device", "bytes", "available"})
    assert parts == expected._asdict()


def test_an_estimate_is_written_once(staged):
    world = staged({"gpuMemory": "80Gi"}).next()
    before = world.status["estimate"]
    assert world.attempt(1).worker(0, ready=True).plan().status.estimate.to_dict() == before


def test_more_gpus_make_another_estimate(staged):
    one = staged({"gpuMemory": "80Gi"}).plan().status.estimate
    assert staged({"gpuMemory": "80Gi", "gpusPerNode": 8}).plan().status.estimate.bytes < one.bytes


def test_what_was_tried_is_not_judged_again(staged, told):
    """The trainer has seen the device and the data."""
    world = staged({"gpuMemory": "80Gi"}, **FULL).attempt(1).worker(0, ready=True)
    assert told(world.plan(), "Failed") is None


def test_a_model_that_was_staged_by_an_older_trainer_is_not_judged(staged, told):
    world = staged({"gpuMemory": "16Gi"}, **FULL).with_status(
        staged=STAGED.model_copy(update={"sizes": None}).to_dict()
    )
    decided = world.plan()
    assert (told(decided, "Failed"), decided.status.estimate) == (None, None)


STAGED_TOLD = {
    "room": ({"gpuMemory": "80Gi"}, {}, r"A step takes at most \d+\.\d GiB of memory on each GPU\.$"),
    "maybe": (
        {"gpuMemory": "24Gi"},
        {"dataset": {"volumePath": "d", "maxSequenceLength": 8192}},
        r"more than there is \(workers.gpuMemory is 24Gi\): it fits only if the longest row is shorter than "
        r"dataset.maxSequenceLength, which the trainer finds out before its first step\.$",
    ),
    "maybe, on the CPU": (
        {"gpusPerNode": 0, "resources": {"limits": {"memory": "18Gi"}}},
        {},
        r"memory in each pod, more than there is \(workers.resources.limits.memory is 18Gi\): "
        r"a pod that takes more is killed\.$",
    ),
}


@pytest.mark.parametrize(("workers", "changes", "pattern"), STAGED_TOLD.values(), ids=STAGED_TOLD.keys())
def test_the_condition_says_how_much_a_step_takes(workers, changes, pattern, world, message, told):
    world.with_spec(preset=None, method="LoRA", workers={"nodes": 1, "gpusPerNode": 1, **workers}, **changes)
    complete = world.make.condition("Complete", "True", "CompletionsReached")
    word = message("Done", "staged", staged=STAGED)
    world.staging(complete).stage_pod("Succeeded", state=world.make.terminated(0, message=word))
    assert re.search(pattern, told(world.plan(), "Staged")[2])


AMOUNTS = {
    4: 4, "4": 4, "500m": 0.5, "2k": 2000, "1.5Gi": 1.5 * GIB, "80G": 80e9, "3Ki": 3072, "1e3": 1000, "1E": 1e18,
    "1Ei": 2.0**60,
}  # fmt: skip


@pytest.mark.parametrize(("quantity", "number"), AMOUNTS.items())
def test_a_quantity_is_a_number(quantity, number):
    assert amount(quantity) == number


def test_a_verdict_takes_no_time_that_other_jobs_would_miss(staged):
    world = staged({"gpuMemory": "16Gi"}, **FULL)
    started = time.process_time()
    world.plan()
    assert time.process_time() - started < 1
