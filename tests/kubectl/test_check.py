"""Manifests before the server is asked: read, set, and judged with all problems at once."""

import io
from copy import deepcopy
from typing import Any

import pytest
import yaml

from kubetune_kubectl import manifest_file
from kubetune_kubectl.check import problems_of
from kubetune_kubectl.errors import InvalidManifest

Object = dict[str, Any]


def good() -> Object:
    return {
        "apiVersion": "kubetune.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "bot"},
        "spec": {
            "preset": "llama3/8B_lora",
            "model": {"volumePath": "models/llama"},
            "dataset": {"volumePath": "data/train.jsonl"},
            "training": {"epochs": 3},
            "storage": {"models": {"claimName": "models"}, "output": {"claimName": "tuned"}},
        },
    }


def with_settings(*settings: str) -> list[str]:
    body = good()
    return [*manifest_file.set_values(body, settings), *problems_of(body)]


def test_a_good_manifest_has_no_problem():
    assert problems_of(good()) == []


WRONG = {
    "an unknown field of the spec": (["paralelism=2"], ["spec.paralelism: unknown field; the fields here are preset,"]),
    "an unknown field of a section, with the nearest name": (
        ["training.learningRat=1e-4"],
        ["spec.training.learningRat: unknown field; did you mean learningRate?"],
    ),
    "a field in snake_case, which only files of tune have": (
        ["training.learning_rate=1e-4"],
        ["spec.training.learning_rate: unknown field; did you mean learningRate?"],
    ),
    "a section in snake_case": (
        ["failure_policy={maxRestarts: 1}"],
        ["spec.failure_policy: unknown field; did you mean failurePolicy?"],
    ),
    "a value out of bounds": (
        ["workers.nodes=0"],
        ["spec.workers.nodes: input should be greater than or equal to 1, but it is 0"],
    ),
    "a required part that is missing": (["storage=null"], ["spec.storage: a value is required"]),
    "a preset that is not shipped": (["preset=llama9/1T"], ["spec.preset: 'llama9/1T' is unknown; the presets are"]),
    "a rule between fields": (
        ["model.huggingFace={repo: a/b}"],
        ["spec.model: model needs exactly one of volumePath, "],
    ),
    "a path out of the volume": (
        ["dataset.volumePath=../etc"],
        ["spec.dataset.volumePath ../etc must be a path below the volume's root"],
    ),
    "a name that begins with a digit": (["metadata.name=3x"], ["metadata.name: 3x must begin with a letter"]),
    "a name that is too long": (
        [f"metadata.name={'a' * 46}"],
        [f"metadata.name: {'a' * 46} has 46 characters; at most 45 are allowed"],
    ),
    "a name that is a number": (["metadata.name=7"], ["metadata.name: it must be text, but it is 7: put it in quotes"]),
    "no name": (["metadata.name=null"], ["metadata.name: a value is required; --set metadata.name=NAME gives one"]),
    "wrong parts of the spec do not hide wrong values of sections": (
        ["workers.nods=2", "storage=null", "training.epoch=4", "dataset.format=Foo", "metadata.name=3x"],
        [
            "metadata.name: 3x must begin",
            "spec.workers.nods: unknown field; did you mean nodes?",
            "spec.storage: a value is required",
            "spec.dataset.format: input should be",
            "spec.training.epoch: unknown field; did you mean epochs?",
        ],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_problem_is_told_once_with_its_remedy(case):
    settings, told = WRONG[case]
    found = with_settings(*settings)
    assert len(found) == len(told), found
    assert all(problem.startswith(start) for problem, start in zip(found, told, strict=True)), found


def test_an_unknown_part_of_the_document():
    assert problems_of({**good(), "specs": {}}) == ["specs: unknown field; did you mean spec?"]


def test_free_keys_such_as_resource_names_are_not_fields():
    assert with_settings("workers.resources.limits={memory: 3Gi, example.com/my_device: 1}") == []


SETTINGS = {
    "a number": ("training.epochs=5", ["spec", "training", "epochs"], 5),
    "a number with an exponent": ("training.learningRate=1e-4", ["spec", "training", "learningRate"], 1e-4),
    "the whole path": ("spec.training.epochs=5", ["spec", "training", "epochs"], 5),
    "the name": ("metadata.name=other", ["metadata", "name"], "other"),
    "a section that is not there yet": ("checkpoint.everySteps=9", ["spec", "checkpoint", "everySteps"], 9),
    "a list": ("adapter.targetModules=[q_proj]", ["spec", "adapter", "targetModules"], ["q_proj"]),
    "text with an equals sign": ("model.volumePath=a=b", ["spec", "model", "volumePath"], "a=b"),
    "nothing": ("preset=", ["spec"], {key: value for key, value in good()["spec"].items() if key != "preset"}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_lands_where_its_key_says(case):
    setting, path, value = SETTINGS[case]
    body = good()
    assert manifest_file.set_values(body, [setting]) == []
    found: Any = body
    for part in path:
        found = found[part]
    assert found == value


def test_a_setting_reaches_into_a_list():
    body = good()
    body["spec"]["dataset"]["mixture"] = [{"volumePath": "a", "weight": 1}, {"volumePath": "b"}]
    assert manifest_file.set_values(body, ["dataset.mixture.1.weight=2"]) == []
    assert body["spec"]["dataset"]["mixture"][1] == {"volumePath": "b", "weight": 2}


BAD_SETTINGS = {
    "no value": ("training.epochs", "--set training.epochs: give KEY=VALUE, such as training.epochs=3"),
    "no key": ("=3", "--set =3: give KEY=VALUE"),
    "no YAML": ("training={", "--set training: '{' is not a YAML value"),
    "below a value": ("preset.name=x", "--set preset.name: there is a value, 'llama3/8B_lora', where name should be"),
    "a place that a list does not have": (
        "dataset.mixture.3.weight=1",
        "--set dataset.mixture.3.weight: '3' is no place in a list of 1",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_setting_that_cannot_be_made_is_told(case):
    setting, told = BAD_SETTINGS[case]
    body = good()
    body["spec"]["dataset"]["mixture"] = [{"volumePath": "a"}]
    before = deepcopy(body)
    [problem] = manifest_file.set_values(body, [setting])
    assert problem.startswith(told)
    assert body == before


FILES = {
    "nothing": ("", "it is empty: give one FineTuneJob"),
    "two documents": ("---\na: 1\n---\nb: 2\n", "it holds 2 documents: give one FineTuneJob (`kubectl apply -f` takes"),
    "no YAML": ("a: [", "it is not YAML: "),
    "a key twice": ("kind: A\nkind: B\n", "it is not YAML: the key kind stands twice in one mapping"),
    "a list": ("[1]", "it holds [1], not a FineTuneJob"),
    "another kind": ("kind: Pod\napiVersion: v1\n", "kind: it is 'Pod', but submit takes a FineTuneJob"),
    "another version": (
        "kind: FineTuneJob\napiVersion: kubetune.io/v9\n",
        "apiVersion: it is 'kubetune.io/v9', but it must be kubetune.io/v1alpha1",
    ),
    "a spec that holds nothing": (
        "kind: FineTuneJob\napiVersion: kubetune.io/v1alpha1\nspec: 3\n",
        "spec: it must hold keys and values",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_holds_no_job_is_told(case):
    text, told = FILES[case]
    with pytest.raises(InvalidManifest) as raised:
        manifest_file.read("-", io.StringIO(text))
    assert raised.value.problems[0].startswith(told)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InvalidManifest, match=r"job\.yaml cannot work:\n  it cannot be read: No such file"):
        manifest_file.read(str(tmp_path / "job.yaml"))


def test_a_file_and_standard_input_are_read_alike(tmp_path):
    text = yaml.safe_dump(good())
    (tmp_path / "job.yaml").write_text(text)
    assert manifest_file.read(str(tmp_path / "job.yaml")) == manifest_file.read("-", io.StringIO(text)) == good()


def test_a_name_is_made_from_generate_name_as_the_server_would():
    body = good()
    body["metadata"] = {"generateName": "bot-"}
    name = manifest_file.settle_name(body)
    assert name is not None
    assert name.startswith("bot-")
    assert len(name) == len("bot-") + 5
    assert body["metadata"] == {"name": name}
    assert problems_of(body) == []


def test_a_name_of_its_own_stays():
    body = good()
    assert manifest_file.settle_name(body) is None
    assert body == good()
