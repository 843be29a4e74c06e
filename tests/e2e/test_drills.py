"""The most telling drills; `make drills` runs all of them and writes docs/drills.md."""

import uuid

import pytest
from cluster_tool import default_layout
from tests.drills import material, runner
from tests.drills.catalogue import DRILLS
from tests.drills.site import Site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
QUICK = [drill for drill in DRILLS if drill.quick]


@pytest.fixture(scope="module")
def reports(kube, tmp_path_factory):
    """The reports of the quick drills, by name: they run side by side, on a site of their own."""
    site = Site(kube, default_layout(), f"drill-{uuid.uuid4().hex[:4]}")
    site.set_up(QUICK, material.write(tmp_path_factory.mktemp("drills")))
    yield {report.drill.name: report for report in runner.run(site, QUICK)}
    site.tear_down()


@pytest.mark.parametrize("name", [drill.name for drill in QUICK])
def test_a_drill_ends_as_it_must(reports, name):
    assert reports[name].problem == ""
    assert len(reports[name].rows) == len(reports[name].drill.acts)
