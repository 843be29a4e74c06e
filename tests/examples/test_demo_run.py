import io
import json
import os
import subprocess
import tarfile
import threading

import follow
import kube
import pytest
import run
import summary
import volumes_pod
from cluster_tool import ClusterError


def job(state="Running", **status):
    conditions = [
        {"type": "Staged", "status": "True", "message": "The model is there."},
        {"type": "Started", "status": "False", "message": "0 of 2 workers run."},
        {"type": "Running", "status": "True", "message": "Attempt 1: 2 of 2 workers running."},
        {"type": "Failed", "status": "False", "reason": "InvalidData", "message": "No answers in the data."},
    ]
    return {
        "metadata": {"name": "demo", "namespace": "kubetune-demo"},
        "status": {"state": state, "conditions": conditions, **status},
    }


PROGRESS = {
    "step": 21,
    "totalSteps": 42,
    "percentage": 50,
    "epoch": 1.0,
    "loss": 0.81234,
    "tokensPerSecond": 131.7,
    "estimatedRemainingSeconds": 125,
}


# --- the stream of a watch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_documents_are_found_however_the_bytes_are_cut(size):
    sent = [{"type": "ADDED", "object": {"text": "größer {"}}, {"type": "MODIFIED", "object": {}}]
    raw = "\n".join(json.dumps(one, indent=4, ensure_ascii=False) for one in sent).encode()
    documents = kube.Documents()
    found = [one for at in range(0, len(raw), size) for one in documents.feed(raw[at : at + size])]
    assert found == sent


def test_a_watch_ticks_without_news_and_ends_with_its_pipe(monkeypatch):
    monkeypatch.setattr(kube, "TICK_SECONDS", 0.01)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe:
        stream = kube.events(pipe)
        assert next(stream) is None
        os.write(writing, b'{"type": "ADDED", "object": {"a": 1}}')
        assert next(event for event in stream if event) == ("ADDED", {"a": 1})
        os.close(writing)
        assert [event for event in stream if event] == []


# --- what is shown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("Staging", "Staging: The model is there."),
        ("Starting", "Starting: 0 of 2 workers run."),
        ("Restarting", "Restarting: 0 of 2 workers run."),
        ("Running", "Running: Attempt 1: 2 of 2 workers running."),
        ("Failed", "Failed: No answers in the data."),
        ("Suspended", "Suspended"),
    ],
)
def test_the_headline_gives_the_state_and_why(state, expected):
    assert follow.headline(job(state)) == expected


def test_a_job_without_a_status_is_pending():
    assert follow.headline({}) == "Pending"
    assert follow.progress_line({}) == ""


def test_the_progress_line_shows_bar_loss_speed_and_time_left():
    line = follow.progress_line(job(progress=PROGRESS))
    assert line == "[############............] 21/42  loss 0.812 | tok/s 132 | ETA 2m05s"


def test_the_progress_line_leaves_out_what_is_not_known():
    few = {"step": 0, "totalSteps": 42, "loss": None}
    assert follow.progress_line(job(progress=few)) == "[........................] 0/42  "


@pytest.mark.parametrize(("seconds", "expected"), [(0, "0s"), (59.6, "1m00s"), (61, "1m01s"), (3599, "59m59s")])
def test_durations(seconds, expected):
    assert follow.duration(seconds) == expected


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_elsewhere_than_on_a_terminal_each_change_is_one_line():
    out = io.StringIO()
    screen = follow.Screen(out, clock=lambda: 0.0)
    for one in (job("Starting"), job("Starting"), job(), job(progress=PROGRESS), job(progress=PROGRESS)):
        screen.show(one)
        screen.tick()
    assert out.getvalue().splitlines() == [
        "[   0s] Starting: 0 of 2 workers run.",
        "[   0s] Running: Attempt 1: 2 of 2 workers running.",
        "[   0s] [############............] 21/42  loss 0.812 | tok/s 132 | ETA 2m05s",
    ]


def test_on_a_terminal_the_line_is_drawn_over_and_never_wraps():
    out = Terminal()
    screen = follow.Screen(out, clock=lambda: 0.0)
    screen.show(job(progress=PROGRESS | {"step": 10**30, "totalSteps": 10**40}))
    screen.tick()
    screen.end()
    drawn = out.getvalue().split("\r\x1b[K")
    assert drawn[-1] == ""
    assert out.getvalue().count("\n") == 1
    assert all(len(line) < 100 for line in drawn)


# --- following -----------------------------------------------------------------------------------------------------


class Script:
    """A cluster whose watches go as written; an error ends a watch as a lost server does."""

    def __init__(self, *watches):
        self.watches = iter(watches)

    def watch(self, *_):
        for event in next(self.watches):
            if isinstance(event, Exception):
                raise event
            yield event


def followed(*watches):
    return follow.follow(Script(*watches), "demo", "kubetune-demo", follow.Screen(io.StringIO()))


def test_a_job_is_followed_until_it_ended():
    ended = job("Succeeded")
    assert followed([("ADDED", job()), None, ("MODIFIED", ended), ("MODIFIED", job("Failed"))]) is ended


def test_a_watch_that_ends_is_started_again(monkeypatch):
    monkeypatch.setattr(follow.time, "sleep", lambda _: None)
    ended = job("Failed")
    assert followed([("ADDED", job())], [ClusterError("refused")], [("ADDED", ended)]) is ended


