"""What Prometheus is told, and that the documentation, the chart's pictures and the code tell the same."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kubetune_contract.progress import Progress
from kubetune_operator import metrics as module
from kubetune_operator.api import FineTuneJobStatus
from kubetune_operator.connection import Call
from kubetune_operator.metrics import STATES, Metrics, standing

ROOT = Path(__file__).parents[2]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def value(metrics: Metrics, sample: str, /, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(sample, labels)


def progress(**fields) -> Progress:
    return Progress(step=7, total_steps=50, epoch=0.5, percentage=14, **fields)


# ---------------------------------------------------------------- FineTuneJobs


def test_jobs_are_counted_by_state_and_reason(metrics):
    metrics.count_jobs(
        [("Running", "Running"), ("Running", "Running"), ("Failed", "OOMKilled"), ("Failed", "InvalidData")]
    )
    assert value(metrics, "kubetune_jobs", state="Running", reason="Running") == 2
    assert value(metrics, "kubetune_jobs", state="Failed", reason="OOMKilled") == 1
    assert value(metrics, "kubetune_jobs", state="Failed", reason="InvalidData") == 1


def test_every_state_is_shown_also_with_no_job_in_it(metrics):
    metrics.count_jobs([])
    assert {state: value(metrics, "kubetune_jobs", state=state, reason="") for state in STATES} == dict.fromkeys(
        STATES, 0
    )


def test_a_state_that_was_left_is_shown_no_more(metrics):
    metrics.count_jobs([("Running", "Running")])
    metrics.count_jobs([("Succeeded", "Done")])
    assert value(metrics, "kubetune_jobs", state="Running", reason="Running") is None
    assert value(metrics, "kubetune_jobs", state="Running", reason="") == 0


def test_reasons_that_trainers_make_up_do_not_fill_the_memory(metrics, monkeypatch):
    monkeypatch.setattr(module, "MOST_REASONS", 2)
    metrics.count_jobs([("Failed", f"Reason{number}") for number in range(9)])
    assert value(metrics, "kubetune_jobs", state="Failed", reason="Reason1") == 1
    assert value(metrics, "kubetune_jobs", state="Failed", reason="Other") == 7


def condition(kind: str, status: str, reason: str) -> dict[str, str]:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": "m",
        "lastTransitionTime": "2030-01-01T00:00:00Z",
    }


STANDINGS = [
    ("nothing yet", {}, ("Pending", "")),
    ("staging", {"state": "Staging", "conditions": [condition("Staged", "False", "Staging")]}, ("Staging", "Staging")),
    (
        "workers that do not come up",
        {
            "state": "Starting",
            "conditions": [condition("Staged", "True", "Staged"), condition("Started", "False", "Unschedulable")],
        },
        ("Starting", "Unschedulable"),
    ),
    (
        "running",
        {
            "state": "Running",
            "conditions": [condition("Started", "True", "Started"), condition("Running", "True", "Running")],
        },
        ("Running", "Running"),
    ),
    (
        "failed",
        {
            "state": "Failed",
            "conditions": [condition("Running", "False", "OOMKilled"), condition("Failed", "True", "OOMKilled")],
        },
        ("Failed", "OOMKilled"),
    ),
]


@pytest.mark.parametrize(("status", "expected"), [case[1:] for case in STANDINGS], ids=[case[0] for case in STANDINGS])
def test_the_reason_of_a_state_is_that_of_its_condition(status, expected):
    assert standing(status) == expected


def test_restarts_disruptions_and_ends_are_counted_when_they_are_told(metrics):
    before = FineTuneJobStatus(state="Running", restarts=1, disruptions=0)
    after = FineTuneJobStatus.model_validate(
        {"state": "Failed", "restarts": 2, "disruptions": 3, "conditions": [condition("Failed", "True", "OOMKilled")]}
    )
    metrics.told(before, after)
    metrics.told(after, after)
    assert value(metrics, "kubetune_restarts_total") == 1
    assert value(metrics, "kubetune_disruptions_total") == 3
    assert value(metrics, "kubetune_jobs_finished_total", state="Failed", reason="OOMKilled") == 1


# ---------------------------------------------------------------- trainings


def test_a_training_is_shown_by_namespace_and_name(metrics):
    metrics.training("team", "bot", progress(loss=1.5, tokens_per_second=900.0, estimated_remaining_seconds=70))
    shown = ("step", "total_steps", "loss", "tokens_per_second", "remaining_seconds")
    found = [value(metrics, f"kubetune_training_{name}", namespace="team", name="bot") for name in shown]
    assert found == [7, 50, 1.5, 900, 70]


def test_what_a_report_does_not_say_is_not_shown(metrics):
    metrics.training("team", "bot", progress())
    assert value(metrics, "kubetune_training_loss", namespace="team", name="bot") is None


def test_a_training_that_is_over_is_shown_no_more(metrics):
    metrics.training("team", "bot", progress(loss=1.5))
    metrics.training("team", "other", progress(loss=1.5))
    metrics.forget("team", "bot")
    assert value(metrics, "kubetune_training_step", namespace="team", name="bot") is None
    assert value(metrics, "kubetune_training_step", namespace="team", name="other") == 7


def test_a_late_report_of_a_training_that_is_over_does_not_stay(metrics):
    metrics.training("team", "bot", progress())
    metrics.training("team", "other", progress())
    metrics.keep({"team/other"})
    assert value(metrics, "kubetune_training_step", namespace="team", name="bot") is None
    assert value(metrics, "kubetune_training_step", namespace="team", name="other") == 7


def test_the_number_of_trainings_shown_is_bounded(metrics, monkeypatch):
    monkeypatch.setattr(module, "MOST_TRAININGS", 2)
    for number in range(5):
        metrics.training("team", f"bot-{number}", progress())
    assert value(metrics, "kubetune_training_step", namespace="team", name="bot-4") is None
    metrics.forget("team", "bot-0")
    metrics.training("team", "bot-4", progress())
    assert value(metrics, "kubetune_training_step", namespace="team", name="bot-4") == 7


def test_forgetting_what_was_never_shown_is_fine(metrics):
    metrics.forget("team", "bot")


# ---------------------------------------------------------------- the operator


def test_requests_are_counted_by_verb_resource_and_code(metrics):
    metrics.called(Call("patch", "finetunejobs/status", "409", 0.02))
    assert value(metrics, "kubetune_api_requests_total", verb="patch", resource="finetunejobs/status", code="409") == 1
    assert value(metrics, "kubetune_api_request_duration_seconds_bucket", verb="patch", le="0.025") == 1


def test_watches_that_begin_anew_are_counted_by_their_cause(metrics):
    restarted = metrics.watch_of("pods")
    restarted("expired")
    assert value(metrics, "kubetune_watch_restarts_total", resource="pods", cause="expired") == 1
    assert value(metrics, "kubetune_watch_restarts_total", resource="pods", cause="error") == 0


def test_two_operators_in_one_process_do_not_share_metrics():
    first, second = Metrics(), Metrics()
    first.errors.inc()
    assert value(second, "kubetune_reconcile_errors_total") == 0


def test_the_text_is_prometheus(metrics):
    metrics.reconcile_seconds.observe(0.02)
    families = {family.name for family in text_string_to_metric_families(metrics.text().decode())}
    assert {"kubetune_reconcile_duration_seconds", "kubetune_leader", "process_resident_memory_bytes"} <= families


# ---------------------------------------------------------------- what people read


def declared(metrics: Metrics) -> dict[str, tuple[str, str, str]]:
    """name: (type, labels, help) of every metric of ours, named as Prometheus names it."""
    found = {}
    for collector in set(metrics.registry._names_to_collectors.values()):
        if not hasattr(collector, "_labelnames"):
            continue  # the process's own, which Prometheus documents
        name = collector._name + ("_total" if collector._type == "counter" else "")
        found[name] = (collector._type, ", ".join(collector._labelnames), collector._documentation)
    return found


def documented() -> dict[str, tuple[str, str, str]]:
    rows = re.findall(
        r"^\| `(kubetune_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", (ROOT / "docs/metrics.md").read_text(), re.M
    )
    return {name: (kind, labels.replace("`", ""), text) for name, kind, labels, text in rows}


def test_the_page_about_metrics_lists_those_that_there_are(metrics):
    assert documented() == declared(metrics)


@pytest.mark.parametrize("name", Metrics().registry._names_to_collectors)
def test_names_follow_the_conventions(name):
    assert re.fullmatch(r"(kubetune|process)_[a-z_]+", name)


DASHBOARD = json.loads((ROOT / "charts/kubetune/files/dashboard.json").read_text())


def test_every_panel_asks_for_metrics_that_there_are(metrics):
    known = declared(metrics)
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            asked = set(re.findall(r"kubetune_\w+", target["expr"]))
            asked = {re.sub(r"_bucket$|_count$|_sum$", "", name) for name in asked}
            assert asked, panel["title"]
            assert asked <= set(known), panel["title"]


def test_the_dashboard_shows_every_metric_that_tells_how_things_are(metrics):
    text = json.dumps(DASHBOARD)
    missing = {name for name in declared(metrics) if name not in text}
    assert missing == {"kubetune_status_writes_total"}
