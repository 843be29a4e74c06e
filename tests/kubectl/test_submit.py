"""`submit`: what reaches the server, and what is said."""

import io
import json

import pytest
import yaml
from tests.kubectl.conftest import changed, events, listed, recorded

from kubetune_kubectl import submit
from kubetune_kubectl.errors import InvalidManifest, NameInUse, Refused

NOT_THERE = 'Error from server (NotFound): finetunejobs.kubetune.io "two" not found\n'
FIXED = (
    'The FineTuneJob "two" is invalid: \n'
    '* spec: Invalid value: "object": spec.training cannot be changed: create a new FineTuneJob\n'
    '* spec: Invalid value: "object": spec.model cannot be changed: create a new FineTuneJob\n'
)
CONFLICT = (
    'error: Apply failed with 2 conflicts: conflicts with "kubectl-client-side-apply" using kubetune.io/v1alpha1:\n'
    "- .spec.training.epochs\n- .spec.preset\n"
    "Please review the fields above--they currently have other managers. Here\nare the ways you can resolve this\n"
    "* If you intend to manage all of these fields, please re-run the apply\n"
)
SUSPENDED = (
    'error: Apply failed with 1 conflict: conflict with "kubectl-finetune" using kubetune.io/v1alpha1: .spec.suspend\n'
    "Please review the fields above--they currently have other managers.\n"
)


@pytest.fixture
def file(tmp_path):
    """file(metadata=...): a manifest on the disk."""

    def make(**changes):
        found = recorded("succeeded")
        body = {**{key: found[key] for key in ("apiVersion", "kind", "spec")}, "metadata": {"name": "two"}, **changes}
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(body))
        return str(path)

    return make


def applied(replay) -> list[str]:
    [command] = replay.asked("apply")
    return command


def test_a_new_job_is_applied_on_the_servers_side_with_strict_validation(replay, kubectl, file, page, capsys):
    replay.answer("get", err=NOT_THERE)
    replay.answer("apply", out=json.dumps(recorded("succeeded")))
    assert submit.run(kubectl, file(), ["training.maxSteps=9"], as_json=True, stream=page) == 0
    assert {"--server-side", "--validate=strict", "--field-manager=kubectl-finetune"} <= {*applied(replay)}
    assert json.loads(page.getvalue())["metadata"]["name"] == "two"
    assert capsys.readouterr().err == (
        "FineTuneJob kubetune-plugin/two was created. Follow it: kubectl finetune watch two -n kubetune-plugin\n"
    )


def test_a_dry_run_asks_the_server_and_creates_nothing(replay, kubectl, file, capsys):
    replay.answer("get", err=NOT_THERE)
    replay.answer("apply", out=json.dumps(recorded("succeeded")))
    assert submit.run(kubectl, file(), dry_run=True, then_watch=True) == 0
    assert "--dry-run=server" in applied(replay)
    assert capsys.readouterr().err == "FineTuneJob kubetune-plugin/two would be created (dry run).\n"


def test_a_wrong_manifest_does_not_reach_the_server(replay, kubectl, file):
    with pytest.raises(InvalidManifest) as raised:
        submit.run(kubectl, file(), ["training.epoch=1", "workers.nodes=0", "nothing"])
    assert len(raised.value.problems) == 3
    assert replay.asked() == []


def test_two_namespaces_are_one_too_many(kubectl, file):
    with pytest.raises(
        InvalidManifest, match="it is team, but --namespace says kubetune-plugin: leave one of them out"
    ):
        submit.run(kubectl, file(metadata={"name": "two", "namespace": "team"}))


def test_the_namespace_of_the_file_counts_where_none_is_given(replay, kubectl, file):
    replay.answer("get", err=NOT_THERE)
    replay.answer("apply", out=json.dumps(recorded("succeeded")))
    submit.run(type(kubectl)(), file(metadata={"name": "two", "namespace": "team"}))
    assert "--namespace=team" in applied(replay)


