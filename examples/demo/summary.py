"""What the demo prints at its end, and the hints on how to look around."""

import json
from pathlib import Path
from typing import Any

from kube import Kube, Object
from volumes_pod import POD

WIDTH = 72


def result_paths(job: Object) -> list[str]:
    """The files and folders of a finished job to copy; relative to the root of the output volume."""
    result = job["status"]["result"]
    return [result[key] for key in ("adapterPath", "samplesPath", "lossPicturePath") if key in result]


def of_success(kube: Kube, job: Object, folder: Path) -> str:
    """Answers and losses before and after, and where everything lies. `folder` holds the copied results."""
    result = job["status"]["result"]
    before, after = result["initialValidationLoss"], result["finalValidationLoss"]
    samples = json.loads((folder / result["samplesPath"]).read_text())
    lines = ["", "-" * WIDTH, "Three questions that were not in the training data", ""]
    lines += [line for sample in samples for line in told_sample(sample)]
    lines += [
        f"Held-out loss   {before:.3f} before, {after:.3f} after ({1 - after / before:.0%} lower)",
        f"Adapter         {folder / result['adapterPath']}",
        f"Loss picture    {folder / result['lossPicturePath']}",
        "-" * WIDTH,
        look_around(kube, job),
    ]
    return "\n".join(lines)


def told_sample(sample: dict[str, Any]) -> list[str]:
    """A held-out question with its answers, and whether the last one is what the data say."""
    right = sample["after"].strip() == sample["reference"].strip()
    verdict = "right, word for word" if right else f"wrong; the CRD says: {sample['reference']}"
    # A run that was resumed before its first answers has none.
    before = " ".join((sample["before"] or "not asked").split())
    return [sample["prompt"], f"  before: {before}", f"  after:  {sample['after'].strip()}", f"  {verdict}", ""]


def of_failure(kube: Kube, job: Object) -> str:
    """The sentence of the condition that says why the job failed, and where to look."""
    failed = next((one for one in job["status"].get("conditions", []) if one["type"] == "Failed"), None)
    why = f"{failed['message']} ({failed['reason']})" if failed else "no condition says why"
    return f"\nThe demo failed: {why}\n\n{look_around(kube, job)}"


def of_interruption(kube: Kube, job: Object) -> str:
    """What goes on without us, and how to see it."""
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    return (
        f"\nInterrupted. A FineTuneJob that was applied goes on; follow it with\n"
        f"  kubectl --kubeconfig {kube.config} get ftj {name} -n {namespace} -w\n"
        "or run `make demo` again: it goes on from here."
    )


def look_around(kube: Kube, job: Object) -> str:
    """Commands to see more, and to remove everything."""
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    remove = ["make demo-clean        # the demo and the operator"]
    remove += [] if kube.external else ["make cluster-down      # the whole cluster; images and binaries stay cached"]
    return "\n".join(
        [
            "Look around",
            f"  export KUBECONFIG={kube.config}",
            f"  kubectl get ftj -n {namespace}",
            f"  kubectl describe ftj {name} -n {namespace}",
            f"  kubectl exec -n {namespace} {POD} -- ls -R /output",
            "Remove everything",
            *(f"  {command}" for command in remove),
        ]
    )
