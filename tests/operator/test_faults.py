"""The API server's words about a Job, as the author of the FineTuneJob can use them."""

import pytest

from kubetune_operator.faults import fault
from kubetune_operator.obstacles import refusal

FAULTS = {
    "a field that does not exist": (
        'Job in version "v1" cannot be handled as a Job: strict decoding error: '
        'unknown field "spec.template.spec.affinity.nodeAffinity.foo"',
        'unknown field "spec.workers.affinity.nodeAffinity.foo"',
    ),
    "text where an object is meant": (
        'Job in version "v1" cannot be handled as a Job: json: cannot unmarshal string into Go struct field '
        "NodeAffinity.spec.template.spec.affinity.nodeAffinity.x of type v1.NodeSelector",
        "cannot unmarshal string into Go struct field NodeAffinity.spec.workers.affinity.nodeAffinity.x "
        "of type v1.NodeSelector",
    ),
    "a value that is wrong": (
        'Job.batch "x-a1" is invalid: spec.template.spec.tolerations[0].effect: Unsupported value: "No"',
        'spec.workers.tolerations[0].effect: Unsupported value: "No"',
    ),
    "values that are wrong": (
        'Job.batch "x-a1" is invalid: [spec.template.spec.volumes[0].configMap.name: Required value, '
        "spec.template.spec.containers[0].volumeMounts[0].name: Not found]",
        "spec.workers.volumes[0].configMap.name: Required value, spec.workers.volumeMounts[0].name: Not found",
    ),
    "a label of a pod": (
        'Job.batch "x-a1" is invalid: spec.template.labels: Invalid value: "a b": a valid label must be',
        'spec.template.labels: Invalid value: "a b": a valid label must be',
    ),
    "an apply with a field that does not exist": (
        "failed to create typed patch object (team/x; batch/v1, Kind=Job): "
        ".spec.template.spec.affinity.nodeAffinity.foo: field not declared in schema",
        "spec.workers.affinity.nodeAffinity.foo: field not declared in schema",
    ),
    "quota": ('jobs.batch "x-a1" is forbidden: exceeded quota: jobs, requested: count/jobs.batch=1', None),
    "a webhook": ('admission webhook "policy.example" denied the request: no', None),
    "a template that was changed": (
        'Job.batch "x" is invalid: spec.template: Invalid value: {}: field is immutable',
        None,
    ),
    "another object's uid": ('Job.batch "x" is invalid: metadata.uid: Invalid value: "1": field is immutable', None),
}


@pytest.mark.parametrize("case", FAULTS)
def test_the_manifest_is_at_fault_in(case):
    words, expected = FAULTS[case]
    assert fault(words) == expected
    assert (refusal(words).reason == "InvalidConfig") == (expected is not None)
