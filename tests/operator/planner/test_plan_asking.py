"""What cannot be created for now is asked for again after as long as it has lasted, within bounds."""

import pytest

from kubetune_operator.obstacles import refusal

TAKEN = 'Service "bot" exists in namespace team and does not belong to this FineTuneJob: delete it'
QUOTA = refusal("jobs.batch is forbidden: exceeded quota: few")
WAYS = {
    "a staging Job's name that is taken": lambda world: blocked(world, conflict=TAKEN),
    "a staging Job that is refused": lambda world: blocked(world, refused=QUOTA),
    "a name that is taken before the workers": lambda world: blocked(world.staged(), conflict=TAKEN),
    "a worker Job that is refused": lambda world: blocked(world.staged(), refused=QUOTA),
    "a name that is taken while workers start": lambda world: blocked(coming_up(world), conflict=TAKEN),
    "a name that is taken while workers run": lambda world: blocked(world.running(), conflict=TAKEN),
}
WAITS = [(0, 10), (9, 10), (10, 10), (20, 20), (41, 41), (299, 299), (300, 300), (86400, 300)]


def blocked(world, **what):
    """The world after the obstacle was told for the first time."""
    for name, value in what.items():
        setattr(world, name, value)
    return world.next()


def coming_up(world):
    """One worker has a node and does not run yet, which alone would have the world looked at every 10 seconds."""
    world.staged().attempt(1).worker(0, "Pending").worker(1, ready=True)
    world.pods[0]["status"]["conditions"].append(world.make.condition("PodScheduled"))
    return world


@pytest.mark.parametrize(("lasted", "wait"), WAITS)
@pytest.mark.parametrize("way", WAYS)
def test_the_api_server_is_asked_ever_more_seldom_about(world, way, lasted, wait):
    world.settings = world.settings.model_copy(update={"progress_url": None})  # no look for the first report
    assert WAYS[way](world).later(lasted).plan().requeue_after == wait


@pytest.mark.parametrize(
    ("least", "most", "lasted", "wait"),
    [(2, 300, 0, 2), (2, 300, 7, 7), (2, 5, 7, 5), (0, 300, 0, 0.05), (60, 30, 0, 30)],
)
def test_the_bounds_are_those_of_a_restart(world, least, most, lasted, wait):
    bounds = {"restart_backoff_seconds": least, "restart_backoff_max_seconds": most}
    world.settings = world.settings.model_copy(update=bounds)
    assert WAYS["a worker Job that is refused"](world).later(lasted).plan().requeue_after == wait


def test_asking_for_an_hour_takes_few_questions(world):
    blocked(world.staged(), refused=QUOTA)
    waits = []
    while sum(waits) < 3600:
        waits.append(world.plan().requeue_after)
        world.later(waits[-1]).next()
    assert waits[:6] == [10, 10, 20, 40, 80, 160]
    assert set(waits[6:]) == {300}


def test_a_long_download_does_not_count_as_time_in_which_the_workers_were_refused(world):
    """Both waits stand in one field of the status."""
    world.with_status(waitingSince="2030-01-01T11:00:00Z")
    world.staged().refused = QUOTA
    assert world.plan().requeue_after == 10


def test_a_refusal_is_written_down_once(world):
    """Asking again in vain changes nothing in the status."""
    before = blocked(world.staged(), refused=QUOTA).status
    assert world.later(40).next().status == before
