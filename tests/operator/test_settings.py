"""Settings are read from the environment: typed, closed, all problems at once."""

from pathlib import Path

import pytest

from kubetune_operator.settings import Settings, SettingsError, variable

SMALLEST = {"KUBETUNE_TRAINER_IMAGE": "trainer:1", "KUBETUNE_NAMESPACE": "kubetune"}
TLS = {
    "KUBETUNE_PROGRESS_URL": "https://kubetune-progress.kubetune.svc:8443",
    "KUBETUNE_CA_FILE": "/tls/ca.crt",
    "KUBETUNE_TLS_CERT_FILE": "/tls/tls.crt",
    "KUBETUNE_TLS_KEY_FILE": "/tls/tls.key",
}
TLS_TOGETHER = (
    "KUBETUNE_PROGRESS_URL, KUBETUNE_CA_FILE, KUBETUNE_TLS_CERT_FILE and KUBETUNE_TLS_KEY_FILE go together: "
    "set all four, or none to run without a progress endpoint"
)

READ = {
    "a text": ({"KUBETUNE_HUB_ENDPOINT": "http://hub.local"}, "hub_endpoint", "http://hub.local"),
    "a whole number": ({"KUBETUNE_WORKERS": "4"}, "workers", 4),
    "a number of seconds": ({"KUBETUNE_DEBOUNCE_SECONDS": "0.25"}, "debounce_seconds", 0.25),
    "no wait at all": ({"KUBETUNE_RESTART_BACKOFF_SECONDS": "0"}, "restart_backoff_seconds", 0),
    "a list": ({"KUBETUNE_IMAGE_PULL_SECRETS": "one,two"}, "image_pull_secrets", ["one", "two"]),
    "an empty list": ({"KUBETUNE_IMAGE_PULL_SECRETS": ""}, "image_pull_secrets", []),
    "one namespace": ({"KUBETUNE_WATCH_NAMESPACE": "team"}, "watch_namespace", "team"),
    "all namespaces, as the chart says it": ({"KUBETUNE_WATCH_NAMESPACE": ""}, "watch_namespace", None),
    "an empty variable is the default": ({"KUBETUNE_LOG_LEVEL": ""}, "log_level", "INFO"),
    "a path": (TLS, "tls_key_file", Path("/tls/tls.key")),
    "the progress endpoint": (TLS, "progress_url", "https://kubetune-progress.kubetune.svc:8443"),
    "no progress endpoint": ({}, "progress_url", None),
}


@pytest.mark.parametrize("case", READ)
def test_a_variable_becomes_a_typed_setting(case):
    variables, field, value = READ[case]
    assert getattr(Settings.from_env(SMALLEST | variables), field) == value


def test_other_variables_are_left_alone():
    assert Settings.from_env(SMALLEST | {"PATH": "/bin", "KUBERNETES_SERVICE_HOST": "10.96.0.1"}).workers == 16


REFUSED = {
    "a name with a slip": (
        {"KUBETUNE_RESYNC_SECOND": "3"},
        ["KUBETUNE_RESYNC_SECOND: unknown field; did you mean KUBETUNE_RESYNC_SECONDS?"],
    ),
    "no time between two passes": (
        {"KUBETUNE_RESYNC_SECONDS": "0"},
        ["KUBETUNE_RESYNC_SECONDS: input should be greater than 0, but it is '0'"],
    ),
    "a word for a number": (
        {"KUBETUNE_WORKERS": "many"},
        ["KUBETUNE_WORKERS: input should be a valid integer, unable to parse string as an integer, but it is 'many'"],
    ),
    "a level that does not exist": (
        {"KUBETUNE_LOG_LEVEL": "LOUD"},
        ["KUBETUNE_LOG_LEVEL: input should be 'DEBUG', 'INFO', 'WARNING' or 'ERROR', but it is 'LOUD'"],
    ),
    "a port that does not exist": (
        {"KUBETUNE_METRICS_PORT": "70000"},
        ["KUBETUNE_METRICS_PORT: input should be less than or equal to 65535, but it is '70000'"],
    ),
    "progress without TLS": (
        TLS | {"KUBETUNE_PROGRESS_URL": "http://kubetune-progress"},
        ["KUBETUNE_PROGRESS_URL: string should match pattern '^https://[^/]+$', but it is 'http://kubetune-progress'"],
    ),
    "a certificate without its key": (TLS | {"KUBETUNE_TLS_KEY_FILE": ""}, [TLS_TOGETHER]),
    "an endpoint without files": ({"KUBETUNE_PROGRESS_URL": TLS["KUBETUNE_PROGRESS_URL"]}, [TLS_TOGETHER]),
    "files without an endpoint": (TLS | {"KUBETUNE_PROGRESS_URL": ""}, [TLS_TOGETHER]),
    "the image is missing": (
        {"KUBETUNE_TRAINER_IMAGE": ""},
        ["KUBETUNE_TRAINER_IMAGE: a value is required"],
    ),
    "two problems are told at once": (
        {"KUBETUNE_TRAINER_IMAGE": "", "KUBETUNE_WORKERS": "0"},
        [
            "KUBETUNE_TRAINER_IMAGE: a value is required",
            "KUBETUNE_WORKERS: input should be greater than or equal to 1, but it is '0'",
        ],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_variable_is_told_with_name_value_and_remedy(case):
    variables, problems = REFUSED[case]
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(SMALLEST | variables)
    assert list(caught.value.problems) == problems
    assert str(caught.value) == "; ".join(problems)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_means_and_has_a_variable(name):
    assert Settings.model_fields[name].description
    assert variable(name) == f"KUBETUNE_{name.upper()}"
