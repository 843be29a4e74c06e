"""What containers run: `launch` (all processes of a node), `train` (one of them), `stage` (fetch or check weights)."""

import os
import signal
import sys

if __name__ == "__main__":
    # The first process of a container ignores a signal that it does not handle: without this, a pod that is deleted
    # while this program starts, or while it stages, stays for its whole grace period. Nothing is lost: a download goes
    # on from its files, and `launch` takes the signal over before the first process trains.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))

import argparse
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from kubetune_contract.config import RunConfig
from kubetune_contract.errors import ConfigError, explain


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code (kubetune_contract.exit_codes)."""
    parser = argparse.ArgumentParser(prog="python -m kubetune_trainer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("launch", "start the processes of this node (PET_* variables)"),
        ("train", "be one process of a run (RANK, WORLD_SIZE, ...)"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--config", type=Path, required=True, help="a complete RunConfig as JSON")
    stage = commands.add_parser("stage", help="fetch or check the weights", add_help=False)
    stage.add_argument("rest", nargs=argparse.REMAINDER)
    options, unknown = parser.parse_known_args(arguments)
    match options.command:
        case "launch":
            return _launch(options.config)
        case "train":
            return _train(options.config)
        case _:
            from kubetune_trainer import stage as staging

            return staging.main(unknown + options.rest)


def _launch(config: Path) -> int:
    from kubetune_trainer import launch
    from kubetune_trainer.advice import warnings

    try:
        nodes = launch.Nodes.from_env(os.environ)
        for text in warnings(_read(config)) if nodes.rank == 0 else ():
            print(f"warning: {text}", file=sys.stderr)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return launch.run(launch.worker_command(config), nodes)


def _train(config: Path) -> int:
    from kubetune_trainer import train

    try:
        return train.main(_read(config))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)


def _read(config: Path) -> RunConfig:
    try:
        return RunConfig.model_validate_json(config.read_bytes())
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from error


if __name__ == "__main__":
    sys.exit(main())
