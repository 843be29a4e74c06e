"""Runs drills side by side and notes what was seen. Those that need something to be away share one outage of it."""

import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cluster_tool import ClusterError
from tests.drills.drill import API_SERVER, OPERATOR, Act, Drill, Gone, Object, Refused, condition_of
from tests.drills.scene import Scene
from tests.drills.site import Site

TRAINING = 4
"""Drills at a time whose workers train: each starts a process with torch on the two cores."""
ENDED = ("Succeeded", "Failed")
WAITING = 8
"""Drills at a time whose workers never come up."""


@dataclass(frozen=True)
class Row:
    """What was seen of one act."""

    drill: Drill
    act: Act
    state: str
    reason: str
    message: str
    seconds: float


@dataclass
class Report:
    """What came of one drill."""

    drill: Drill
    rows: list[Row] = field(default_factory=list)
    problem: str = ""
    """Empty if everything was as it must be."""


Done = Callable[[Report], object]
"""Is told of each drill that is over."""


def run(site: Site, drills: Iterable[Drill], done: Done = lambda _: None) -> list[Report]:
    """Run the drills; the reports are in their order. What stands still goes beside what trains; then outages."""
    drills = list(drills)
    reports = {drill.name: Report(drill) for drill in drills}
    plain = [drill for drill in drills if drill.outage is None]
    with ThreadPoolExecutor(TRAINING) as slow, ThreadPoolExecutor(WAITING) as quick:
        for drill in plain:
            (slow if drill.trains else quick).submit(_carry_out, site, reports[drill.name], done)
    for away in (API_SERVER, OPERATOR):
        during = [reports[drill.name] for drill in drills if drill.outage is not None and drill.outage.of == away]
        if during:
            _with_outage(site, away, during, done)
    return list(reports.values())


def _carry_out(site: Site, report: Report, done: Done) -> None:
    scene = Scene(site, report.drill)
    _guard(report, scene, lambda: _do(report.drill.before, scene))
    _acts(report, scene, None)
    done(report)


def _acts(report: Report, scene: Scene, since: float | None) -> None:
    """Perform all acts and look at what is left; the first act counts from `since` if something else began it."""
    _guard(report, scene, lambda: _perform_all(report, scene, since))
    _clean(report, scene)
    last = report.rows[-1] if report.rows else None
    told = f"{last.state} {last.reason} after {last.seconds:.1f} s" if last else "nothing seen"
    outcome = f"FAILED: {report.problem}" if report.problem else told
    print(f"{report.drill.name:<20} {outcome}", file=sys.stderr, flush=True)


def _perform_all(report: Report, scene: Scene, since: float | None) -> None:
    for number, act in enumerate(report.drill.acts):
        report.rows.append(_perform(scene, act, since if number == 0 else None))
    _do(report.drill.after, scene)


def _with_outage(site: Site, away: str, reports: Sequence[Report], done: Done) -> None:
    scenes = [Scene(site, report.drill) for report in reports]
    pairs = list(zip(reports, scenes, strict=True))

    def together(part: Callable[[Report, Scene], object], chosen: Sequence[tuple[Report, Scene]] = pairs) -> None:
        with ThreadPoolExecutor(len(pairs)) as pool:
            list(pool.map(lambda pair: part(*pair), chosen))

    def lead(report: Report, scene: Scene) -> None:
        assert report.drill.outage is not None
        steps = (*report.drill.before, *report.drill.outage.lead)
        _guard(report, scene, lambda: _do(steps, scene))

    def meanwhile(report: Report, scene: Scene) -> None:
        assert report.drill.outage is not None
        _guard(report, scene, lambda: _not_ended(scene))
        steps = report.drill.outage.meanwhile
        _guard(report, scene, lambda: _do(steps, scene))

    for brief in (False, True):
        together(lead, [pair for pair in pairs if pair[0].drill.outage and pair[0].drill.outage.brief is brief])
    site.take_away(away)
    together(meanwhile)
    began = site.bring_back(away)
    together(lambda report, scene: _acts(report, scene, began))
    for report in reports:
        done(report)


def _not_ended(scene: Scene) -> None:
    assert scene.status().get("state") not in ENDED, f"it ended before the outage: {scene.told()}"


def _perform(scene: Scene, act: Act, since: float | None) -> Row:
    """Do what the act says and watch until it is seen."""
    began = since
    for step in act.steps if since is None else ():
        began = scene.site.now()
        step(scene)
    assert began is not None, f"{act.done}: nothing is done"
    match act.seen:
        case Refused(words):
            _refused(scene, words)
            return Row(scene.drill, act, "", "", scene.refusal, scene.site.now() - began)
        case Gone():
            return Row(scene.drill, act, "gone", "", "", _until_gone(scene, act, began) - began)
    sight = scene.site.jobs_of_users.seen(scene.key, act.seen.fits, began, act.seconds, act.seen.anew)
    assert sight is not None, f"{act.done}: not seen within {act.seconds:.0f} s; {scene.refusal}{scene.told()}"
    assert sight.object is not None
    status: Object = sight.object["status"]
    found = condition_of(status, act.seen.condition)
    return Row(scene.drill, act, status["state"], found["reason"], found["message"], sight.at - began)


def _refused(scene: Scene, words: Iterable[str]) -> None:
    assert scene.refusal, "the API server took it"
    missing = [word for word in words if word not in scene.refusal]
    assert not missing, f"{missing} not in: {scene.refusal}"


def _until_gone(scene: Scene, act: Act, began: float) -> float:
    """When the last of the job and its children went; at the beginning if that was while no operator was there."""
    deadline = began + act.seconds
    nothing = lambda found: None if scene.owned(found.values()) else True  # noqa: E731
    watches = (scene.site.jobs_of_users, scene.site.child_jobs, scene.site.pods)
    if scene.drill.outage and not scene.children() and all(watch.ask(nothing) for watch in watches):
        return began
    for watch in watches:
        watch.until(nothing, max(1.0, deadline - scene.site.now()), f"{scene.name} is gone")
    at = scene.site.now()
    rest = [child for child in scene.children() if child.startswith(("service/", "configmap/"))]
    for child in rest:
        scene.kubectl("wait", "--for=delete", child, f"--timeout={max(1.0, deadline - scene.site.now()):.0f}s")
        at = scene.site.now()
    return at


def _do(steps: Iterable[Callable[[Scene], None]], scene: Scene) -> None:
    for step in steps:
        step(scene)


def _guard(report: Report, scene: Scene, part: Callable[[], object]) -> None:
    """Do a part unless an earlier one failed; a failure is kept, with what the operator says."""
    if report.problem:
        return
    try:
        part()
    except (AssertionError, ClusterError) as error:
        report.problem = str(error) or "".join(traceback.format_tb(error.__traceback__)[-1:])
    except Exception:  # noqa: BLE001 - a drill with a fault of its own must not end the others
        report.problem = f"{traceback.format_exc()}{scene.told()}"


def _clean(report: Report, scene: Scene) -> None:
    """Remove the job and what the drill made, so that the next has room."""
    for undo in (scene.delete, *reversed(scene.undo)):
        try:
            undo()
        except ClusterError as error:
            report.problem = report.problem or f"cleaning up: {error}"
