"""An image's tag says what is in it, and its Dockerfile keeps torch below the code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import images
import pytest
from layout import REPOSITORY, Layout

KINDS = tuple(images.CODE)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository with what goes into the images."""
    folder = tmp_path / "repository"
    for package in {package for packages in images.CODE.values() for package in packages}:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text('"""A package."""\n')
    shutil.copytree(REPOSITORY / "images", folder / "images")
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder


def tags(layout: Layout, repository: Path) -> dict[str, str]:
    source = images.take_source(layout, repository)
    return {kind: source.tag(kind) for kind in KINDS}


def changed(layout: Layout, repository: Path, name: str, old: str, new: str) -> set[str]:
    """Return the images whose tag changes when `old` becomes `new` in a file; a new file starts empty."""
    before = tags(layout, repository)
    path = repository / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else old
    assert old in text
    path.write_text(text.replace(old, new, 1))
    after = tags(layout, repository)
    return {kind for kind in KINDS if before[kind] != after[kind]}


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        pytest.param("trainer/kubetune_contract/__init__.py", "A", "B", set(KINDS), id="the contract is in both"),
        pytest.param("trainer/kubetune_trainer/__init__.py", "A", "B", {"trainer"}, id="the trainer's code"),
        pytest.param("operator/kubetune_operator/__init__.py", "A", "B", {"operator"}, id="the operator's code"),
        pytest.param("trainer/kubetune_contract/presets/a.yaml", "", "a: 1", set(KINDS), id="a new data file"),
        pytest.param("trainer/kubetune_trainer/__pycache__/a.pyc", "", "x", set(), id="bytecode"),
        pytest.param(
            "images/trainer.Dockerfile", "FROM", "FROM --platform=linux/amd64", {"trainer"}, id="a Dockerfile"
        ),
        pytest.param("pyproject.toml", '"torch==', '"torch!=', {"trainer"}, id="a dependency of the trainer"),
        pytest.param("pyproject.toml", '"kopf==', '"kopf!=', {"operator"}, id="a dependency of the operator"),
        pytest.param("pyproject.toml", '"pydantic>=', '"pydantic>', set(KINDS), id="a dependency of both"),
        pytest.param("pyproject.toml", "line-length = ", "line-length = 1", set(), id="another setting"),
        pytest.param("pyproject.toml", '"pytest>=', '"pytest>', set(), id="a development dependency"),
    ],
)
def test_a_tag_changes_with_what_goes_in(
    layout: Layout, repository: Path, name: str, old: str, new: str, expected: set[str]
) -> None:
    assert changed(layout, repository, name, old, new) == expected


def test_a_moved_file_changes_the_tag(layout: Layout, repository: Path) -> None:
    before = tags(layout, repository)
    package = repository / "trainer/kubetune_trainer"
    (package / "__init__.py").rename(package / "renamed.py")
    assert tags(layout, repository)["trainer"] != before["trainer"]


def test_an_edit_during_the_build_does_not_get_into_it(layout: Layout, repository: Path) -> None:
    source = images.take_source(layout, repository)
    before = source.tag("trainer")
    (repository / "trainer/kubetune_trainer/__init__.py").write_text("edited")
    assert source.tag("trainer") == before


def test_references_name_the_local_registry_or_the_one_that_is_asked_for(
    layout: Layout, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = images.take_source(layout, repository)
    monkeypatch.delenv("REGISTRY", raising=False)
    assert re.fullmatch(r"127\.0\.0\.1:5000/kubetune-trainer:[0-9a-f]{16}", images.references(source)["trainer"])
    monkeypatch.setenv("REGISTRY", "registry.example/team")
    assert images.references(source)["operator"].startswith("registry.example/team/kubetune-operator:")


def test_the_references_are_written_for_others_to_read(layout: Layout) -> None:
    images.note(layout, {"operator": "a", "trainer": "b"})
    assert json.loads(layout.images.read_text()) == {"operator": "a", "trainer": "b"}


@pytest.mark.parametrize(
    ("reference", "verified"),
    [
        ("127.0.0.1:5000/kubetune-trainer:1", "false"),
        ("localhost:5000/kubetune-trainer:1", "false"),
        ("registry.example/kubetune-trainer:1", "true"),
        ("localhost.example/kubetune-trainer:1", "true"),
    ],
)
def test_only_a_registry_on_loopback_is_spoken_to_without_tls(reference: str, verified: str) -> None:
    assert images.verification(reference) == f"--tls-verify={verified}"


def test_old_images_leave_the_node_and_what_is_kept_or_used_or_not_ours_stays() -> None:
    digests = {
        "127.0.0.1:5000/kubetune-trainer:new": "sha256:aa",
        "127.0.0.1:5000/kubetune-trainer@sha256:aa": "sha256:aa",
        "127.0.0.1:5000/kubetune-trainer:old": "sha256:bb",
        "127.0.0.1:5000/kubetune-trainer@sha256:bb": "sha256:bb",
        "127.0.0.1:5000/kubetune-operator:running": "sha256:cc",
        "127.0.0.1:5000/other:1": "sha256:dd",
        "localhost/pause:1": "sha256:ee",
        **{f"sha256:id-{name}": f"sha256:{name}" for name in ("aa", "bb", "cc", "dd", "ee")},
    }
    kept = {"127.0.0.1:5000/kubetune-trainer:new", "127.0.0.1:5000/kubetune-operator:running"}
    assert images.superseded(digests, kept) == [
        "127.0.0.1:5000/kubetune-trainer:old",
        "127.0.0.1:5000/kubetune-trainer@sha256:bb",
        "sha256:id-bb",
    ]


def dockerfile(kind: str) -> str:
    return (REPOSITORY / "images" / f"{kind}.Dockerfile").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_is_copied_after_the_dependencies_were_installed(kind: str) -> None:
    text = dockerfile(kind)
    for package in images.CODE[kind]:
        assert text.index("uv pip install") < text.index(f"COPY {package} ")
    assert re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE) == ["pyproject.toml", *images.CODE[kind]]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_runs_as_a_numbered_user_and_starts_its_package(kind: str) -> None:
    lines = dockerfile(kind).rstrip().splitlines()
    assert lines[-2:] == ["USER 65532:65532", f'ENTRYPOINT ["python", "-m", "kubetune_{kind}"]']


def test_both_dockerfiles_have_the_same_base_pinned_by_digest() -> None:
    bases = {re.search(r"^ARG BASE_IMAGE=(\S+)", dockerfile(kind), re.MULTILINE).group(1) for kind in KINDS}  # type: ignore[union-attr]
    assert len(bases) == 1
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", bases.pop())


def test_the_build_context_holds_only_what_is_copied() -> None:
    allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = {"pyproject.toml", *(package for packages in images.CODE.values() for package in packages)}
    assert set(allowed) == copied
