"""`kubectl finetune` as people type it: the real kubectl finds the program, a real API server answers."""

import io
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from cluster_tool import REPOSITORY
from tests.kubectl import program

from kubetune_kubectl.__main__ import main
from kubetune_kubectl.jobs import read
from kubetune_kubectl.volume import Image, reader_pod

Object = dict[str, Any]
SECONDS = 60.0
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def environment(kube: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """kubectl and the plugin on PATH, the cluster in KUBECONFIG."""
    return program.environment(tmp_path_factory.mktemp("bin"), kube.kubectl_program, kube.config)


@pytest.fixture(scope="module")
def finetune(environment: dict[str, str], crd: str, namespace: str) -> Callable[..., CompletedProcess[str]]:
    """finetune("status", "bot", stdin=...): the plugin in the module's namespace, with the real kubectl."""

    def command(*words: str, stdin: Object | None = None, inside: bool = True, **more: str) -> CompletedProcess[str]:
        text = stdin if isinstance(stdin, str) else json.dumps(stdin)
        argv = [*words, *(["--namespace", namespace] if inside else [])]
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            for name, value in {**environment, **more}.items():
                patch.setenv(name, value)
            patch.setattr("sys.stdin", io.StringIO(text))
            handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
            code = main(argv)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return CompletedProcess(argv, code, out.getvalue(), err.getvalue())

    return command


def make(finetune: Any, manifest: Any, kubectl: Any, namespace: str) -> Iterator[str]:
    """A job that no operator handles."""
    name = f"job-{uuid.uuid4().hex[:6]}"
    done = finetune("submit", "-", stdin=manifest(name))
    assert done.returncode == 0, done.stderr
    yield name
    kubectl("delete", "finetunejob", name, "--namespace", namespace, "--wait=false")


@pytest.fixture(scope="module")
def submitted(finetune, manifest, kubectl, namespace) -> Iterator[str]:
    """A job for tests that look, or leave it as it was."""
    yield from make(finetune, manifest, kubectl, namespace)


@pytest.fixture
def own(finetune, manifest, kubectl, namespace) -> Iterator[str]:
    """A job of the test's own."""
    yield from make(finetune, manifest, kubectl, namespace)


def patch_status(kubectl, namespace: str, name: str, **status: Any) -> None:
    """What the operator would write."""
    where = ["--namespace", namespace, "--subresource=status", "--type=merge"]
    done = kubectl("patch", "finetunejob", name, *where, "--patch", json.dumps({"status": status}))
    assert done.returncode == 0, done.stderr


def condition(kind: str, reason: str, message: str) -> Object:
    return {
        "type": kind,
        "status": "True",
        "reason": reason,
        "message": message,
        "lastTransitionTime": "2030-01-01T00:00:00Z",
    }


def progress(step: int) -> Object:
    return {"step": step, "totalSteps": 10, "epoch": 0.1, "percentage": 10 * step, "loss": 2.5}


# ---------------------------------------------------------------- submit


def test_kubectl_lists_the_program_as_its_plugin(environment):
    told = subprocess.run(["kubectl", "plugin", "list"], env=environment, capture_output=True, text=True, check=False)
    assert "/kubectl-finetune" in told.stdout


def test_a_submitted_job_is_there_with_the_servers_defaults(finetune, manifest, kubectl, namespace):
    done = finetune("submit", "-", "--set", "training.epochs=7", "-o", "json", stdin=manifest("fresh"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["spec"]["training"] == {"epochs": 7}
    found = json.loads(kubectl("get", "ftj", "fresh", "--namespace", namespace, "-o", "json").stdout)
    assert found["spec"]["workers"]["nodes"] == 1


def test_a_dry_run_leaves_nothing(finetune, manifest, kubectl, namespace):
    done = finetune("submit", "-", "--dry-run", stdin=manifest("dry"))
    assert done.stderr == f"FineTuneJob {namespace}/dry would be created (dry run).\n"
    assert "NotFound" in kubectl("get", "ftj", "dry", "--namespace", namespace).stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_pass_both_judges(finetune, namespace, path):
    done = finetune("submit", str(path), "--dry-run", "--set", f"metadata.namespace={namespace}")
    assert done.returncode == 0, done.stderr


def test_the_same_file_again_changes_nothing(finetune, manifest, submitted):
    done = finetune("submit", "-", stdin=manifest(submitted))
    assert done.returncode == 0
    assert "is there already and as in the file (Pending)." in done.stderr


def test_another_job_of_the_same_name_is_refused_with_both_ways_out(finetune, manifest, submitted):
    done = finetune("submit", "-", stdin=manifest(submitted, training={"epochs": 9}))
    assert done.returncode == 2
    assert "differs from it in spec.training, which cannot be changed" in done.stderr
    assert f"--set metadata.name={submitted}-2" in done.stderr


def test_a_job_of_kubectl_apply_is_met_as_well(finetune, manifest, apply):
    assert apply(manifest("by-apply", training={"epochs": 2})).returncode == 0
    assert finetune("submit", "-", stdin=manifest("by-apply", training={"epochs": 2})).returncode == 0
    done = finetune("submit", "-", stdin=manifest("by-apply", training={"epochs": 3}))
    assert done.returncode == 2
    assert "differs from it in spec.training, which cannot be changed" in done.stderr


def test_generate_name_makes_two_jobs_of_one_file(finetune, manifest):
    body = manifest()
    body["metadata"] = {"generateName": "made-", "labels": body["metadata"]["labels"]}
    names = [json.loads(finetune("submit", "-", "-o", "json", stdin=body).stdout)["metadata"]["name"] for _ in range(2)]
    assert all(name.startswith("made-") for name in names)
    assert names[0] != names[1]


def test_what_tune_manifest_prints_can_be_piped_in(finetune):
    words = ["manifest", "--config", "llama3/8B_lora", "--name", "piped", "model.path=m", "dataset.path=d.jsonl"]
    script = f"from kubetune_trainer.cli import main; raise SystemExit(main({words!r}))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    done = finetune("submit", "-", "--dry-run", stdin=printed.stdout)
    assert done.returncode == 0, done.stderr


def test_a_label_that_only_the_server_knows_to_be_wrong_is_told_in_its_words(finetune, manifest):
    body = manifest("labelled")
    body["metadata"]["labels"] = {"a b": "c"}
    done = finetune("submit", "-", stdin=body)
    assert done.returncode == 2
    assert "metadata.labels: Invalid value" in done.stderr


def test_an_unknown_field_of_the_metadata_is_refused_by_the_server(finetune, manifest):
    body = manifest("strict")
    body["metadata"]["lables"] = {}
    done = finetune("submit", "-", stdin=body)
    assert done.returncode == 2
    assert "lables" in done.stderr


# ---------------------------------------------------------------- asking


def test_status_of_a_new_job_ends_with_3(finetune, submitted):
    done = finetune("status", submitted)
    assert done.returncode == 3
    assert done.stdout.endswith("s\n")


def test_a_near_name_is_named(finetune, submitted):
    done = finetune("status", submitted[:-1])
    assert done.returncode == 2
    assert f"did you mean {submitted}?" in done.stderr


def test_a_name_in_another_namespace_is_found(finetune, submitted, namespace):
    done = finetune("status", submitted, "--namespace", "kube-public", inside=False)
    assert done.stderr.endswith(f"there is one in namespace {namespace}: give -n {namespace}\n")


def test_suspend_and_resume_write_the_spec(finetune, submitted, kubectl, namespace):
    for command, value in (("suspend", "true"), ("resume", "false")):
        assert finetune(command, submitted).returncode == 0
        shown = kubectl("get", "ftj", submitted, "--namespace", namespace, "-o", "jsonpath={.spec.suspend}").stdout
        assert shown == value


def test_a_job_without_a_pod_has_neither_logs_nor_a_report(finetune, submitted):
    assert "is Pending and has no pod yet" in finetune("logs", submitted).stderr
    assert "has no output folder yet" in finetune("report", submitted).stderr


CLUSTERS = {
    "a server that is not there": (["--kubeconfig", "down"], "the cluster does not answer: "),
    "a context that is not there": (["--context", "nope"], "`kubectl config get-contexts` shows the contexts"),
    "a file that is not there": (["--kubeconfig", "/nowhere"], "no such file or directory"),
}


@pytest.mark.parametrize("case", CLUSTERS)
def test_a_cluster_that_cannot_be_asked_is_told_with_the_remedy(finetune, tmp_path, case):
    flags, told = CLUSTERS[case]
    down = tmp_path / "down"
    cluster = {"name": "a", "cluster": {"server": "https://127.0.0.1:1"}}
    context = {"name": "a", "context": {"cluster": "a", "user": ""}}
    down.write_text(yaml.safe_dump({"clusters": [cluster], "contexts": [context], "current-context": "a"}))
    done = finetune("status", *[str(down) if flag == "down" else flag for flag in flags])
    assert done.returncode == 2
    assert told in done.stderr


@pytest.fixture(scope="module")
def person(kubectl, kube, namespace, tmp_path_factory) -> Callable[[str, bool], str]:
    """person("ann", allowed): the kubeconfig of an account with the role of the docs, or with no role."""

    def make(name: str, allowed: bool) -> str:
        role, folder = program.ROLE if allowed else None, tmp_path_factory.mktemp(name)
        return str(program.account(kubectl, kube.config, namespace, name, role, folder))

    return make


def test_without_rights_it_says_which_are_missing(finetune, person):
    done = finetune("status", KUBECONFIG=person("nobody", False))
    assert done.returncode == 2
    assert "You need a role that allows list on finetunejobs" in done.stderr
    assert "`kubectl auth can-i list finetunejobs.kubetune.io` checks it" in done.stderr


def test_the_role_of_the_docs_is_enough(finetune, person, manifest, kubectl, namespace):
    config = {"KUBECONFIG": person("ann", True)}
    assert finetune("submit", "-", stdin=manifest("by-ann"), **config).returncode == 0
    assert finetune("suspend", "by-ann", **config).returncode == 0
    patch_status(kubectl, namespace, "by-ann", state="Failed", conditions=[condition("Failed", "Crash", "It broke.")])
    watched = finetune("watch", "by-ann", **config)
    assert (watched.returncode, watched.stderr) == (1, "")
    told = finetune("logs", "by-ann", **config).stderr
    assert "is Failed and has no pod yet: It broke." in told
    may = ["pods --subresource=log get", "pods create", "pods delete", "pods --subresource=exec create"]
    account = f"--as=system:serviceaccount:{namespace}:ann"
    for words in may:
        kind, *flags, verb = words.split()
        asked = kubectl("auth", "can-i", verb, kind, *flags, account, "--namespace", namespace)
        assert asked.stdout.strip() == "yes", words


# ---------------------------------------------------------------- following


@pytest.fixture
def watching(environment, namespace, own) -> Iterator["subprocess.Popen[str]"]:
    """A `watch` of the test's job."""
    process = subprocess.Popen(
        ["kubectl", "finetune", "watch", own, "--namespace", namespace],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def until(process: "subprocess.Popen[str]", word: str) -> str:
    """The next line with the word."""
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return line
    raise AssertionError(f"it ended without {word!r}: {process.communicate()[1]}")


def test_a_run_is_followed_to_its_end_over_a_lost_watch(watching, own, kubectl, namespace):
    until(watching, "Pending")
    running = condition("Running", "Running", "Attempt 1: 1 of 1 worker running.")
    patch_status(kubectl, namespace, own, state="Running", attempt=1, conditions=[running], progress=progress(1))
    until(watching, "step 1/10")
    until(watching, "Running: Attempt 1")
    # The connections break: both of its kubectls die.
    subprocess.run(["pkill", "-KILL", "-P", str(watching.pid), "kubectl"], check=True)
    patch_status(kubectl, namespace, own, progress=progress(5))
    until(watching, "step 5/10")
    done = condition("Succeeded", "Done", "The adapter is at x/adapter.")
    patch_status(kubectl, namespace, own, state="Succeeded", conditions=[done], progress=progress(10))
    until(watching, "Succeeded: The adapter is at x/adapter.")
    assert watching.wait(timeout=SECONDS) == 0


def test_a_deleted_job_ends_the_watch(watching, own, kubectl, namespace):
    until(watching, "Pending")
    kubectl("delete", "finetunejob", own, "--namespace", namespace)
    assert watching.wait(timeout=SECONDS) == 2
    assert watching.stderr is not None
    assert "was deleted while it was Pending" in watching.stderr.read()


# ---------------------------------------------------------------- the report's pod


def test_the_report_pod_is_taken_where_restricted_is_enforced(kubectl, submitted, namespace):
    assert kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted").returncode == 0
    job = read(json.loads(kubectl("get", "ftj", submitted, "--namespace", namespace, "-o", "json").stdout))
    pod = reader_pod(
        job, Image("registry.invalid/trainer:1", "IfNotPresent", [], [], {"runAsUser": 65532}, None), "abcde"
    )
    done = kubectl("create", "--dry-run=server", "-f", "-", stdin=pod)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
