"""`tune`: the same trainer on a laptop or a single machine, with torchtune's command line."""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from kubetune_contract.base import ContractModel
from kubetune_contract.config import RunConfig
from kubetune_contract.errors import ConfigError, validated
from kubetune_contract.exit_codes import ExitCode, JobError
from kubetune_contract.presets import config_names, preset_text
from kubetune_trainer import download, estimation, launch, migration, recipes, torchrun
from kubetune_trainer.advice import warnings
from kubetune_trainer.manifest import Placement, job_name, manifest
from kubetune_trainer.overrides import Selection, known_config, select
from kubetune_trainer.preflight import check_files
from kubetune_trainer.recipes import RECIPES, Recipe
from kubetune_trainer.tasks import TASKS, Task

_OTHERS: Final = (download, estimation)
"""Modules with a subcommand of their own: add_parser(commands) sets `run`, from the options to the exit code."""
_SECRETS: Final = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
"""Access tokens of the Hugging Face Hub."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code (kubetune_contract.exit_codes)."""
    options = _parse(arguments)
    try:
        code: int = options.run(options)
    except ConfigError as error:
        _complain("\n".join(["error: this cannot work:", *(f"  {problem}" for problem in error.problems)]))
        return int(error.exit_code)
    except JobError as error:
        _complain(f"error: {error}")
        return int(error.exit_code)
    return code


def _complain(text: str) -> None:
    print(_without_secrets(text), file=sys.stderr)