def test_a_server_that_stays_away_is_told(monkeypatch):
    monkeypatch.setattr(follow.time, "sleep", lambda _: None)
    with pytest.raises(ClusterError, match="refused"):
        followed(*[[ClusterError("refused")]] * (follow.LOST_WATCHES + 1))


def test_a_deleted_job_is_told_at_once():
    with pytest.raises(ClusterError, match="FineTuneJob demo was deleted"):
        followed([("ADDED", job()), ("DELETED", job())])


# --- the end -------------------------------------------------------------------------------------------------------


class Cluster:
    config = "/tmp/config"
    external = None


def test_the_summary_of_a_success(tmp_path):
    result = {
        "adapterPath": "demo-1/adapter",
        "samplesPath": "demo-1/samples.json",
        "lossPicturePath": "demo-1/loss.png",
        "initialValidationLoss": 4.0,
        "finalValidationLoss": 0.1,
    }
    samples = [
        {"prompt": "What is a?", "reference": "It is b.", "before": "Long\n\nago", "after": "It is b."},
        {"prompt": "What is c?", "reference": "It is d.", "before": None, "after": "It is e."},
    ]
    (tmp_path / "demo-1").mkdir()
    (tmp_path / "demo-1" / "samples.json").write_text(json.dumps(samples))
    finished = job("Succeeded", result=result)
    assert summary.result_paths(finished) == ["demo-1/adapter", "demo-1/samples.json", "demo-1/loss.png"]
    told = summary.of_success(Cluster, finished, tmp_path)
    assert "What is a?\n  before: Long ago\n  after:  It is b.\n  right, word for word\n" in told
    assert "What is c?\n  before: not asked\n  after:  It is e.\n  wrong; the CRD says: It is d.\n" in told
    assert "Held-out loss   4.000 before, 0.100 after (98% lower)" in told
    assert f"Adapter         {tmp_path}/demo-1/adapter" in told


def test_the_summary_of_a_failure_is_the_conditions_sentence():
    told = summary.of_failure(Cluster, job("Failed"))
    assert "The demo failed: No answers in the data. (InvalidData)" in told
    assert "kubectl describe ftj demo -n kubetune-demo" in told


def test_the_cluster_is_only_removed_where_it_is_ours():
    assert "make cluster-down" in summary.look_around(Cluster, job())
    external = type("External", (Cluster,), {"external": "kind"})
    assert "make cluster-down" not in summary.look_around(external, job())


def test_image_references_become_the_charts_values():
    images = {"operator": "127.0.0.1:5000/kubetune-operator:a1", "trainer": "r/x:b"}
    assert run.image_values(images) == [
        "--set-string=image.repository=127.0.0.1:5000/kubetune-operator",
        "--set-string=image.tag=a1",
        "--set-string=trainerImage.repository=r/x",
        "--set-string=trainerImage.tag=b",
    ]


# --- files onto a volume -------------------------------------------------------------------------------------------


def put(target, source, digest="d1", broken=False):
    """What `VolumesPod.put` does in its pod, here by a shell of this machine."""
    command = ["sh", "-c", volumes_pod.PUT, "sh", str(target), digest]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as shell:
        if broken:
            shell.stdin.write(b"no tar at all" * 100)
            shell.stdin.close()
        else:
            assert not kube.write_tar(shell.stdin, source)
        shell.stderr.read()
    return shell.returncode


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "one").write_text("1")
    (tmp_path / "elsewhere").write_text("2")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    return folder


def test_a_folder_arrives_with_the_content_of_its_links(tmp_path, source):
    target = tmp_path / "target"
    assert put(target, source) == 0
    assert {path.name: path.read_text() for path in target.iterdir()} == {"one": "1", "link": "2"}
    assert not (target / "link").is_symlink()
    assert (tmp_path / "target.digest").read_text() == "d1\n"


def test_a_folder_is_replaced_whole(tmp_path, source):
    target = tmp_path / "target"
    put(target, source)
    (target / ".complete").write_text("of the old files")
    (source / "one").unlink()
    assert put(target, source, "d2") == 0
    assert [path.name for path in target.iterdir()] == ["link"]
    assert (tmp_path / "target.digest").read_text() == "d2\n"


def test_a_broken_copy_leaves_the_old_files_and_no_digest(tmp_path, source):
    target = tmp_path / "target"
    put(target, source)
    assert put(target, source, "d2", broken=True) != 0
    assert (target / "one").read_text() == "1"
    assert not (tmp_path / "target.digest").exists()


def test_the_digest_tells_names_and_contents(source):
    first = volumes_pod.digest_of(source)
    assert volumes_pod.digest_of(source) == first
    (source / "one").rename(source / "two")
    second = volumes_pod.digest_of(source)
    (source / "two").write_text("x")
    assert len({first, second, volumes_pod.digest_of(source)}) == 3


def test_a_reader_that_goes_away_is_noticed(source):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as pipe:
        assert kube.write_tar(pipe, source)


def test_a_tar_is_read_while_it_is_written(tmp_path, source):
    reading, writing = os.pipe()
    writer = threading.Thread(target=lambda: kube.write_tar(os.fdopen(writing, "wb"), source))
    writer.start()
    with os.fdopen(reading, "rb") as pipe, tarfile.open(fileobj=pipe, mode="r|") as archive:
        archive.extractall(tmp_path / "copy", filter="data")
    writer.join()
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["link", "one"]


def test_the_pod_is_fit_for_a_restricted_namespace():
    pod = volumes_pod.manifest("ns", "image")["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == volumes_pod.USER
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pod["automountServiceAccountToken"] is False
