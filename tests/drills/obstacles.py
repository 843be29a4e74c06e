"""Drills: what keeps a pod from starting. The condition says who keeps it, in whose words, and what would help."""

from tests.drills.drill import Act, Drill, Object, Seen, Step
from tests.drills.losses import seat
from tests.drills.scene import Scene
from tests.drills.site import RESOURCE
from tests.drills.steps import counted, make, nothing_held, offer

TOPIC = "What keeps a pod from starting"
HUB: Object = {"volumePath": None}


def waits(name: str, case: str, done: str, seen: Seen, *more: Act, **other: object) -> Drill:
    """A drill in which the job stands still and says why."""
    fields: dict[str, object] = {"topic": TOPIC, "trains": False, **other}
    return Drill(name, case, (Act(done, seen), *more), **fields)  # type: ignore[arg-type]


def of_staging(reason: str, *words: str) -> Seen:
    """The staging pod does not start."""
    return Seen("Staging", "Staged", reason, words, holds=False)


def of_workers(reason: str, *words: str) -> Seen:
    """The workers do not start."""
    return Seen("Starting", "Started", reason, words, holds=False)


def object_of(kind: str, name: str, **spec: object) -> Step:
    """Make an object with that spec in the drill's namespace."""
    return make(lambda _: {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, "spec": spec})


def secret(scene: Scene) -> Object:
    """A Secret without the key that the job names."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{scene.name}-token"},
        "stringData": {"other": "x"},
    }


def claim(name: str, volume: str) -> Step:
    """A claim that is bound to a volume of the drill's own."""
    return object_of(
        "PersistentVolumeClaim",
        name,
        storageClassName="",
        volumeName=volume,
        accessModes=["ReadWriteOnce"],
        resources={"requests": {"storage": "1Mi"}},
    )


def volume(name: str, path: str) -> Step:
    """A volume that is a folder of the node."""
    spec = {
        "capacity": {"storage": "1Mi"},
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "",
        "hostPath": {"path": path, "type": "Directory"},
    }
    return make(lambda _: {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec})


def gated(name: str) -> Object:
    """A model that takes a token to download."""
    secret_name = {"name": f"{name}-token", "key": "token"}
    return {"model": {**HUB, "huggingFace": {"repo": f"good-{name}/tiny-llama", "tokenSecretRef": secret_name}}}


def requests(**amounts: object) -> Object:
    """A spec whose workers request that."""
    return {"workers": {"resources": {"requests": amounts}}}


METERED = {f"{RESOURCE}/metered": 2}

