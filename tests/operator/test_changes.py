"""What of a spec may be changed: the rules as Python judges them. The API server's own words are in the integration
tests."""

import pytest

from kubetune_operator import api, changes
from kubetune_operator.workers import Workers

FREE = {
    "the suspension": ({}, {"suspend": True}),
    "the resumption": ({"suspend": True}, {"suspend": False}),
    "a deadline that was not there": ({}, {"activeDeadlineSeconds": 60}),
    "a deadline that is lifted": ({"activeDeadlineSeconds": 60}, {}),
    "the time to live": ({"ttlSecondsAfterFinished": 60}, {"ttlSecondsAfterFinished": 3600}),
    "the number of restarts": ({}, {"failurePolicy": {"maxRestarts": 9}}),
    "the other deadlines": ({}, {"failurePolicy": {"startupDeadlineSeconds": 60, "progressDeadlineSeconds": 60}}),
    "the nodes of a suspended job": ({"suspend": True}, {"suspend": True, "workers": {"nodes": 4}}),
    "the nodes together with the suspension": ({}, {"suspend": True, "workers": {"nodes": 4}}),
    "the nodes together with the resumption": ({"suspend": True}, {"workers": {"nodes": 4}}),
    "GPUs and resources of a suspended job": (
        {"suspend": True},
        {"suspend": True, "workers": {"gpusPerNode": 2, "resources": {"limits": {"memory": "8Gi"}}}},
    ),
}
FIXED = "cannot be changed: create a new FineTuneJob"
SUSPENDED = "can only be changed while the job is suspended: set spec.suspend to true as well"
REFUSED = {
    "the preset": ({}, {"preset": "llama3/8B_full"}, [f"spec.preset {FIXED}"]),
    "the preset that goes": ({}, {"preset": None}, [f"spec.preset {FIXED}"]),
    "a section that was not there": ({}, {"training": {"epochs": 2}}, [f"spec.training {FIXED}"]),
    "the data of a suspended job": (
        {"suspend": True},
        {"suspend": True, "dataset": {"volumePath": "data/other.jsonl"}},
        [f"spec.dataset {FIXED}"],
    ),
    "the clean-up": ({}, {"cleanPodPolicy": "All"}, [f"spec.cleanPodPolicy {FIXED}"]),
    "the nodes of a job that runs": ({}, {"workers": {"nodes": 4}}, [f"spec.workers.nodes {SUSPENDED}"]),
    "several fields at once": (
        {},
        {"method": "LoRA", "workers": {"gpusPerNode": 8, "resources": {"requests": {"cpu": 1}}}},
        [f"spec.method {FIXED}", f"spec.workers.gpusPerNode {SUSPENDED}", f"spec.workers.resources {SUSPENDED}"],
    ),
}


@pytest.fixture
def judged(spec):
    """judged(old changes, new changes): the problems of an update."""

    def make(old, new):
        before, after = (api.FineTuneJobSpec.model_validate(spec(**made)) for made in (old, new))
        return changes.problems(after, before)

    return make


@pytest.mark.parametrize("case", FREE)
def test_may_be_changed(judged, case):
    assert judged(*FREE[case]) == []


@pytest.mark.parametrize("case", REFUSED)
def test_may_not_be_changed(judged, case):
    old, new, problems = REFUSED[case]
    assert judged(old, new) == problems


def test_every_field_that_may_be_changed_exists():
    """A rule about a field that was renamed would free nothing, and say nothing."""
    spec = {field.alias for field in api.FineTuneJobSpec.model_fields.values()}
    inner = {f"workers.{field.alias}" for field in Workers.model_fields.values()}
    assert set(changes.ALWAYS) <= spec
    assert set(changes.WHILE_SUSPENDED) <= inner
