"""The API's models: what is accepted, what is refused, and how the columns of `kubectl get` read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubetune_contract.progress import Progress
from kubetune_operator import api, workers
from kubetune_operator.api import Display, duration
from kubetune_operator.errors import InvalidJob

BELOW_THE_ROOT = "must be a path below the volume's root: without a leading '/' and without '..'"
HUB = {"repo": "meta-llama/Llama-3.2-1B"}


def test_the_smallest_spec_has_all_defaults(job):
    spec = job(preset=None, workers=None).spec
    assert spec.workers == workers.Workers(nodes=1, gpus_per_node=0)
    assert spec.failure_policy.max_restarts == 3
    assert spec.suspend is False
    assert spec.preset is None


def test_a_job_knows_who_it_is(job):
    one = job("bot", metadata={"generation": 4})
    assert (one.key, one.uid, one.generation, one.deleting) == (
        "team/bot",
        "0a1b2c3d-0000-4000-8000-000000000001",
        4,
        False,
    )


def test_a_job_that_is_being_deleted_says_so(job):
    assert job(metadata={"deletionTimestamp": "2030-01-01T00:00:00Z"}).deleting


def test_the_status_is_read_back_as_it_was_written(job):
    written = {
        "observedGeneration": 1,
        "state": "Running",
        "conditions": [
            {
                "type": "Running",
                "status": "True",
                "reason": "Training",
                "message": "2 of 2 workers are training.",
                "lastTransitionTime": "2030-01-01T11:59:00Z",
                "observedGeneration": 1,
            }
        ],
        "startTime": "2030-01-01T11:58:00Z",
        "attempt": 2,
        "activeSeconds": 30,
        "restarts": 1,
        "disruptions": 0,
        "progress": {"step": 10, "totalSteps": 40, "epoch": 0.25, "percentage": 25, "loss": 1.5},
        "display": {"progress": "25%", "loss": "1.5", "eta": "3m10s"},
        "outputPath": "bot-0a1b2c3d",
    }
    assert job(status=written).status.to_dict() == written


REFUSED = {
    "a field that does not exist": (
        {"replicas": 2},
        "spec.replicas: unknown field",
    ),
    "a field with a slip": (
        {"workers": {"node": 2}},
        "spec.workers.node: unknown field; did you mean nodes?",
    ),
    "no worker": (
        {"workers": {"nodes": 0}},
        "spec.workers.nodes: input should be greater than or equal to 1, but it is 0",
    ),
    "no model": (
        {"model": None},
        "spec.model: a value is required",
    ),
    "a model from two places": (
        {"model": {"huggingFace": HUB}},
        "spec.model: model needs exactly one of volumePath, huggingFace and s3",
    ),
    "a model from nowhere": (
        {"model": {"volumePath": None}},
        "spec.model: model needs exactly one of volumePath, huggingFace and s3",
    ),
    "a model outside the volume": (
        {"model": {"volumePath": "models/../../etc"}},
        f"spec.model: volumePath models/../../etc {BELOW_THE_ROOT}",
    ),
    "an absolute path": (
        {"model": {"volumePath": "/models/llama"}},
        "spec.model.volumePath: string should match pattern",
    ),
    "a repository without an owner": (
        {"model": {"volumePath": None, "huggingFace": {"repo": "llama"}}},
        "spec.model.huggingFace.repo: string should match pattern",
    ),
    "GPUs among the resources": (
        {"workers": {"resources": {"limits": {"nvidia.com/gpu": 1}}}},
        "spec.workers: resources must not name nvidia.com/gpu: set gpusPerNode",
    ),
    "no claim for the results": (
        {"storage": {"output": None}},
        "spec.storage.output: a value is required",
    ),
    "a claim that cannot exist": (
        {"storage": {"models": {"claimName": "My Models"}}},
        "spec.storage.models.claimName: string should match pattern",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_spec_is_told_as_in_the_manifest(body, case):
    changes, problem = REFUSED[case]
    with pytest.raises(InvalidJob) as caught:
        api.parse(body(**changes))
    assert any(found.startswith(problem) for found in caught.value.problems), caught.value.problems


def test_all_problems_are_told_at_once(body):
    with pytest.raises(InvalidJob) as caught:
        api.parse(body(replicas=2, workers={"nodes": 0}, failurePolicy={"maxRestarts": -1}))
    assert sorted(problem.partition(":")[0] for problem in caught.value.problems) == [
        "spec.failurePolicy.maxRestarts",
        "spec.replicas",
        "spec.workers.nodes",
    ]


QUANTITIES = {
    "a whole number": (2, True),
    "none": (0, True),
    "a number as text": ("2", True),
    "thousandths": ("500m", True),
    "a fraction": ("0.5", True),
    "binary units": ("16Gi", True),
    "decimal units": ("1.5G", True),
    "an exponent": ("2e3", True),
    "a unit that does not exist": ("16GB", False),
    "a unit after a blank": ("16 Gi", False),
    "less than nothing": (-1, False),
    "less than nothing, as text": ("-1", False),
    "a word": ("all", False),
    "no text": ("", False),
}


@pytest.mark.parametrize("case", QUANTITIES)
def test_an_amount_is_a_kubernetes_quantity(body, case):
    amount, accepted = QUANTITIES[case]
    manifest = body(workers={"resources": {"limits": {"memory": amount}}})
    if accepted:
        assert api.parse(manifest).spec.workers.resources.limits == {"memory": amount}
    else:
        with pytest.raises(InvalidJob, match=r"spec\.workers\.resources\.limits\.memory"):
            api.parse(manifest)


DURATIONS = {
    "nothing": (0, "0s"),
    "less than a second": (0.9, "0s"),
    "seconds": (45, "45s"),
    "a minute": (60, "1m"),
    "minutes and seconds": (190, "3m10s"),
    "an hour": (3600, "1h"),
    "hours and minutes; seconds do not matter": (7545, "2h5m"),
    "a day": (86400, "1d"),
    "days and hours": (86400 + 3 * 3600 + 59, "1d3h"),
    "many days": (40 * 86400, "40d"),
}


@pytest.mark.parametrize("case", DURATIONS)
def test_a_time_span_reads_well(case):
    seconds, text = DURATIONS[case]
    assert duration(seconds) == text


@given(st.integers(0, 10**7))
def test_a_time_span_has_at_most_two_units_and_is_never_too_long(seconds):
    sizes = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    text, units = duration(seconds), [letter for letter in duration(seconds) if letter in sizes]
    for unit in units:
        text = text.replace(unit, f"*{sizes[unit]}+")
    shown = sum(int(count) * int(size) for count, size in (part.split("*") for part in text.rstrip("+").split("+")))
    assert 1 <= len(units) <= 2
    assert shown <= seconds
    assert seconds - shown < sizes[units[0]]


def test_the_columns_are_rounded_for_people():
    progress = Progress(
        step=5, total_steps=12, epoch=0.4, percentage=41, loss=1.23456789, estimated_remaining_seconds=190
    )
    assert Display.of(progress) == Display(progress="41%", loss="1.235", eta="3m10s")


def test_the_columns_of_a_run_without_a_step_have_only_the_percentage():
    assert Display.of(Progress(step=0, total_steps=12, epoch=0, percentage=0)).to_dict() == {"progress": "0%"}
