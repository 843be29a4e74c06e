import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_MANIFEST = [ROOT / "README.md", ROOT / "docs" / "quick-start.md"]


@pytest.mark.parametrize("page", WITH_MANIFEST, ids=lambda page: page.name)
def test_a_page_shows_the_manifest_that_the_demo_applies(page):
    shown = re.search(
        r"<!-- manifest: begin -->\n```yaml\n(.*?)```\n<!-- manifest: end -->", page.read_text(), re.DOTALL
    )
    assert shown is not None
    assert shown[1] == (ROOT / "examples" / "demo.yaml").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^a-z0-9 -]", "", one.lower()).replace(" ", "-") for one in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_that_is_named_is_there(page):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"(?:^|`|\()make ((?:[a-z0-9-]+ ?)+)", page.read_text(), re.MULTILINE)
    assert {word for command in commands for word in command.split()} <= targets