DRILLS = (
    waits(
        "missing-image",
        "the trainer's image does not exist",
        "the operator installed with a tag that was never built",
        of_staging("ImagePull", "cannot pull image", "never-built", "not found"),
        operator="missing-image",
        after=(),
    ),
    waits(
        "denied-image",
        "the registry wants a login",
        "`trainerImage.pullSecrets` names a Secret that is not there",
        of_staging("ImagePull", "cannot pull image", "private/trainer"),
        operator="denied-image",
    ),
    waits(
        "no-claim",
        "the models claim does not exist",
        "`storage.models.claimName: nowhere`",
        Seen("Failed", "Failed", "VolumeMissing", ('"nowhere"', "spec.storage.models.claimName", "create it")),
        spec={"storage": {"models": {"claimName": "nowhere"}}},
        after=(nothing_held,),
        quick=True,
    ),
    waits(
        "no-output-claim",
        "the output claim does not exist",
        "`storage.output.claimName: nowhere`",
        Seen("Failed", "Failed", "VolumeMissing", ('"nowhere"', "spec.storage.output.claimName", "create it")),
        spec={"storage": {"output": {"claimName": "nowhere"}}},
        after=(nothing_held,),
    ),
    waits(
        "unbound-claim",
        "nobody gives the claim a volume",
        "a claim of a storage class that does not exist",
        of_staging("VolumeNotBound", '"unbound-claim"', '"none-such" not found', "StorageClass"),
        before=(
            object_of(
                "PersistentVolumeClaim",
                "unbound-claim",
                storageClassName="none-such",
                accessModes=["ReadWriteOnce"],
                resources={"requests": {"storage": "1Mi"}},
            ),
        ),
        spec={"storage": {"models": {"claimName": "unbound-claim"}}},
    ),
    waits(
        "no-secret",
        "the Secret with the hub's token does not exist",
        "`model.huggingFace.tokenSecretRef` names none",
        of_staging("SecretMissing", '"no-secret-token"'),
        spec=gated("no-secret"),
    ),
    waits(
        "no-key",
        "the Secret has not the key",
        "`tokenSecretRef.key: token`, but the Secret has `other`",
        of_staging("SecretMissing", "no-key-token", "token"),
        before=(make(secret),),
        spec=gated("no-key"),
    ),
    waits(
        "quota-staging",
        "the namespace's quota lets no pod be created",
        "a ResourceQuota of 0 pods",
        of_staging("QuotaExceeded", "exceeded quota"),
        place="no-quota",
        quick=True,
    ),
    waits(
        "quota-workers",
        "the quota is too small for the workers",
        "a ResourceQuota of one unit where the worker needs two; then it is raised",
        of_workers("QuotaExceeded", "exceeded quota", "metered"),
        before=(object_of("ResourceQuota", "metered", hard={f"requests.{RESOURCE}/metered": "1"}),),
        spec={"workers": {"resources": {"requests": METERED, "limits": METERED}}},
    ),
    waits(
        "limits",
        "admission refuses the pod",
        "a LimitRange of 64Mi for a container",
        of_staging("AdmissionDenied", "memory limit of 64Mi"),
        place="small-limits",
    ),
    waits(
        "cpu",
        "no node has so many cores",
        "`workers.resources.requests.cpu: 1000`",
        of_workers("Unschedulable", "Insufficient cpu"),
        spec=requests(cpu="1000"),
        quick=True,
    ),
    waits(
        "gpu",
        "no node has a GPU",
        "`workers.gpusPerNode: 1` on a node without one",
        of_workers("Unschedulable", "Insufficient nvidia.com/gpu"),
        spec={"workers": {"gpusPerNode": 1}},
    ),
    waits(
        "node-selector",
        "no node has the label",
        "`workers.nodeSelector: {zone: nowhere}`",
        of_staging("Unschedulable", "node affinity/selector", "workers.nodeSelector"),
        spec={"workers": {"nodeSelector": {"zone": "nowhere"}}},
    ),
    waits(
        "no-priority-class",
        "the priority class does not exist",
        "`workers.priorityClassName: none-such`",
        of_workers("AdmissionDenied", "none-such", "Create the PriorityClass"),
        spec={"workers": {"priorityClassName": "none-such"}},
    ),
    waits(
        "pod-security",
        "Pod Security refuses the pod",
        "`workers.hostNetwork: true` in a namespace of the level `restricted`",
        of_workers("AdmissionDenied", "violates PodSecurity", "hostNetwork=true"),
        spec={"workers": {"hostNetwork": True}},
    ),
    waits(
        "queue",
        "nobody admits the workers from their queue",
        "`queue.name: team` on a cluster without Kueue",
        of_workers("WaitingForQuota", 'queue "team"', "Kueue has not admitted it yet", "describe localqueue team"),
        spec={"queue": {"name": "team"}},
    ),
    waits(
        "no-env-secret",
        "a Secret that an environment variable needs does not exist",
        "`workers.env` names it",
        of_workers("SecretMissing", "wandb-key"),
        spec={
            "workers": {
                "env": [{"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb-key", "key": "key"}}}]
            }
        },
    ),
    waits(
        "no-config-map",
        "a ConfigMap that a volume needs does not exist",
        "`workers.volumes` names it",
        of_workers("ConfigMapMissing", "none-such", "Create ConfigMap"),
        spec={
            "workers": {
                "volumes": [{"name": "extra", "configMap": {"name": "none-such"}}],
                "volumeMounts": [{"name": "extra", "mountPath": "/extra"}],
            }
        },
    ),
    waits(
        "late-node",
        "a node that fits comes later",
        "a resource that no node has",
        of_workers("Unschedulable", f"Insufficient {RESOURCE}/late-node-seat"),
        Act("the node has it now", Seen("Succeeded", "Succeeded", "Done"), (offer("seat", 1),), seconds=240),
        spec=seat("late-node"),
        trains=True,
    ),
    waits(
        "read-only-output",
        "the output volume is not writable",
        "a volume on a folder that belongs to root",
        Seen("Failed", "Failed", "OutputNotWritable", ("/kubetune/output",)),
        before=(volume("drill-read-only", "/sys"), claim("read-only", "drill-read-only")),
        spec={"storage": {"output": {"claimName": "read-only"}}},
        after=(nothing_held, counted(restarts=0)),
        trains=True,
    ),
)
