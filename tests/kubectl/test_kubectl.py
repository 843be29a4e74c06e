"""kubectl's words as errors with remedies, and its output as it comes. The words are those of kubectl 1.35."""

import json

import pytest
from tests.kubectl.conftest import events

from kubetune_kubectl.errors import NoCrd, NoKubectl, NoRights, NotFound, PluginError, Refused, Unreachable
from kubetune_kubectl.kubectl import Documents, Kubectl, as_error

NOISE = (
    'E1124 14:50:19.440251   15239 memcache.go:265] "Unhandled Error" err="couldn\'t get current server API group '
    'list: Get \\"http://localhost:8080/api?timeout=32s\\": dial tcp 127.0.0.1:8080: connect: connection refused"\n'
)
WORDS = {
    "no CRD is installed": (
        'error: the server doesn\'t have a resource type "finetunejobs"\n',
        NoCrd,
        "the cluster knows no FineTuneJobs: install Kubetune's chart",
    ),
    "no CRD is installed, on apply": (
        'error: resource mapping not found for name: "x" namespace: "default" from "STDIN": no matches for kind '
        '"FineTuneJob" in version "kubetune.io/v1alpha1"\nensure CRDs are installed first\n',
        NoCrd,
        "or choose another cluster with --context",
    ),
    "no right to list": (
        'Error from server (Forbidden): finetunejobs.kubetune.io is forbidden: User "ann" cannot list resource '
        '"finetunejobs" in API group "kubetune.io" in the namespace "default"\n',
        NoRights,
        "You need a role that allows list on finetunejobs; `kubectl auth can-i list finetunejobs.kubetune.io` checks",
    ),
    "no right to read a log": (
        'Error from server (Forbidden): pods "bot-a1-0" is forbidden: User "ann" cannot get resource "pods/log" in API '
        'group "" in the namespace "team"\n',
        NoRights,
        "You need a role that allows get on pods/log; `kubectl auth can-i get pods/log` checks it",
    ),
    "a token that is not known": (
        "error: You must be logged in to the server (the server has asked for the client to provide credentials)\n",
        NoRights,
        "log in again as for kubectl",
    ),
    "a context that is not there": (
        "Error in configuration: context was not found for specified context: nope\n",
        Refused,
        "context was not found for specified context: nope; `kubectl config get-contexts` shows the contexts",
    ),
    "a kubeconfig that is not there": (
        "error: stat /nope: no such file or directory\n",
        Refused,
        "stat /nope: no such file or directory",
    ),
    "no kubeconfig at all": (
        NOISE * 4 + "The connection to the server localhost:8080 was refused - did you specify the right host or port?",
        Unreachable,
        "no cluster is chosen: set KUBECONFIG, or give --kubeconfig and --context",
    ),
    "an API server that is down": (
        "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?\n",
        Unreachable,
        "the cluster does not answer: ",
    ),
    "an API server that is throttling": (
        "Error from server (TooManyRequests): the server has received too many requests\n",
        Unreachable,
        "the cluster does not answer: the server has received too many requests",
    ),
    "a name that is not there": (
        'Error from server (NotFound): finetunejobs.kubetune.io "nope" not found\n',
        NotFound,
        'finetunejobs.kubetune.io "nope" not found',
    ),
    "a namespace that is not there": (
        'Error from server (NotFound): namespaces "nonono" not found\n',
        NotFound,
        'namespaces "nonono" not found',
    ),
    "a pod that Pod Security refuses is no question of rights": (
        'Error from server (Forbidden): pods "x" is forbidden: violates PodSecurity "restricted:latest"\n',
        Refused,
        "violates PodSecurity",
    ),
    "a quota that is used up is none either": (
        'Error from server (Forbidden): pods "x" is forbidden: exceeded quota: team, requested: pods=1, used: pods=9\n',
        Refused,
        "exceeded quota: team",
    ),
    "silence": ("", Refused, "kubectl failed without a word"),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_become_an_error_of_their_kind_with_a_remedy(case):
    words, kind, told = WORDS[case]
    error = as_error(words)
    assert type(error) is kind
    assert told in str(error)
    assert not str(error).startswith(("error:", "Error from server"))


def test_a_kubectl_that_was_killed_may_be_asked_again():
    error = as_error("", -9)
    assert type(error) is Unreachable
    assert str(error) == "kubectl was ended by signal 9"


def test_a_kubectl_that_ctrl_c_has_reached_first_is_an_interruption():
    with pytest.raises(KeyboardInterrupt):
        as_error("", -2)


def test_documents_are_given_as_soon_as_they_are_complete_wherever_the_bytes_are_cut():
    text = events(("ADDED", {"a": "ü"}), ("MODIFIED", {"b": [1, 2]})).encode()
    for cut in range(len(text) + 1):
        documents = Documents()
        found = [*documents.feed(text[:cut]), *documents.feed(text[cut:])]
        assert [document["type"] for document in found] == ["ADDED", "MODIFIED"]
        assert found[0]["object"] == {"a": "ü"}


def test_the_flags_of_the_command_line_reach_kubectl():
    command = Kubectl("prod", "/home/ann/config", "team").command("get", "pods")
    assert command[1:] == ["--context=prod", "--kubeconfig=/home/ann/config", "--namespace=team", "get", "pods"]
    assert Kubectl().command("get")[1:] == ["get"]


def test_without_kubectl_it_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoKubectl, match="kubectl is not on PATH: install it"):
        Kubectl().run("get", "pods")


def test_a_write_names_its_field_manager_and_gives_the_object(replay, kubectl):
    replay.answer("patch", out=json.dumps({"kind": "FineTuneJob"}))
    assert kubectl.change("patch", "finetunejob", "bot") == {"kind": "FineTuneJob"}
    assert "--field-manager=kubectl-finetune" in replay.asked("patch")[0]


def test_a_watch_gives_events_until_it_ends(replay, kubectl):
    replay.answer("--watch", out=events(("ADDED", {"n": 1}), ("DELETED", {"n": 2})))
    watch = kubectl.watch("pods", "--selector=a")
    found = []
    while (read := watch.read()) is not None:
        found += read
    assert [(event.type, event.object["n"]) for event in found] == [("ADDED", 1), ("DELETED", 2)]


def test_a_watch_that_fails_says_why(replay, kubectl):
    replay.answer("--watch", err="Unable to connect to the server: unexpected EOF\n")
    with pytest.raises(Unreachable, match="unexpected EOF"):
        kubectl.watch("pods").read()


def test_a_watch_that_the_server_gives_up_is_lost(replay, kubectl):
    gone = {"kind": "Status", "code": 410, "message": "too old resource version: 7 (9)"}
    replay.answer("--watch", out=events(("ERROR", gone)), hangs=True)
    watch = kubectl.watch("pods")
    with pytest.raises(Unreachable, match="too old resource version"):
        watch.read()
    watch.close()


def test_every_error_of_the_plugin_is_caught_by_its_root():
    assert all(issubclass(kind, PluginError) for _, kind, _ in WORDS.values())
