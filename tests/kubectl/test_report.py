"""`report`: the pod that reads the volume, the files, the summary."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from tests.kubectl.conftest import events, listed, pods_of, recorded

from kubetune_kubectl import report, volume
from kubetune_kubectl.errors import NothingThere, Refused, Unreachable
from kubetune_kubectl.report import Summary, read_metrics
from kubetune_kubectl.volume import Image, reader_pod

LINES = [
    {"step": 0, "validation_loss": 6.5, "time": "2026-11-24T15:00:00.000+00:00"},
    {"step": 1, "loss": 6.0, "tokens": 100, "tokens_per_second": 50.0, "time": "2026-11-24T15:00:02.000+00:00"},
    {"step": 2, "loss": 5.0, "tokens": 120, "tokens_per_second": 60.0, "time": "2026-11-24T15:00:04.000+00:00"},
    {"step": 3, "loss": 4.0, "tokens": 80, "tokens_per_second": 40.0, "time": "2026-11-24T15:01:10.000+00:00"},
    {"step": 3, "validation_loss": 4.5, "time": "2026-11-24T15:01:12.000+00:00"},
]
METRICS = "".join(json.dumps(line) + "\n" for line in LINES)


def image(name: str = "succeeded") -> Image:
    pod = pods_of(name)[0]
    return Image.of(pod["spec"], pod["spec"]["nodeName"])


# ---------------------------------------------------------------- the pod


def test_the_pod_fulfils_the_restricted_profile_and_holds_no_token(job):
    pod = reader_pod(job("succeeded"), image(), "abcde")
    spec, [container] = pod["spec"], pod["spec"]["containers"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {*container["resources"]} == {"requests", "limits"}


def test_the_pod_reads_the_output_claim_as_the_user_who_wrote_it(job):
    pod = reader_pod(job("succeeded"), image(), "abcde")
    assert pod["spec"]["volumes"] == [{"name": "output", "persistentVolumeClaim": {"claimName": "output"}}]
    [mount] = pod["spec"]["containers"][0]["volumeMounts"]
    assert mount == {"name": "output", "mountPath": "/kubetune/output", "readOnly": True}
    assert pod["spec"]["securityContext"]["runAsUser"] == 65532


def test_the_pod_ends_by_itself_and_goes_with_its_job(job):
    pod = reader_pod(job("succeeded"), image(), "abcde")
    assert pod["metadata"]["name"] == "two-report-abcde"
    assert pod["metadata"]["ownerReferences"][0]["uid"] == job("succeeded").uid
    assert pod["spec"]["activeDeadlineSeconds"] == volume.LIFE_SECONDS
    assert pod["spec"]["restartPolicy"] == "Never"


def test_the_pod_may_run_where_the_workers_did(job):
    secured = image()._replace(tolerations=[{"key": "gpu"}], pull_secrets=[{"name": "registry"}])
    spec = reader_pod(job("succeeded"), secured, "abcde")["spec"]
    assert spec["containers"][0]["image"] == pods_of("succeeded")[0]["spec"]["containers"][0]["image"]
    assert spec["tolerations"] == [{"key": "gpu"}]
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    [term] = spec["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["preference"]["matchFields"][0]["values"] == ["node-0"]


def test_the_pod_carries_none_of_the_labels_that_the_operator_watches(job):
    assert not any(
        label.startswith("kubetune.io/") for label in reader_pod(job("failed"), image(), "a")["metadata"]["labels"]
    )


# ---------------------------------------------------------------- its image


def test_the_image_is_that_of_the_newest_worker_pod(replay, kubectl, job):
    replay.answer("get", "pods", out=listed(*pods_of("succeeded")))
    replay.answer("get", "jobs.batch", out=listed())
    assert report.image_of(kubectl, job("succeeded"), None) == image()


def test_where_the_pods_are_gone_it_is_that_of_their_job(replay, kubectl, job):
    replay.answer("get", "pods", out=listed())
    replay.answer("get", "jobs.batch", out=listed(recorded("failed-job")))
    found = report.image_of(kubectl, job("failed"), None)
    assert (found.image, found.node) == (image("failed").image, None)


def test_a_given_image_replaces_it_and_keeps_the_rest(replay, kubectl, job):
    replay.answer("get", "pods", out=listed(*pods_of("succeeded")))
    replay.answer("get", "jobs.batch", out=listed())
    assert report.image_of(kubectl, job("succeeded"), "python:3") == image()._replace(image="python:3")


def test_where_nothing_is_left_an_image_must_be_given(replay, kubectl, job):
    replay.answer("get", out=listed())
    with pytest.raises(NothingThere, match="its image is not known: give --image"):
        report.image_of(kubectl, job("succeeded"), None)
    given = report.image_of(kubectl, job("succeeded"), "python:3")
    assert reader_pod(job("succeeded"), given, "a")["spec"]["securityContext"]["fsGroup"] == 65532


# ---------------------------------------------------------------- fetching


def archive(**files: str) -> bytes:
    page = io.BytesIO()
    with tarfile.open(fileobj=page, mode="w") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return page.getvalue()


def test_only_the_wanted_files_are_written_and_nothing_beside_the_folder(tmp_path):
    sent = archive(a="1", b="2", **{"..__a": "3", "dir__a": "4"})
    found = volume._unpack(io.BytesIO(sent), {"a"}, tmp_path / "to")
    assert found == [tmp_path / "to" / "a"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a"]


def test_a_copy_that_breaks_off_leaves_no_half_file(tmp_path):
    sent = archive(a="1", b="2" * 5000)[:-4000]
    with pytest.raises(tarfile.TarError):
        volume._unpack(io.BytesIO(sent[:2500]), {"a", "b"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_sender_takes_what_is_there_and_follows_no_link(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text(METRICS)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "loss.png").symlink_to(tmp_path / "secret")
    words = [sys.executable, "-c", volume._SEND, str(tmp_path), "metrics.jsonl", "loss.png", "samples.json"]
    sent = subprocess.run(words, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(sent)) as tar:
        assert tar.getnames() == ["metrics.jsonl"]


def test_the_sender_names_a_folder_that_is_not_there():
    done = subprocess.run(
        [sys.executable, "-c", volume._SEND, "/nowhere", "a"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (1, "no such folder: /nowhere")


def pod_in(phase: str, *conditions, **status):
    return {"metadata": {"name": "p"}, "status": {"phase": phase, "conditions": list(conditions), **status}}


READY = pod_in("Running", {"type": "Ready", "status": "True"})
UNSCHEDULED = pod_in(
    "Pending", {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available: 1 Insufficient cpu."}
)
PULLING = pod_in(
    "Pending", containerStatuses=[{"state": {"waiting": {"reason": "ErrImagePull", "message": "no such host"}}}]
)


@pytest.fixture
def cluster(replay):
    """cluster(pod, ...): a finished job whose report pod goes through these sights."""

    def make(*sights, name: str = "succeeded"):
        replay.answer("get", "two", out=json.dumps(recorded(name)))
        replay.answer("get", "jobs.batch", out=listed())
        replay.answer("get", "pods", "--watch", out=events(*(("MODIFIED", pod) for pod in sights)), hangs=True)
        replay.answer("get", "pods", out=listed(*pods_of(name)))
        replay.answer("create", out="{}")
        replay.answer("delete", out="pod deleted")

    return make


def sends(replay, **files: str) -> None:
    """The pod sends these files. The replay's output is text: a tar of ASCII files is one."""
    replay.answer("exec", out=archive(**files).decode("ascii"))


