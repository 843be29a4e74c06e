"""An adapter on a base of any size: one step, then saved, loaded and exported by Kubetune and by peft."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

RANK: Final = 64
TARGETS: Final = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""Layers whose sizes do not depend on the vocabulary or on the width of the MLP: bases of any size take one adapter."""


def base(vocabulary: int, width: int) -> dict[str, Any]:
    """config.json of a base that such an adapter fits."""
    return {
        "model_type": "llama",
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": width,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }


def timed(act: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


class Ours:
    """Kubetune's model, optimizer and checkpoints."""

    def __init__(self, values: Mapping[str, Any], folder: Path) -> None:
        from kubetune_contract.architecture import LlamaConfig
        from kubetune_contract.config import RunConfig
        from kubetune_trainer.checkpoint import Checkpointer
        from kubetune_trainer.distributed import World
        from kubetune_trainer.model import Llama
        from kubetune_trainer.optim import make_optimizer
        from kubetune_trainer.peft import add_lora, init_adapter, trainable

        self._folder = folder
        self._config = RunConfig.model_validate(
            {
                "method": "LoRA",
                "model": {"path": "base"},
                "adapter": {"rank": RANK, "alpha": RANK, "target_modules": TARGETS},
                "dataset": {"path": "rows.jsonl"},
                "output_dir": str(folder),
            }
        )
        assert self._config.lora is not None
        self._world = World(0, 1, 0, torch.device("cpu"))
        with torch.device("meta"):
            self._model = Llama(LlamaConfig.from_hf(values))
        add_lora(self._model, self._config.lora)
        self._model.to_empty(device="cpu")
        fill(self._model.parameters())  # pages that nobody has written take no memory
        init_adapter(self._model, 0)
        params = list(trainable(self._model).values())
        self.trained = sum(param.numel() for param in params)
        self.frozen = sum(param.numel() for param in self._model.parameters()) - self.trained
        self._optimizer = make_optimizer(params, self._config.training)
        step(self._optimizer, params)
        self._checkpoints = Checkpointer(folder, 1, self._world)
        self._steps = 0

    def save(self) -> float:
        """Seconds of a checkpoint; the one before is dropped."""
        self._steps += 1
        return timed(lambda: self._checkpoints.save(self._steps, self._model, self._optimizer))

    def times(self, runs: int) -> dict[str, list[float]]:
        """Seconds to load a checkpoint and to export the adapter."""
        from kubetune_trainer.export import export_adapter

        path, target = self._checkpoints.latest(), self._folder / "adapter"
        assert path is not None, "something has been saved"
        return {
            "load": [timed(lambda: self._checkpoints.load(path, self._model, self._optimizer)) for _ in range(runs)],
            "export": [
                timed(lambda: export_adapter(self._model, self._config, target, self._world)) for _ in range(runs)
            ],
        }


class Peft:
    """peft's model; the optimizer's state goes where transformers' Trainer puts it."""

    def __init__(self, values: Mapping[str, Any], folder: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        self._folder = folder
        base = LlamaForCausalLM(LlamaConfig(**values))
        adapter = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
        self._model = get_peft_model(base, adapter)
        params = [param for param in self._model.parameters() if param.requires_grad]
        self._optimizer = torch.optim.AdamW(params)
        step(self._optimizer, params)

    def times(self, runs: int) -> dict[str, list[float]]:
        """Seconds to save, load and export."""
        return {
            key: [timed(act) for _ in range(runs)]
            for key, act in (("save", self._save), ("load", self._load), ("export", self._export))
        }

    def _save(self) -> None:
        self._export()
        torch.save(self._optimizer.state_dict(), self._folder / "optimizer.pt")

    def _load(self) -> None:
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(self._model, load_peft_weights(str(self._folder), device="cpu"))
        self._optimizer.load_state_dict(torch.load(self._folder / "optimizer.pt", weights_only=True))

    def _export(self) -> None:
        self._model.save_pretrained(self._folder)


def fill(params: Iterable[torch.nn.Parameter]) -> None:
    """Numbers of a weight's size."""
    with torch.no_grad():
        for param in params:
            param.fill_(0.02)


def step(optimizer: torch.optim.Optimizer, params: Iterable[torch.nn.Parameter]) -> None:
    """One step, so that the optimizer has a state."""
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
