"""`tune estimate`: how much memory a configuration takes, before anything is downloaded or started."""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from kubetune_contract.architecture import LlamaConfig
from kubetune_contract.config import RunConfig
from kubetune_contract.errors import ConfigError
from kubetune_contract.estimate import GIB, estimate
from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.fit import NO_REMEDY, remedies
from kubetune_trainer import meta_files, migration, recipes, torchrun
from kubetune_trainer.families import FAMILIES, known
from kubetune_trainer.hub import WeightReader
from kubetune_trainer.overrides import select


def add_parser(commands: Any) -> None:
    """The subcommand."""
    parser = commands.add_parser("estimate", help="print the memory that a training run takes on each GPU")
    torchrun.add_options(parser)
    parser.add_argument("--config", required=True, help="a name from `tune ls` or a YAML file")
    parser.add_argument("--model-config", type=Path, metavar="FILE", help="the model's config.json, if it is elsewhere")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="say whether a GPU of this size is enough")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    nodes = torchrun.nodes(options)
    selection = select(options.config, options.overrides)
    values, problems = migration.take_out(selection.values)
    config = recipes.configure(recipes.filled(values), None, problems)
    model = _architecture(config, selection.shipped, options.model_config)
    needed = estimate(config, model, nodes.world_size, nodes.processes)
    training = config.training
    print(
        f"{config.method} of {model.parameters / 1e9:.2f} billion parameters, {nodes.world_size} process"
        f"{'es' if nodes.world_size > 1 else ''}, micro-batches of {training.batch_size} x "
        f"{config.dataset.max_sequence_length} tokens, activation checkpointing {training.activation_checkpointing}\n"
        f"\n{needed.table()}"
    )
    if options.gpu_memory is not None:
        memory = int(options.gpu_memory * GIB)
        print(f"\nfits into {options.gpu_memory:g} GiB: {'yes' if needed.fits(memory) else 'no'}")
        if not needed.fits(memory):
            ways = remedies(config, model, nodes.world_size, nodes.processes, memory)
            print("\n".join(f"  {way}" for way in itertools.islice(ways, 3)) or f"  {NO_REMEDY}")
    return ExitCode.DONE


def _architecture(config: RunConfig, preset: str | None, file: Path | None) -> LlamaConfig:
    """The model's sizes, from its files where they are. Raises ConfigError."""
    found = file or Path(config.model.path, "config.json")
    if file is None and not found.is_file():
        if meta_files.find(Path(config.model.path)) is not None:
            return WeightReader(config.model.path).config()
        if (model := known(preset, config.model.path)) is None:
            raise ConfigError(
                [
                    f"model.path: {found} is not there, and the name tells no known model ({', '.join(FAMILIES)}): "
                    "download the model, or give --model-config FILE"
                ]
            )
        return model
    try:
        values = json.loads(found.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError([f"{found} cannot be read as JSON: {error}"]) from error
    return LlamaConfig.from_hf(values)