def run(kubectl, tmp_path: Path, page, **options) -> int:
    return report.run(
        kubectl, "two", output=tmp_path / "out", timeout=options.pop("timeout", 20), stream=page, **options
    )


def test_files_are_fetched_summed_up_and_the_pod_is_removed(cluster, replay, kubectl, tmp_path, page):
    cluster(UNSCHEDULED, READY)
    sends(replay, **{"metrics.jsonl": METRICS, "loss.png": "PNG", "samples.json": "[]"})
    assert run(kubectl, tmp_path, page) == 0
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == METRICS
    lines = page.getvalue().splitlines()
    assert lines[0] == "kubetune-plugin/two  Succeeded"
    assert "training loss   6 at first, 4 at last" in lines
    assert "held-out loss   6.5, then 4.5" in lines
    assert "speed           50 tok/s (median)" in lines
    assert "adapter         two-e5582462/adapter" in lines
    assert lines[-1] == f"fetched to {tmp_path / 'out'}: metrics.jsonl, loss.png, samples.json"
    assert len(replay.asked("delete", "pod")) == 1


def test_a_running_job_has_no_picture_yet_and_it_is_said(cluster, replay, kubectl, tmp_path, page):
    cluster(READY)
    sends(replay, **{"metrics.jsonl": METRICS + '{"step": 4, "lo'})
    assert run(kubectl, tmp_path, page) == 0
    assert page.getvalue().splitlines()[-1] == "loss.png is drawn when the run ends"


