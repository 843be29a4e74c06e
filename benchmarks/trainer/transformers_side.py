"""The peers that most users take: transformers with peft; with --trl also TRL, from conversations to the first step."""

import sys
from pathlib import Path
from typing import Any

from benchmarks.trainer.work import ALPHA, CLIP, LINEAR, RANK, RATE, Probe, Work


def main() -> None:
    """One run. The probe ends the process."""
    work, result = Work.read()
    probe = Probe(work, result)
    trainer = with_trl if "--trl" in sys.argv else with_trainer
    trainer(work, probe, result.parent).train()


def with_trainer(work: Work, probe: Probe, folder: Path) -> Any:
    """transformers' Trainer on rows of tokens."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    rows = [{"input_ids": row, "labels": row} for row in work.tokens()]
    probe.before_model()
    return noted(Trainer, probe)(
        model=build(work),
        args=TrainingArguments(**arguments(work, folder)),
        train_dataset=rows,
        data_collator=default_data_collator,
    )


def with_trl(work: Work, probe: Probe, folder: Path) -> Any:
    """TRL's SFTTrainer on conversations."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=work.texts, split="train", cache_dir=str(folder / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    probe.before_model()
    return noted(SFTTrainer, probe)(
        model=base(work),
        args=SFTConfig(**arguments(work, folder), max_length=work.length),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter(),
    )


def arguments(work: Work, folder: Path) -> dict[str, Any]:
    """Of either trainer: the same as on our side; whatever is not named is as its users get it."""
    import torch

    return {
        "output_dir": str(folder / "output"),
        "max_steps": work.steps,
        "per_device_train_batch_size": work.batch,
        "learning_rate": RATE,
        "weight_decay": 0.01,
        "max_grad_norm": CLIP,
        "gradient_checkpointing": work.recompute,
        "train_sampling_strategy": "sequential",
        "bf16": False,  # the weights have the number format already
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def build(work: Work) -> Any:
    """The model with its adapter."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = base(work)
    if work.method == "QLoRA":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=work.recompute)
    if work.method != "Full":
        model = get_peft_model(model, adapter())
    if work.recompute:
        model.enable_input_require_grads()
    return model


def base(work: Work) -> Any:
    """The pretrained model, for QLoRA in 4 bits."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if work.precision == "BF16" else torch.float32
    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        options["device_map"] = {"": 0}
    if work.method == "QLoRA":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype, **options)


def adapter() -> Any:
    """peft's configuration."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, task_type="CAUSAL_LM")


def noted(trainer: Any, probe: Probe) -> Any:
    """The class, which tells the probe of each step."""
    from transformers import TrainerCallback

    class Noted(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(StepEnd(self))

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.newest = super().training_step(*args, **kwargs)
            return self.newest

    class StepEnd(TrainerCallback):  # type: ignore[misc]
        def __init__(self, owner: Any) -> None:
            self._owner = owner

        def on_step_end(self, *_: Any, **__: Any) -> None:
            probe.step(float(self._owner.newest))

    return Noted


if __name__ == "__main__":
    main()