def _without_secrets(text: str) -> str:
    """A token that was typed in a wrong place is not told back: errors end up in logs."""
    token = os.environ.get("HF_TOKEN")
    return _SECRETS.sub("hf_...", text.replace(token, "hf_...") if token else text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(_without_secrets(message))


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
    parser = _Parser(prog="tune", description="Fine-tune Llama models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    ls = commands.add_parser("ls", help="list the recipes and the configurations that go with them")
    ls.set_defaults(run=_ls)

    cp = commands.add_parser("cp", help="copy a configuration to edit it")
    cp.add_argument("name", help="as `tune ls` shows it")
    cp.add_argument("file", type=Path, help="where to; must not exist")
    cp.set_defaults(run=_cp)

    cat = commands.add_parser("cat", help="print a configuration")
    cat.add_argument("name", help="as `tune ls` shows it")
    cat.set_defaults(run=_cat)

    check = commands.add_parser("validate", help="check a configuration without running it")
    check.add_argument("config", nargs="?", help="a name from `tune ls` or a YAML file")
    check.add_argument("--config", dest="config_option", metavar="CONFIG", help="the same as an option")
    check.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    check.set_defaults(run=_validate)

    preview = commands.add_parser("preview", help="show the first rows as the model sees them, and what is learnt")
    preview.add_argument("--config", required=True, help="a name from `tune ls` or a YAML file")
    preview.add_argument("--rows", type=int, default=1, metavar="N", help="rows of each dataset (1)")
    preview.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    preview.set_defaults(run=_preview)

    _add_run(commands)
    _add_manifest(commands)
    for module in _OTHERS:
        module.add_parser(commands)
    return parser


def _add_run(commands: "argparse._SubParsersAction[_Parser]") -> None:
    run = commands.add_parser(
        "run",
        help="train, or do a single task",
        description="torchrun's options stand before the recipe.",
        epilog="KEY=VALUE replaces a value, ~KEY removes it.",
    )
    torchrun.add_options(run)
    run.add_argument("recipe", metavar="RECIPE", help=f"one of {', '.join([*RECIPES, *TASKS])}")
    run.add_argument("--config", required=True, help="a name from `tune ls` or a YAML file")
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    run.set_defaults(run=_run)


def _add_manifest(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("manifest", help="print the FineTuneJob that runs a configuration on a cluster")
    parser.add_argument("--config", required=True, help="a name from `tune ls` or a YAML file")
    parser.add_argument("--name", help="name of the job (from the configuration's)")
    parser.add_argument("--models-claim", default="models", metavar="CLAIM", help="holds models and data (models)")
    parser.add_argument("--output-claim", default="output", metavar="CLAIM", help="takes the results (output)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="worker pods (1)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=1, metavar="N", help="GPUs of each; 0 trains on the CPU (1)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.set_defaults(run=_manifest)


# --- the commands -----------------------------------------------------------------------------------------------------


def _ls(_: argparse.Namespace) -> int:
    print(f"{'RECIPE':32}CONFIG")
    rows = [(recipe.name, recipe.presets) for recipe in RECIPES.values()]
    for name, configs in [*rows, *((task.name, task.configs) for task in TASKS.values())]:
        for left, right in zip([name] + [""] * len(configs), configs or ["-"], strict=False):
            print(f"{left:32}{right}")
    return ExitCode.DONE


def _cp(options: argparse.Namespace) -> int:
    text = _text(options.name)
    if options.file.exists():
        raise ConfigError([f"{options.file} exists already: choose another file"])
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(text)
    print(f"copied {options.name} to {options.file}")
    return ExitCode.DONE


def _cat(options: argparse.Namespace) -> int:
    print(_text(options.name), end="")
    return ExitCode.DONE


def _text(name: str) -> str:
    if name in {*RECIPES, *TASKS} - {*config_names()}:
        raise ConfigError([f"{name} is a recipe: a name without code of its own; `tune ls` shows its configurations"])
    return preset_text(known_config(name))


def _validate(options: argparse.Namespace) -> int:
    if options.config_option and options.config:  # it is the first override
        options.overrides.insert(0, options.config)
    config = options.config_option or options.config
    if not config:
        raise ConfigError(["--config: a name from `tune ls` or a YAML file is required"])
    selection = select(config, options.overrides)
    task = _task_of(selection)
    if task:
        _configure_task(task, selection)
        print(f"{config} is valid")
        return ExitCode.DONE
    values, problems = migration.take_out(selection.values)
    missing = recipes.lacking(values)
    _warn(recipes.configure(recipes.filled(values), None, problems))
    needed = f"; to run it also needs {', '.join(missing)}" if missing else ""
    print(f"{config} is valid{needed}")
    return ExitCode.DONE


def _run(options: argparse.Namespace) -> int:
    name = recipes.find(options.recipe, [*RECIPES, *TASKS])
    nodes = torchrun.nodes(options)
    selection = select(options.config, options.overrides)
    if name in TASKS:
        return _run_task(TASKS[name], selection, nodes)
    recipe = RECIPES[name]
    if task := _task_of(selection):
        raise ConfigError([f"--config: {options.config} is a configuration of {task.name}: run that recipe"])
    values, problems = migration.take_out(selection.values)
    config = recipes.configure(values, recipe, [*_world_problems(recipe, nodes), *problems])
    check_files(config)
    _warn(config)
    with tempfile.TemporaryDirectory(prefix="kubetune-") as folder:
        path = Path(folder, "run.json")
        path.write_text(config.to_json())
        return launch.run(launch.worker_command(path), nodes)


def _warn(config: RunConfig) -> None:
    for text in warnings(config):
        _complain(f"warning: {text}")


def _world_problems(recipe: Recipe, nodes: launch.Nodes) -> list[str]:
    if not recipe.distributed and nodes.world_size > 1:
        other = recipe.name.replace("_single_device", "_distributed")
        return [
            f"{recipe.name} runs one process, but {nodes.world_size} are asked for: "
            f"use {other}, or leave out the number of processes"
        ]
    return nodes.problems()


def _preview(options: argparse.Namespace) -> int:
    from kubetune_trainer import preview

    config = _without_output(select(options.config, options.overrides))
    print(preview.show(config, options.rows, sys.stdout.isatty()))
    return ExitCode.DONE


def _manifest(options: argparse.Namespace) -> int:
    selection = select(options.config, options.overrides)
    name = options.name or job_name(selection.shipped or Path(options.config).name)
    placement = Placement(name, options.models_claim, options.output_claim, options.nodes, options.gpus_per_node)
    print(manifest(_without_output(selection), selection.shipped, placement), end="")
    return ExitCode.DONE


def _without_output(selection: Selection) -> RunConfig:
    """A training run that is looked at, but writes nothing here."""
    if task := _task_of(selection):
        raise ConfigError([f"--config: this is a configuration of {task.name}, not of a training run"])
    values, problems = migration.take_out(selection.values)
    return recipes.configure({"output_dir": "-"} | values, None, problems)


# --- tasks ------------------------------------------------------------------------------------------------------------


def _task_of(selection: Selection) -> Task | None:
    """The task whose configuration this is; of a user's file, the one that knows all of its keys."""
    if selection.shipped:
        return next((task for task in TASKS.values() if selection.shipped in task.configs), None)
    keys = {*selection.values}
    if keys <= {*RunConfig.model_fields}:
        return None
    return next((task for task in TASKS.values() if keys <= {*task.model.model_fields}), None)


def _configure_task(task: Task, selection: Selection) -> ContractModel:
    return validated(task.model, selection.values)


def _run_task(task: Task, selection: Selection, nodes: launch.Nodes) -> int:
    if nodes.world_size > 1:
        raise ConfigError([f"{task.name} runs one process: leave out the number of processes"])
    if "method" in selection.values or (selection.shipped and selection.shipped not in task.configs):
        other = other.name if (other := _task_of(selection)) else "a training run"
        raise ConfigError([f"--config: this is a configuration of {other}; {task.name} goes with {task.configs[0]}"])
    return task.run(_configure_task(task, selection))
