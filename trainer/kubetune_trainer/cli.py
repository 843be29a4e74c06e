"""`tune`: the same trainer on a laptop or a single machine, with torchtune's command line."""

import argparse
import difflib
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from kubetune_contract.base import snake
from kubetune_contract.config import Method, RunConfig
from kubetune_contract.errors import ConfigError
from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.presets import preset_names, preset_text, resolve
from kubetune_trainer import download, launch

REQUIRED: Final = {
    "model.path": "model.path=FOLDER",
    "dataset.path": "dataset.path=FILE",
    "output_dir": "output_dir=FOLDER",
}
"""What no preset can know, and how the command line gives it."""
_SINGLE: Final = "_single_device"


class Recipe(NamedTuple):
    """A name for a way to train; the code is the same for all."""

    name: str
    method: Method
    distributed: bool


RECIPES: Final = {
    recipe.name: recipe
    for recipe in (
        Recipe("full_finetune_single_device", "Full", distributed=False),
        Recipe("full_finetune_distributed", "Full", distributed=True),
        Recipe("lora_finetune_single_device", "LoRA", distributed=False),
        Recipe("lora_finetune_distributed", "LoRA", distributed=True),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code (kubetune_contract.exit_codes)."""
    options = _parse(arguments)
    try:
        code: int = options.run(options)
    except ConfigError as error:
        print("\n".join(["error: this cannot work:", *(f"  {problem}" for problem in error.problems)]), file=sys.stderr)
        return int(error.exit_code)
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse stops collecting overrides at the next option: what follows is added here."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tune", description="Fine-tune Llama models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    ls = commands.add_parser("ls", help="list the recipes and the configurations that go with them")
    ls.set_defaults(run=_ls)

    cp = commands.add_parser("cp", help="copy a configuration to edit it")
    cp.add_argument("name", help="as `tune ls` shows it")
    cp.add_argument("file", type=Path, help="where to; must not exist")
    cp.set_defaults(run=_cp)

    download.add_parser(commands)

    check = commands.add_parser("validate", help="check a configuration without running it")
    check.add_argument("config", help="a name from `tune ls` or a YAML file")
    check.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    check.set_defaults(run=_validate)

    run = commands.add_parser(
        "run",
        help="train",
        description="torchrun's options stand before the recipe.",
        epilog="KEY=VALUE replaces a value, ~KEY removes it.",
    )
    run.add_argument(
        "--nproc_per_node", "--nproc-per-node", type=int, default=1, metavar="N", help="processes on this machine (1)"
    )
    run.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines (1)")
    run.add_argument("--node_rank", "--node-rank", type=int, default=0, metavar="R", help="number of this machine (0)")
    run.add_argument("--master_addr", "--master-addr", default="127.0.0.1", metavar="HOST", help="machine 0")
    run.add_argument("--master_port", "--master-port", type=int, metavar="PORT", help="port on machine 0")
    run.add_argument("recipe", metavar="RECIPE", help=f"one of {', '.join(RECIPES)}")
    run.add_argument("--config", required=True, help="a name from `tune ls` or a YAML file")
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    run.set_defaults(run=_run)
    return parser


def _ls(_: argparse.Namespace) -> int:
    print(f"{'RECIPE':32}CONFIG")
    for recipe in RECIPES.values():
        configs = [name for name in preset_names() if _goes_with(name, recipe)]
        for left, right in zip([recipe.name] + [""] * len(configs), configs or ["-"], strict=False):
            print(f"{left:32}{right}")
    return ExitCode.DONE


def _goes_with(preset: str, recipe: Recipe) -> bool:
    method = (yaml.safe_load(preset_text(preset)) or {}).get("method", RunConfig.model_fields["method"].default)
    return method == recipe.method and not (recipe.distributed and preset.endswith(_SINGLE))


def _cp(options: argparse.Namespace) -> int:
    text = preset_text(_known_preset(options.name))
    if options.file.exists():
        raise ConfigError([f"{options.file} exists already: choose another file"])
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(text)
    print(f"copied {options.name} to {options.file}")
    return ExitCode.DONE


def _validate(options: argparse.Namespace) -> int:
    values = _values(options.config, options.overrides)
    missing = [path for path in REQUIRED if not _has(values, path)]
    for path in missing:
        _set(values, path, "-")
    _resolve(values)
    needed = f"; to run it also needs {', '.join(REQUIRED[path] for path in missing)}" if missing else ""
    print(f"{options.config} is valid{needed}")
    return ExitCode.DONE


def _run(options: argparse.Namespace) -> int:
    nodes = launch.Nodes(
        options.nproc_per_node, options.nnodes, options.node_rank, options.master_addr, options.master_port
    )
    recipe = _recipe(options.recipe)
    config = _resolve(_values(options.config, options.overrides), recipe=recipe, extra=_world_problems(recipe, nodes))
    with tempfile.TemporaryDirectory(prefix="kubetune-") as folder:
        path = Path(folder, "run.json")
        path.write_text(config.to_json())
        return launch.run(launch.worker_command(path), nodes)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        raise ConfigError(
            [
                f"recipe: {name!r} is unknown; "
                + (f"did you mean {near[0]}?" if near else f"the recipes are {', '.join(RECIPES)}")
            ]
        )
    return RECIPES[name]


def _world_problems(recipe: Recipe, nodes: launch.Nodes) -> list[str]:
    if not recipe.distributed and nodes.world_size > 1:
        other = recipe.name.replace(_SINGLE, "_distributed")
        return [
            f"{recipe.name} runs one process, but {nodes.world_size} are asked for: "
            f"use {other}, or leave out the number of processes"
        ]
    return nodes.problems()


# --- from the command line to a RunConfig -----------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-4 is a number (PyYAML follows 1.1 and wants 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _values(config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The preset's or file's values with the overrides laid over them."""
    values = _base(config)
    problems = []
    for override in overrides:
        try:
            _apply(values, override)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return values


def _base(config: str) -> dict[str, Any]:
    if Path(config).is_file():
        text = Path(config).read_text()
    elif config.endswith((".yaml", ".yml")):
        raise ConfigError([f"--config: there is no file {config}"])
    else:
        text = preset_text(_known_preset(config))
    try:
        values = yaml.load(text, _Loader) or {}  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError([f"{config} is not YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{config} must hold keys and values, such as `method: LoRA`"])
    return _snake(values)


def _snake(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {snake(str(key)): _snake(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _known_preset(name: str) -> str:
    if name in preset_names():
        return name
    near = difflib.get_close_matches(name, preset_names(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the configurations are {', '.join(preset_names())}"
    raise ConfigError([f"--config: {name!r} is neither a file nor a configuration; {hint}"])


def _apply(values: dict[str, Any], override: str) -> None:
    if override.startswith("~"):
        _remove(values, override[1:])
        return
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"{override}: an override is KEY=VALUE, such as training.epochs=3, or ~KEY")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {text!r} is not a YAML value") from error
    _set(values, path, _snake(value) if isinstance(value, Mapping) else value)


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *above, name = map(snake, path.split("."))
    for key in above:
        below = values.get(key)
        values[key] = below if isinstance(below, dict) else {}
        values = values[key]
    values[name] = value


def _remove(values: dict[str, Any], path: str) -> None:
    *above, name = map(snake, path.split("."))
    for key in above:
        values = values.get(key) or {}
    if name not in values:
        raise ValueError(f"~{path}: the configuration does not set {path}, so it cannot be removed")
    del values[name]


def _has(values: Any, path: str) -> bool:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values is not None


def _resolve(values: dict[str, Any], recipe: Recipe | None = None, extra: Sequence[str] = ()) -> RunConfig:
    """The complete configuration; ConfigError with all problems, each missing path with the override that gives it."""
    problems = list(extra)
    for path in REQUIRED:
        above = path.partition(".")[0]
        if above != path:
            values.setdefault(above, {})
    method = values.setdefault("method", recipe.method) if recipe else None
    if recipe and method in ("Full", "LoRA") and method != recipe.method:
        other = next(r.name for r in RECIPES.values() if r.method == method and r.distributed == recipe.distributed)
        problems.append(
            f"method: {recipe.name} trains with {recipe.method}, but the configuration says {method}: "
            f"use {other}, or set method={recipe.method}"
        )
    try:
        config = resolve(None, values)
    except ConfigError as error:
        problems += [_with_override(problem) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return config


def _with_override(problem: str) -> str:
    path = problem.partition(":")[0]
    return f"{problem}; give it as {REQUIRED[path]}" if path in REQUIRED and problem.endswith("required") else problem
