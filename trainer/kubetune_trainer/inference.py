"""A trained model, ready to be asked: the base alone, with its adapter beside its weights, or merged into them."""

from pathlib import Path
from typing import Final, NamedTuple

import torch

from kubetune_contract.config import AdapterConfig, RunConfig
from kubetune_contract.errors import ConfigError
from kubetune_trainer import distributed
from kubetune_trainer.adapter import Adapter, MergedReader
from kubetune_trainer.distributed import World
from kubetune_trainer.generate import Choose, generate, greedy
from kubetune_trainer.hub import check_model
from kubetune_trainer.model import Llama
from kubetune_trainer.parallel import build
from kubetune_trainer.task_config import InferenceModel
from kubetune_trainer.tokenizer import Tokenizer

_NOTHING_LEARNT: Final = AdapterConfig(rank=1, target_modules=["q_proj"])
"""An adapter that changes nothing: weights in 4 bits alone are QLoRA before the first step."""


class Speaker(NamedTuple):
    """A model with its tokenizer."""

    model: Llama
    tokenizer: Tokenizer
    world: World

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence that the model was made for."""
        return self.model.config.max_position_embeddings

    def answer(self, tokens: list[int], max_new_tokens: int, choose: Choose = greedy) -> list[int]:
        """The tokens that follow. Raises ConfigError where the model has no room for so many."""
        if len(tokens) + max_new_tokens > self.positions:
            raise ConfigError([_too_long(len(tokens), max_new_tokens, self.positions)])
        return generate(self.model, tokens, max_new_tokens, self.tokenizer.stop_ids, self.world, choose=choose)


def _too_long(tokens: int, max_new_tokens: int, positions: int) -> str:
    if tokens >= positions:
        remedy = "shorten the prompt"
    else:
        remedy = f"shorten the prompt, or set max_new_tokens to {positions - tokens} at most"
    return (
        f"max_new_tokens: the prompt has {tokens} tokens; {max_new_tokens} more do not fit into the model's "
        f"{positions} positions (max_position_embeddings): {remedy}"
    )


def load(options: InferenceModel) -> Speaker:
    """The model on this process's device, in evaluation mode. Raises ModelError for files that do not fit together."""
    world = distributed.start()
    reader = check_model(Path(options.path))
    tokenizer = Tokenizer.from_folder(Path(options.path))
    adapter = Adapter(Path(options.adapter_path)) if options.adapter_path else None
    if adapter is not None:
        adapter.check(reader.config())
    if adapter is not None and options.merged:
        reader = MergedReader(reader.folder, adapter)
    beside = None if options.merged else adapter
    config = _as_run(options, beside)
    with torch.no_grad():
        model = build(config, reader, world)
        if beside is not None:
            beside.load_into(model)
    return Speaker(model.requires_grad_(False).eval(), tokenizer, world)


def _as_run(options: InferenceModel, adapter: Adapter | None) -> RunConfig:
    """The run whose model this is: what `build` takes."""
    config = None if adapter is None else adapter.config()
    if adapter is None and options.quantization is not None:
        config = _NOTHING_LEARNT
    method = "Full" if config is None else "DoRA" if adapter is not None and adapter.has_magnitude else "LoRA"
    values = {
        "method": method if options.quantization is None else f"Q{method}",
        "model": {"path": options.path},
        "adapter": config,
        "quantization": options.quantization,
        # Weights that nobody trains need no wider copies.
        "training": {"precision": options.precision, "master_weights": "BF16"},
        "dataset": {"path": "-"},
        "output_dir": "-",
    }
    return RunConfig.model_validate(values)
