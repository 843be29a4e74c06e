"""Reports of real tokens over real TLS."""

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from kubetune_contract.paths import TOKEN_AUDIENCE
from kubetune_contract.progress import CheckpointStatus, Progress, ProgressReport

pytestmark = pytest.mark.integration
Object = dict[str, Any]


@pytest.mark.parametrize("auth", ["TokenReview", "KeySet"])
def test_a_worker_reports_on_its_own_attempt_and_on_nothing_else(drill, tls, post, auth):
    """Tokens are bound to pods by the API server, as the kubelet would ask for them."""
    drill = drill(**tls, progress_auth=auth)
    pods = drill.running("mine")
    drill.submit("other")
    checkpoint = CheckpointStatus(step=10, path="checkpoints/step-10", time=dt.datetime(2030, 1, 1, tzinfo=dt.UTC))
    progress = Progress(step=12, total_steps=50, epoch=0.2, percentage=24, loss=1.25, estimated_remaining_seconds=70)
    report = ProgressReport(progress=progress, checkpoint=checkpoint)

    def token(audience: str) -> str:
        bound = ["--bound-object-kind=Pod", f"--bound-object-name={pods[0]['metadata']['name']}"]
        return drill.kubectl("create", "token", "default", f"--audience={audience}", *bound).strip()

    good, path = token(TOKEN_AUDIENCE), f"/v1/progress/{drill.namespace}"
    assert post(tls, f"{path}/mine/1", good, report) == 204
    assert post(tls, f"{path}/mine/2", good, report) == 403
    assert post(tls, f"{path}/other/1", good, report) == 403
    assert post(tls, "/v1/progress/default/mine/1", good, report) == 403
    assert post(tls, f"{path}/mine/1", "guess", report) == 401
    assert post(tls, f"{path}/mine/1", token("https://kubernetes.default.svc"), report) == 401
    unbound = drill.kubectl("create", "token", "default", f"--audience={TOKEN_AUDIENCE}").strip()
    assert post(tls, f"{path}/mine/1", unbound, report) == 401
    status = drill.until("mine", lambda status: status.get("progress", {}).get("step") == 12)
    assert status["display"] == {"progress": "24%", "loss": "1.25", "eta": "1m10s"}
    assert status["checkpoint"]["path"] == "checkpoints/step-10"
    shown = drill.kubectl("get", "finetunejob", "mine", "--no-headers").split()
    assert shown[:5] == ["mine", "Running", "24%", "1.25", "1m10s"]
    labels = f'{{name="mine",namespace="{drill.namespace}"}}'
    assert drill.operator.metric(f"kubetune_training_loss{labels}") == 1.25
    config = json.loads(drill.kubectl("get", "configmap", "mine-kubetune", "-o", "json"))
    print(config["metadata"].get("managedFields"), config)
    assert config["data"]["ca.crt"] == Path(tls["ca_file"]).read_text()


def test_steps_that_no_checkpoint_holds_are_taken_back_with_the_gang(drill, tls, post):
    drill = drill(**tls)
    pods = drill.running()
    bound = ["--bound-object-kind=Pod", f"--bound-object-name={pods[0]['metadata']['name']}"]
    token = drill.kubectl("create", "token", "default", f"--audience={TOKEN_AUDIENCE}", *bound).strip()
    checkpoint = CheckpointStatus(step=10, path="checkpoints/step-10", time=dt.datetime(2030, 1, 1, tzinfo=dt.UTC))
    progress = Progress(step=17, total_steps=50, epoch=0.3, percentage=34)
    path = f"/v1/progress/{drill.namespace}/job/1"
    assert post(tls, path, token, ProgressReport(progress=progress, checkpoint=checkpoint)) == 204
    drill.until("job", lambda status: status.get("progress", {}).get("step") == 17)
    drill.ends(pods[1], 1)
    status = drill.until("job", lambda status: status["restarts"] == 1)
    assert status["progress"]["step"] == 10
    assert "starts from the checkpoint of step 10" in drill.condition(status, "Started")["message"]
