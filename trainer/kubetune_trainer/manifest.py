"""The FineTuneJob that runs a configuration on a cluster: what differs from its preset, and where files must lie."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

import yaml

from kubetune_contract.config import RunConfig
from kubetune_contract.dataset import DatasetConfig, stays_inside
from kubetune_contract.errors import ConfigError
from kubetune_contract.presets import lay_over, read_preset, resolve

_NAME_LENGTH: Final = 45
"""Longest name of a FineTuneJob: host names are made from it."""


class Placement(NamedTuple):
    """What the manifest says beside the configuration."""

    name: str
    models_claim: str = "models"
    output_claim: str = "output"
    nodes: int = 1
    gpus_per_node: int = 1


def job_name(config: str) -> str:
    """A name for the job, from that of the configuration: llama3/8B_lora gives llama3-8b-lora."""
    words = re.sub(r"[^a-z0-9]+", "-", config.removesuffix(".yaml").removesuffix(".yml").lower()).strip("-")
    name = words if words[:1].isalpha() else f"tune-{words}"
    return name[:_NAME_LENGTH].rstrip("-")


def manifest(config: RunConfig, preset: str | None, placement: Placement) -> str:
    """The FineTuneJob as YAML. Comments say which files belong where on the claim. Raises ConfigError."""
    if not re.fullmatch(rf"[a-z]([-a-z0-9]{{0,{_NAME_LENGTH - 2}}}[a-z0-9])?", placement.name):
        rule = f"must begin with a letter, hold only a-z, 0-9 and hyphens, and have at most {_NAME_LENGTH} characters"
        raise ConfigError([f"--name: {placement.name!r} {rule}"])
    files: dict[str, str] = {}
    spec = {
        **_sections(config, preset, files),
        "workers": {"nodes": placement.nodes, "gpusPerNode": placement.gpus_per_node},
        "storage": {
            "models": {"claimName": placement.models_claim},
            "output": {"claimName": placement.output_claim},
        },
    }
    job = {
        "apiVersion": "kubetune.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": placement.name},
        "spec": spec,
    }
    notes = [f"#   {path}: {source}" for path, source in files.items()]
    if notes:
        notes.insert(0, f"# On the claim {placement.models_claim}:")
    return "\n".join([*notes, yaml.safe_dump(job, sort_keys=False, width=120)])


def _sections(config: RunConfig, preset: str | None, files: dict[str, str]) -> dict[str, Any]:
    """The spec's preset, model and sections. A preset that a manifest cannot turn into `config` is not named."""
    wanted = _with_volume_paths(config, files)
    model = {"volumePath": _volume_path(config.model.path, files)}
    if preset:
        with suppress(ConfigError):
            sections = _beyond(preset, wanted)
            if _complete(preset, sections) == _complete(None, wanted):
                return {"preset": preset, "model": model, **_spelt(sections)}
    return {"model": model, **_spelt(_beyond(None, wanted))}


def _beyond(preset: str | None, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest must say beside the preset. The data always say their place. Raises ConfigError."""
    sections = _difference(wanted, _given(preset, wanted))
    for name in ("dataset", "validation"):
        if name in wanted:
            places = {key: wanted[name][key] for key in ("path", "fraction") if key in wanted[name]}
            sections[name] = places | sections.get(name, {})
    return {key: sections[key] for key in wanted if key in sections}


def _given(preset: str | None, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest with this preset and these data says without a word more, in camelCase. Raises ConfigError."""
    data = {name: wanted[name] for name in ("dataset", "validation") if name in wanted}
    plain = _complete(preset, data).to_dict()
    kept = lay_over(read_preset(preset) if preset else {}, {"dataset": {"path": wanted["dataset"]["path"]}})["dataset"]
    return plain | {"dataset": DatasetConfig.model_validate(kept).to_dict()}


def _complete(preset: str | None, sections: Mapping[str, Any]) -> RunConfig:
    return resolve(preset, {**sections, "model": {"path": "-"}, "output_dir": "-"})


def _spelt(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections as a manifest has them: every path is a volumePath."""
    return {key: _on_volume(value) if key in ("dataset", "validation") else value for key, value in sections.items()}


def _on_volume(section: Mapping[str, Any]) -> dict[str, Any]:
    spelt = {("volumePath" if key == "path" else key): value for key, value in section.items()}
    if "mixture" in spelt:
        spelt["mixture"] = [_on_volume(other) for other in spelt["mixture"]]
    return spelt


def _with_volume_paths(config: RunConfig, files: dict[str, str]) -> dict[str, Any]:
    """The configuration in camelCase, without model and output; data lie at their places on the claim."""
    values = config.to_dict()
    for place in (values["dataset"], *values["dataset"]["mixture"], values.get("validation", {})):
        _move(place, files)
    return {key: value for key, value in values.items() if key not in ("model", "outputDir")}


def _move(place: dict[str, Any], files: dict[str, str]) -> None:
    """A dataset of the hub becomes a folder on the claim that is called like it."""
    repo, revision, split = (place.pop(key, None) for key in ("repo", "revision", "split"))
    if repo:
        place["path"] = repo
        files[repo] = f"the files of the dataset {repo} (revision {revision}, split {split})"
    elif "path" in place:
        place["path"] = _volume_path(place["path"], files)


def _volume_path(path: str, files: dict[str, str]) -> str:
    """A relative path is one on the claim already; of others the last part is kept."""
    relative = path if stays_inside(path) else PurePosixPath(path).name
    if not re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*", relative) or not stays_inside(relative):
        raise ConfigError([f"{path} cannot be a path on a volume: use letters, digits, '.', '_', '-' and '/'"])
    if relative != path and files.setdefault(relative, path) != path:
        raise ConfigError(
            [f"{path} and {files[relative]} would both be {relative} on the volume: give paths relative to its root"]
        )
    return relative


def _difference(wanted: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """What must be laid over `base` to get `wanted`."""
    changed: dict[str, Any] = {}
    for key, value in wanted.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            changed |= {key: inner} if (inner := _difference(value, below)) else {}
        elif value != below:
            changed[key] = value
    return changed