def test_json_has_the_figures_and_the_files(cluster, replay, kubectl, tmp_path, page):
    cluster(READY)
    sends(replay, **{"metrics.jsonl": METRICS})
    run(kubectl, tmp_path, page, as_json=True)
    found = json.loads(page.getvalue())
    assert found["files"] == [str(tmp_path / "out" / "metrics.jsonl")]
    assert found["summary"] == {
        "steps": 3,
        "tokens": 300,
        "initialLoss": 6.0,
        "finalLoss": 4.0,
        "validationLosses": [6.5, 4.5],
        "tokensPerSecond": 50.0,
        "seconds": 72.0,
    }


FAULTS = {
    "a pod that is not scheduled in time": ([UNSCHEDULED], {}, 0.6, NothingThere, "1 Insufficient cpu"),
    "an image that cannot be pulled": ([PULLING], {}, 0.6, NothingThere, "ErrImagePull: no such host"),
    "a pod that ends early": ([pod_in("Failed", message="evicted")], {}, 20, NothingThere, "ended early: evicted"),
    "a run without a step": ([READY], {"out": archive().decode()}, 20, NothingThere, "no step is done"),
    "a run without a folder": (
        [READY],
        {"err": "no such folder: /kubetune/output/two\ncommand terminated with exit code 1\n"},
        20,
        Refused,
        "no such folder",
    ),
    "a connection that breaks": (
        [READY],
        {"out": archive(a="1" * 900)[:700].decode()},
        20,
        Unreachable,
        "run it again",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_whatever_goes_wrong_the_pod_is_removed(cluster, replay, kubectl, tmp_path, page, case):
    sights, sent, timeout, kind, told = FAULTS[case]
    cluster(*sights)
    replay.answer("exec", **sent)
    with pytest.raises(kind, match=told):
        run(kubectl, tmp_path, page, timeout=timeout)
    assert len(replay.asked("delete", "pod")) == 1


def test_an_interrupted_report_removes_its_pod(cluster, replay, kubectl, tmp_path, page):
    cluster(UNSCHEDULED)
    interrupt = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        run(kubectl, tmp_path, page, timeout=60)
    interrupt.join()
    assert len(replay.asked("delete", "pod")) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_job_that_never_started_has_nothing_to_fetch(replay, kubectl, tmp_path, page):
    body = recorded("running")
    body["status"].pop("outputPath")
    replay.answer("get", out=json.dumps(body))
    with pytest.raises(NothingThere, match="is Running and has no output folder yet"):
        run(kubectl, tmp_path, page)
    assert replay.asked("create") == []


# ---------------------------------------------------------------- the summary


def test_a_torn_last_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(METRICS + '{"step": 4, "loss": 3')
    assert read_metrics(tmp_path / "metrics.jsonl") == LINES


def test_a_run_without_a_step_has_an_empty_summary():
    assert Summary.of([]).rows() == [("steps", "0, 0 tokens")]
