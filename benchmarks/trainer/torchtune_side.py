"""torchtune's side: its own single-device recipes and configuration, in an environment of their own."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from benchmarks.trainer.work import ALPHA, CLIP, RANK, RATE, Probe, Work

_MODULE = "benchmarks.trainer.torchtune_side"


class NoTokenizer:
    """Rows are tokens already."""

    pad_id = 0


class Rows:
    """The dataset of the run."""

    def __init__(self, _tokenizer: NoTokenizer, rows: list[list[int]]) -> None:
        self._rows = [list(row) for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        return {"tokens": self._rows[number], "labels": self._rows[number]}


class Logger:
    """The recipe's metric logger: it is called at the end of each step."""

    probe: Probe

    def log_config(self, _config: Any) -> None:
        """Nothing is kept."""

    def log_dict(self, payload: dict[str, Any], step: int) -> None:  # noqa: ARG002 - torchtune's interface
        """One step."""
        self.probe.step(float(payload["loss"]))

    def close(self) -> None:
        """Nothing is open."""


def main() -> None:
    """One run. The probe ends the process."""
    from benchmarks.trainer import torchtune_side  # the module that the recipe imports, not __main__
    from omegaconf import OmegaConf

    work, result = Work.read()
    torchtune_side.Logger.probe = Probe(work, result)
    recipe = recipe_class(work.method)
    settings = OmegaConf.create(config(work, result.parent))
    run = recipe(settings)
    torchtune_side.Logger.probe.before_model()
    run.setup(cfg=settings)
    run.train()


def recipe_class(method: str) -> Any:
    """The recipe, from its file: the package `recipes` refuses to be imported."""
    import torchtune

    name, title = (
        ("full_finetune_single_device", "FullFinetuneRecipeSingleDevice")
        if method == "Full"
        else ("lora_finetune_single_device", "LoRAFinetuneRecipeSingleDevice")
    )
    file = Path(torchtune.__file__).parents[1] / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "the recipes are installed with torchtune"
    assert spec.loader is not None, "a file of Python has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, title)


def config(work: Work, output: Path) -> dict[str, Any]:
    """torchtune's own configuration of Llama 3.2, with the settings that are the same on each side."""
    import torch

    return {
        "output_dir": str(output),
        "model": model(work),
        "tokenizer": {"_component_": f"{_MODULE}.NoTokenizer"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": work.model,
            "checkpoint_files": sorted(file.name for file in Path(work.model).glob("*.safetensors")),
            "recipe_checkpoint": None,
            "output_dir": str(output),
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "dataset": {"_component_": f"{_MODULE}.Rows", "rows": work.tokens()},
        "seed": 1,
        "shuffle": False,
        "batch_size": work.batch,
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.01, "lr": RATE},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 1,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "epochs": 1,
        "max_steps_per_epoch": None,
        "gradient_accumulation_steps": 1,
        "clip_grad_norm": CLIP,
        "compile": False,
        "optimizer_in_bwd": False,
        "metric_logger": {"_component_": f"{_MODULE}.Logger"},
        "log_every_n_steps": 1,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": "bf16" if work.precision == "BF16" else "fp32",
        "enable_activation_checkpointing": work.recompute,
        "enable_activation_offloading": False,
    }


def model(work: Work) -> dict[str, Any]:
    """The model's component. A scale of 1 leaves RoPE as it is."""
    about = json.loads((Path(work.model) / "config.json").read_text())
    rope = about.get("rope_theta") or about["rope_parameters"]["rope_theta"]
    shape = {
        "vocab_size": about["vocab_size"],
        "num_layers": about["num_hidden_layers"],
        "num_heads": about["num_attention_heads"],
        "num_kv_heads": about["num_key_value_heads"],
        "embed_dim": about["hidden_size"],
        "intermediate_dim": about["intermediate_size"],
        "max_seq_len": about["max_position_embeddings"],
        "norm_eps": about["rms_norm_eps"],
        "rope_base": int(rope),
        "scale_factor": 1,
        "tie_word_embeddings": about["tie_word_embeddings"],
    }
    if work.method == "Full":
        return {"_component_": "torchtune.models.llama3_2.llama3_2", **shape}
    return {
        "_component_": "torchtune.models.llama3_2.lora_llama3_2",
        **shape,
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "quantize_base": work.method == "QLoRA",
    }


if __name__ == "__main__":
    main()
