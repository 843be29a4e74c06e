"""What Prometheus is told."""

import pytest

from kubetune_contract.progress import Progress
from kubetune_operator.metrics import STATES, Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def value(metrics: Metrics, sample: str, /, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(sample, labels)


def progress(**fields) -> Progress:
    return Progress(step=7, total_steps=50, epoch=0.5, percentage=14, **fields)


def test_every_state_is_counted_also_with_none_in_it(metrics):
    metrics.count_jobs(["Running", "Running", "Failed"])
    counts = {state: value(metrics, "kubetune_jobs", state=state) for state in STATES}
    assert counts == {**dict.fromkeys(STATES, 0.0), "Running": 2.0, "Failed": 1.0}


def test_a_state_that_was_left_is_counted_down(metrics):
    metrics.count_jobs(["Running"])
    metrics.count_jobs(["Succeeded"])
    assert value(metrics, "kubetune_jobs", state="Running") == 0


def test_a_training_is_shown_by_namespace_and_name(metrics):
    metrics.training("team", "bot", progress(loss=1.5, tokens_per_second=900.0))
    labels = {"namespace": "team", "name": "bot"}
    assert value(metrics, "kubetune_training_step", **labels) == 7
    assert value(metrics, "kubetune_training_loss", **labels) == 1.5
    assert value(metrics, "kubetune_training_tokens_per_second", **labels) == 900


def test_what_a_report_does_not_say_is_not_shown(metrics):
    metrics.training("team", "bot", progress())
    assert value(metrics, "kubetune_training_loss", namespace="team", name="bot") is None


def test_a_training_that_is_over_is_shown_no_more(metrics):
    metrics.training("team", "bot", progress(loss=1.5))
    metrics.training("team", "other", progress(loss=1.5))
    metrics.forget("team", "bot")
    assert value(metrics, "kubetune_training_step", namespace="team", name="bot") is None
    assert value(metrics, "kubetune_training_step", namespace="team", name="other") == 7


def test_forgetting_what_was_never_shown_is_fine(metrics):
    metrics.forget("team", "bot")


def test_two_operators_in_one_process_do_not_share_metrics():
    first, second = Metrics(), Metrics()
    first.errors.inc()
    assert value(second, "kubetune_reconcile_errors_total") == 0


def test_the_text_is_prometheus(metrics):
    metrics.reconcile_seconds.observe(0.02)
    text = metrics.text().decode()
    assert 'kubetune_reconcile_seconds_bucket{le="0.025"} 1.0' in text
    assert "# HELP kubetune_jobs FineTuneJobs by state" in text
