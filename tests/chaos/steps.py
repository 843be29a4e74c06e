"""What is done to a run or to the node beneath it."""

import random

from tests.chaos import host
from tests.chaos.ground import checkpoints, ground_of
from tests.drills.drill import Step
from tests.drills.obstacles import claim, volume
from tests.drills.scene import Scene
from tests.drills.steps import kill, workers_end


def uid_of(scene: Scene, index: int) -> str:
    """The uid of a worker's pod."""
    name = scene.worker(index)
    return next(str(pod["metadata"]["uid"]) for pod in scene.pods() if pod["metadata"]["name"] == name)


def kill_all(index: int) -> Step:
    """Kill every process of a worker's container at once, the launcher too."""
    return lambda scene: host.kill_container(ground_of(scene).layout, uid_of(scene, index))


def kill_operator(scene: Scene) -> None:
    """Kill the operator, and wait until the next one is ready."""
    ground_of(scene).strike_operator()


def kill_component(name: str, seconds: float) -> Step:
    """Kill a component of the cluster; it is away for so long."""
    return lambda scene: ground_of(scene).strike_component(name, seconds)


# ---------------------------------------------------------------- network


def in_network(scene: Scene, *argv: str) -> None:
    """Run a program in the network of worker 0."""
    host.in_network(ground_of(scene).layout, uid_of(scene, 0), *argv)


def drop(percent: int) -> Step:
    """Drop so many of the packets that reach or leave worker 0, as long as its pod lives."""
    chance = ("-m", "statistic", "--mode", "random", "--probability", str(percent / 100), "-j", "DROP")

    def step(scene: Scene) -> None:
        in_network(scene, "iptables", "-A", "INPUT", "-i", "eth0", *chance)
        in_network(scene, "iptables", "-A", "OUTPUT", "-o", "eth0", *chance)

    return step


def slow(rate: int) -> Step:
    """Let no more than so many kbit/s leave worker 0, as long as its pod lives."""
    limit = ("rate", f"{rate}kbit", "burst", "16kbit", "latency", "100ms")
    return lambda scene: in_network(scene, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)


def silence(seconds: int) -> Step:
    """Let nothing reach or leave worker 0 for so long; then all goes on."""

    def step(scene: Scene) -> None:
        shut = "iptables -A INPUT -i eth0 -j DROP; iptables -A OUTPUT -o eth0 -j DROP"
        in_network(scene, "sh", "-c", f"{shut}; sleep {seconds}; iptables -F INPUT; iptables -F OUTPUT")

    return step


# ---------------------------------------------------------------- volumes


def own_volume(name: str, megabytes: int) -> tuple[Step, ...]:
    """A volume and a claim of the run's own, whose file system can be filled or made read-only."""

    def mount(scene: Scene) -> None:
        # One that a run which was cut short has left belongs to a claim that is gone: no other gets it.
        scene.kube.kubectl("delete", "persistentvolume", name, "--ignore-not-found")
        host.mount_own(name, megabytes)
        scene.undo.append(lambda: host.unmount_own(name))

    return (mount, volume(name, str(host.own_folder(name))), claim(name, name))


def fill(name: str, rest: int) -> Step:
    """Fill the run's own volume but for so many bytes."""
    return lambda _: host.fill(host.own_folder(name), rest)


def copy_models(name: str) -> Step:
    """Put the small model and the data onto the run's own volume."""

    def step(scene: Scene) -> None:
        source = ground_of(scene).volume("models")
        host.run(["cp", "-r", source / "tiny", source / "data", host.own_folder(name)])
        host.run(["chmod", "-R", "a+rwX", host.own_folder(name)])  # staging writes beside the model

    return step


def make_read_only(name: str) -> Step:
    """Make the run's own volume read-only."""
    return lambda _: host.run(["mount", "-o", "remount,ro", host.own_folder(name)]) and None


def cut_weights(share: float) -> Step:
    """Cut the weights of the run's own copy of the model off."""
    file = "/models/m/{name}/model.safetensors"
    script = f"f={file}; truncate -s $(( $(stat -c %s $f) * {round(share * 1e6)} / 1000000 )) $f"
    return lambda scene: ground_of(scene).files.shell(script.replace("{name}", scene.name)) and None


# ---------------------------------------------------------------- checkpoints


def damage_newest(how: str, index: int, seed: int) -> Step:
    """Kill a worker, and damage a file of the newest checkpoint before the next attempt reads it."""
    harm = {"cut": host.cut, "flip": host.flip}[how]

    def step(scene: Scene) -> None:
        kill(index)(scene)
        workers_end("Failed")(scene)
        chance = random.Random(seed)
        files = sorted(path for path in checkpoints(scene)[-1].iterdir() if path.stat().st_size)
        harm(chance.choice(files), chance)

    return step
