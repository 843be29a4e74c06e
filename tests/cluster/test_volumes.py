"""A claim gets a folder; a folder outside ours is never deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import volumes


class Calls:
    """Stands for the API server and remembers what it was asked."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str, Any]] = []

    def call(self, method: str, path: str, body: Any = None, fine: tuple[int, ...] = ()) -> dict[str, Any]:
        self.made.append((method, path, body))
        return {}


def claim(**changes: Any) -> dict[str, Any]:
    """A claim that waits for us; `changes` replace parts of its spec, status or metadata."""
    metadata = {"name": "models", "namespace": "team", "uid": "12345678-aaaa", **changes.get("metadata", {})}
    spec = {
        "storageClassName": "standard",
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "20Gi"}},
        **changes.get("spec", {}),
    }
    return {"metadata": metadata, "spec": spec, "status": {"phase": "Pending", **changes.get("status", {})}}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        pytest.param(claim(), True, id="a waiting claim"),
        pytest.param(claim(spec={"storageClassName": "fast"}), False, id="of another class"),
        pytest.param(claim(spec={"storageClassName": ""}), False, id="of no class"),
        pytest.param(claim(spec={"volumeName": "by-hand"}), False, id="that names its volume"),
        pytest.param(claim(status={"phase": "Bound"}), False, id="that is bound"),
        pytest.param(claim(metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"}), False, id="that is being deleted"),
    ],
)
def test_only_waiting_claims_of_our_class_are_served(given: dict[str, Any], wanted: bool) -> None:
    assert volumes.wants_volume(given) is wanted


def test_a_volume_is_bound_to_its_claim_with_what_was_asked_for(tmp_path: Path) -> None:
    volume = volumes.volume_for(claim(), tmp_path)
    assert volume["spec"]["claimRef"]["uid"] == "12345678-aaaa"
    assert volume["spec"]["capacity"] == {"storage": "20Gi"}
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    assert volume["spec"]["local"] == {"path": str(tmp_path)}


def test_any_user_may_write_in_a_new_folder(tmp_path: Path) -> None:
    server = Calls()
    volumes.provision(server, tmp_path, claim())  # type: ignore[arg-type]
    folder = tmp_path / "team-models-12345678"
    assert folder.stat().st_mode & 0o777 == 0o777
    assert [(method, path) for method, path, _ in server.made] == [("POST", volumes.VOLUMES)]


def volume(folder: Path, *, phase: str = "Released", by: str = volumes.PROVISIONER) -> dict[str, Any]:
    made = volumes.volume_for(claim(), folder)
    made["metadata"]["annotations"]["pv.kubernetes.io/provisioned-by"] = by
    return {**made, "status": {"phase": phase}}


def test_a_released_volume_goes_with_its_folder(tmp_path: Path) -> None:
    server, folder = Calls(), tmp_path / "team-models-12345678"
    folder.mkdir()
    (folder / "weights").touch()
    volumes.release(server, tmp_path, volume(folder))  # type: ignore[arg-type]
    assert not folder.exists()
    assert server.made[0][:2] == ("DELETE", f"{volumes.VOLUMES}/pvc-12345678-aaaa")


@pytest.mark.parametrize("kept", [{"phase": "Bound"}, {"by": "someone.else"}], ids=["in use", "of someone else"])
def test_other_volumes_are_left_alone(tmp_path: Path, kept: dict[str, str]) -> None:
    server, folder = Calls(), tmp_path / "data"
    folder.mkdir()
    volumes.release(server, tmp_path, volume(folder, **kept))  # type: ignore[arg-type]
    assert folder.exists()
    assert server.made == []


def test_a_folder_outside_ours_is_not_deleted(tmp_path: Path) -> None:
    root, outside = tmp_path / "volumes", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    volumes.release(Calls(), root, volume(outside))  # type: ignore[arg-type]
    volumes.release(Calls(), root, volume(root / ".." / "outside"))  # type: ignore[arg-type]
    assert outside.exists()
