"""The most telling drills and a few faults of chaos; `make drills` and `make chaos` run all of them."""

import os
import uuid

import pytest
from cluster_tool import default_layout
from tests.chaos import page
from tests.chaos.catalogue import FAULTS
from tests.chaos.fault import draw
from tests.chaos.gate import GatedKube
from tests.chaos.ground import Ground, note_weights
from tests.chaos.run import undisturbed
from tests.drills import material, runner
from tests.drills.catalogue import DRILLS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
QUICK = [drill for drill in DRILLS if drill.quick]
HIT = draw(tuple(fault for fault in FAULTS if fault.quick), 2, seed=4, note=note_weights)
RUNS = [*undisturbed(HIT), *HIT]
OURS = os.geteuid() == 0 and not os.environ.get("KUBE_CONTEXT")


@pytest.fixture(scope="module")
def ground(kube, tmp_path_factory):
    """A site of the tests' own."""
    layout = default_layout()
    ground = Ground(GatedKube(layout), layout, f"drill-{uuid.uuid4().hex[:4]}")
    drills = [*QUICK, *(run.drill for run in RUNS)]
    ground.set_up(drills, material.write(tmp_path_factory.mktemp("drills")))
    yield ground
    ground.tear_down()


@pytest.fixture(scope="module")
def reports(ground):
    """The reports of the quick drills, by name: they run side by side."""
    return {report.drill.name: report for report in runner.run(ground, QUICK)}


@pytest.fixture(scope="module")
def outcomes(ground, reports):
    """What came of the runs with a fault, by name; they come after the drills, whose operator is left alone."""
    found = page.outcomes(RUNS, runner.run(ground, [run.drill for run in RUNS]), ground.digests)
    return {outcome.run.drill.name: outcome for outcome in found}


@pytest.mark.parametrize("name", [drill.name for drill in QUICK])
def test_a_drill_ends_as_it_must(reports, name):
    assert reports[name].problem == ""
    assert len(reports[name].rows) == len(reports[name].drill.acts)


@pytest.mark.skipif(not OURS, reason="faults of the node need root on the embedded cluster")
@pytest.mark.parametrize("name", [run.drill.name for run in RUNS])
def test_a_run_survives_its_fault_with_the_same_weights(outcomes, name):
    assert outcomes[name].problem == ""