def test_the_same_job_again_starts_nothing_and_it_is_said(replay, kubectl, file, capsys):
    replay.answer("get", out=json.dumps(recorded("succeeded")))
    replay.answer("apply", out=json.dumps(recorded("succeeded")))
    assert submit.run(kubectl, file()) == 0
    assert capsys.readouterr().err == (
        "FineTuneJob kubetune-plugin/two is there already and as in the file (Succeeded); "
        "for another run give another name: --set metadata.name=two-2.\n"
    )


def test_a_change_that_the_server_takes_is_said(replay, kubectl, file, capsys):
    after = changed(recorded("running"), "99")
    after["metadata"]["generation"] = 2
    replay.answer("get", out=json.dumps(recorded("running")))
    replay.answer("apply", out=json.dumps(after))
    submit.run(kubectl, file())
    assert capsys.readouterr().err == "FineTuneJob kubetune-plugin/lost was changed.\n"


IN_USE = {
    "the spec cannot be changed": (
        FIXED,
        "differs from it in spec.training, spec.model, which cannot be changed: give",
    ),
    "other managers own the fields": (CONFLICT, "differs from it in spec.training.epochs, spec.preset, which cannot"),
    "somebody suspended it": (SUSPENDED, "spec.suspend was set by others: use `kubectl finetune suspend` or `resume`"),
}


@pytest.mark.parametrize("case", IN_USE)
def test_a_name_that_another_job_has_is_told_with_both_ways_out(replay, kubectl, file, case):
    words, told = IN_USE[case]
    replay.answer("get", out=json.dumps(recorded("succeeded")))
    replay.answer("apply", err=words)
    with pytest.raises(NameInUse, match=r"FineTuneJob two is there already \(Succeeded, ") as raised:
        submit.run(kubectl, file())
    assert told in str(raised.value)


def test_the_ways_out_can_be_typed(replay, kubectl, file):
    replay.answer("get", out=json.dumps(recorded("succeeded")))
    replay.answer("apply", err=FIXED)
    with pytest.raises(NameInUse) as raised:
        submit.run(kubectl, file())
    assert "--set metadata.name=two-2" in str(raised.value)
    assert "`kubectl delete finetunejob two --namespace kubetune-plugin`" in str(raised.value)


def test_what_only_the_server_refuses_is_told_in_its_words(replay, kubectl, file):
    replay.answer("get", err=NOT_THERE)
    replay.answer(
        "apply", err='Error from server (Forbidden): admission webhook "policy" denied the request: no budget\n'
    )
    with pytest.raises(Refused, match=r'^admission webhook "policy" denied the request: no budget$'):
        submit.run(kubectl, file())


def test_generate_name_gives_a_name_and_says_which(replay, kubectl, file, capsys):
    replay.answer("get", err=NOT_THERE)
    replay.answer("apply", out=json.dumps(recorded("succeeded")))
    submit.run(kubectl, file(metadata={"generateName": "bot-"}))
    assert capsys.readouterr().err.startswith("metadata.generateName gives the name bot-")


def test_what_tune_manifest_prints_is_taken_from_standard_input(replay, kubectl, monkeypatch):
    from kubetune_contract.presets import resolve
    from kubetune_trainer.manifest import Placement, manifest

    config = resolve("llama3/8B_lora", {"model": {"path": "m"}, "dataset": {"path": "d.jsonl"}, "output_dir": "out"})
    text = manifest(config, "llama3/8B_lora", Placement(name="two"))
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    replay.answer("get", err=NOT_THERE)
    replay.answer("apply", out=json.dumps(recorded("succeeded")))
    assert submit.run(kubectl, "-") == 0


def test_with_watch_the_exit_code_is_the_jobs(replay, kubectl, file, page):
    failed = recorded("failed")
    replay.answer("get", "two", err=NOT_THERE)
    replay.answer("apply", out=json.dumps(failed))
    replay.answer("get", "--watch", out=events(("ADDED", failed)), hangs=True)
    replay.answer("get", "pods", out=listed())
    replay.answer("get", out=listed(failed))
    assert submit.run(kubectl, file(), then_watch=True, stream=page) == 1
    assert "Failed: " in page.getvalue()
