"""All kinds of faults, in the order of the table."""

import random

from tests.chaos import steps
from tests.chaos.fault import Draw, Fault, Hit, late, moments
from tests.drills.drill import API_SERVER, Object, Seen
from tests.drills.fetching import hub
from tests.drills.steps import delete, evict, holds, kill

ETCD = "etcd"
HUB: Object = {"training": {"maxSteps": 40}}
"""The hub's model is larger, and its runs are for the way there."""


def failed(reason: str, *words: str) -> Seen:
    """It is over for good."""
    return Seen("Failed", "Failed", reason, words, holds=True)


def process_killed(chance: random.Random, _: str) -> Hit:
    nodes = chance.choice((1, 2))
    index = chance.randrange(nodes)
    return Hit(f"worker {index}'s training process killed", (kill(index),), nodes=nodes, moment=late(chance))


def container_killed(chance: random.Random, _: str) -> Hit:
    nodes = chance.choice((1, 2))
    index = chance.randrange(nodes)
    done = f"all processes of worker {index} killed"
    return Hit(done, (steps.kill_all(index),), nodes=nodes, moment=late(chance))


def pod_deleted(chance: random.Random, _: str) -> Hit:
    options = chance.choice(((), ("--force", "--grace-period=0")))
    moment = chance.choice([("when the workers run", holds("Running")), late(chance)])
    done = " ".join(["`kubectl delete pod", *options]) + "`"
    return Hit(done, (delete("pod/{worker}", *options),), moment=moment)


def pod_evicted(chance: random.Random, _: str) -> Hit:
    moment = chance.choice([("when the workers run", holds("Running")), late(chance)])
    return Hit("evicted", (evict,), moment=moment)


def operator_killed(chance: random.Random, _: str) -> Hit:
    return Hit("the operator killed", (steps.kill_operator,), moment=moments(chance))


def component_killed(name: str) -> Draw:
    def draw(chance: random.Random, _: str) -> Hit:
        seconds = round(chance.uniform(0, 8), 1)
        done = f"`{name}` killed and away for {seconds} s"
        return Hit(done, (steps.kill_component(name, seconds),), moment=moments(chance))

    return draw


def packets_dropped(chance: random.Random, _: str) -> Hit:
    percent = chance.randint(1, 4)
    return Hit(f"{percent} % of worker 0's packets dropped", (steps.drop(percent),), nodes=2, moment=late(chance))


def network_slow(chance: random.Random, _: str) -> Hit:
    rate = chance.choice((4000, 8000, 16000))
    return Hit(f"worker 0 held to {rate} kbit/s", (steps.slow(rate),), nodes=2, moment=late(chance))


def network_silent(chance: random.Random, _: str) -> Hit:
    seconds = chance.randint(2, 15)
    return Hit(f"worker 0 cut off for {seconds} s", (steps.silence(seconds),), nodes=2, moment=late(chance))


def output_full(chance: random.Random, name: str) -> Hit:
    rest = chance.randrange(64 << 10)
    return Hit(
        f"the volume filled but for {rest} bytes",
        (steps.fill(name, rest),),
        spec={"storage": {"output": {"claimName": name}}},
        before=steps.own_volume(name, 64),
        moment=late(chance),
    )


def models_read_only(chance: random.Random, name: str) -> Hit:
    return Hit(
        "the volume remounted read-only",
        (steps.make_read_only(name),),
        spec=own_models(name),
        before=(*steps.own_volume(name, 64), steps.copy_models(name)),
        moment=chance.choice([("when the workers run", holds("Running")), late(chance)]),
    )


def staging_read_only(chance: random.Random, name: str) -> Hit:
    done, source = chance.choice([("a model that lies there", {}), ("a download", hub("good/tiny-llama"))])
    before = (*steps.own_volume(name, 64), steps.copy_models(name), steps.make_read_only(name))
    return Hit(f"{done}, on a volume that nobody can write", spec={**own_models(name), **source}, before=before)


def own_models(name: str) -> Object:
    """A spec with a models claim of the run's own."""
    return {"storage": {"models": {"claimName": name}}}


def out_of_memory(chance: random.Random, _: str) -> Hit:
    limit = f"{chance.randint(120, 220)}Mi"
    resources = {"requests": {"memory": None}, "limits": {"memory": limit}}
    spec = {"failurePolicy": {"maxRestarts": 0}, "workers": {"resources": resources}}
    return Hit(f"a limit of {limit}", spec=spec)


def checkpoint_damaged(how: str, done: str) -> Draw:
    def draw(chance: random.Random, _: str) -> Hit:
        nodes = chance.choice((1, 2))
        step = steps.damage_newest(how, chance.randrange(nodes), chance.randrange(1 << 30))
        return Hit(done, (step,), nodes=nodes, moment=late(chance))

    return draw


def weights_cut(chance: random.Random, name: str) -> Hit:
    share = chance.random()
    spec = {"model": {"volumePath": f"m/{name}"}}
    return Hit(f"the file cut off after {share:.1%}", spec=spec, before=(steps.cut_weights(share),))


def download_cut(chance: random.Random, name: str) -> Hit:
    share = chance.randrange(1000)
    spec = {**HUB, **hub(f"cut-{share}-{name}/tiny-llama")}
    return Hit(f"the connection closed after {share / 10} % of the weights", spec=spec, nodes=1)


FAULTS = (
    Fault("process", "a worker's training process is killed", process_killed, restarts=1),
    Fault("container", "a worker's whole container is killed", container_killed, restarts=1),
    Fault("deleted", "a worker's pod is deleted", pod_deleted, restarts=1),
    Fault("evicted", "a worker's pod is evicted", pod_evicted, disruptions=1),
    Fault("operator", "the operator is killed", operator_killed, quick=True),
    Fault("apiserver", "the API server is killed", component_killed(API_SERVER)),
    Fault("etcd", "etcd is killed", component_killed(ETCD)),
    Fault("drop", "the network loses packets", packets_dropped),
    Fault("slow", "the network is slow", network_slow),
    Fault("silence", "the network is silent for seconds", network_silent),
    Fault("full", "the output volume is full", output_full, failed("StorageFull", "No space left")),
    Fault("readonly", "the model volume becomes read-only while the job runs", models_read_only),
    Fault(
        "nowrite",
        "the model volume is read-only from the start",
        staging_read_only,
        failed("OutputNotWritable", "make the models claim writable"),
        trains=False,
    ),
    Fault("oom", "a memory limit below the need", out_of_memory, failed("OOMKilled", "OOMKilled; memory limit")),
    Fault(
        "ckptcut",
        "the newest checkpoint is cut off between death and resumption",
        checkpoint_damaged("cut", "killed, a file of the newest checkpoint cut off"),
        restarts=1,
        quick=True,
    ),
    Fault(
        "ckptflip",
        "a bit of the newest checkpoint changes between death and resumption",
        checkpoint_damaged("flip", "killed, a bit of the newest checkpoint changed"),
        restarts=1,
    ),
    Fault("cutmodel", "the model's weights are cut off", weights_cut, failed("InvalidModel"), trains=False),
    Fault("cutload", "the download of the model breaks off", download_cut, weights="hub"),
)
CALM = (("tiny", 1, {}), ("tiny", 2, {}), ("hub", 1, {**HUB, **hub("good/tiny-llama")}))
"""Model, workers, and spec of the undisturbed runs."""
