"""What `tune` says about configurations that cannot work: at least ten of each kind, word by word."""

from pathlib import Path
from typing import get_args

import pytest
from tests.trainer.conftest import Started, Told

from kubetune_contract.config import TargetModule

LAYERS = ", ".join(repr(name) for name in get_args(TargetModule)[:-1]) + " or 'lm_head'"
METHODS = "'Full', 'LoRA', 'DoRA', 'QLoRA' or 'QDoRA'"
AT_ONCE = "training.optimizer_in_backward=true"


# --- keys ---

UNKNOWN_KEYS = {
    "trainin.epochs=3": "trainin: unknown field; did you mean training?",
    "training.epoch=3": "training.epoch: unknown field; did you mean epochs?",
    "training.warmup=10": "training.warmup: unknown field; did you mean warmup_steps?",
    "training.learning_rat=1e-4": "training.learning_rat: unknown field; did you mean learning_rate?",
    "training.batchsize=4": "training.batchsize: unknown field; did you mean batch_size?",
    "adapter.r=8": "adapter.r: unknown field; the fields here are rank, alpha, dropout, target_modules",
    "adapter.lora_alpha=8": "adapter.lora_alpha: unknown field; did you mean alpha?",
    "adapter.targets=[q_proj]": "adapter.targets: unknown field; did you mean target_modules?",
    "dataset.formt=OpenAI": "dataset.formt: unknown field; did you mean format?",
    "dataset.columns.instructions=x": "dataset.columns.instructions: unknown field; did you mean instruction?",
    "checkpoint.every_step=10": "checkpoint.every_step: unknown field; did you mean every_steps?",
    "model.name=llama": "model.name: unknown field; the fields here are path",
    "outputdir=o": "outputdir: unknown field; did you mean output_dir?",
}


@pytest.mark.parametrize("override", UNKNOWN_KEYS)
def test_an_unknown_key_is_told_with_the_nearest(override: str, told: Told) -> None:
    assert told("validate", "llama3/8B_lora", override) == [UNKNOWN_KEYS[override]]


# --- values ---

BAD_VALUES = {
    "method=lora": f"method: input should be {METHODS}, but it is 'lora'",
    "training.epochs=0": "training.epochs: input should be greater than or equal to 1, but it is 0",
    "training.epochs=1.5": "training.epochs: input should be a valid integer, got a number with a fractional part, "
    "but it is 1.5",
    "training.epochs=three": "training.epochs: input should be a valid integer, unable to parse string as an integer, "
    "but it is 'three'",
    "training.epochs=null": "training.epochs: input should be a valid integer, but it is None",
    "training.learning_rate=3": "training.learning_rate: input should be less than or equal to 1, but it is 3",
    "training.learning_rate=.nan": "training.learning_rate: input should be a finite number, but it is nan",
    "training.schedule=cosine": "training.schedule: input should be 'Cosine', 'Linear' or 'Constant', "
    "but it is 'cosine'",
    "training.precision=fp16": "training.precision: fp16 is not offered: gradients leave its range unless the loss is "
    "scaled; BF16 takes the same memory and has the range of FP32",
    "training.compile=perhaps": "training.compile: input should be a valid boolean, unable to interpret input, "
    "but it is 'perhaps'",
    "adapter.rank=2000": "adapter.rank: input should be less than or equal to 1024, but it is 2000",
    "adapter.target_modules=[qkv]": f"adapter.target_modules.0: input should be {LAYERS}, but it is 'qkv'",
    "adapter.target_modules=q_proj": "adapter.target_modules: input should be a valid list, but it is 'q_proj'",
    "dataset.max_sequence_length=8": "dataset.max_sequence_length: input should be greater than or equal to 16, "
    "but it is 8",
    "training=fast": "training: input should be a valid dictionary or instance of TrainingConfig, but it is 'fast'",
}


@pytest.mark.parametrize("override", BAD_VALUES)
def test_a_bad_value_is_told_with_what_is_allowed(override: str, told: Told) -> None:
    assert told("validate", "llama3/8B_lora", override) == [BAD_VALUES[override]]


# --- rules between fields ---

CROSS_FIELD: dict[str, tuple[list[str], str]] = {
    "an adapter of full fine-tuning": (
        ["method=Full", "adapter.rank=8"],
        "adapter does not go with method Full: remove adapter, or set method to LoRA",
    ),
    "a merge of full fine-tuning": (
        ["method=Full", "export.merged=true"],
        "export.merged does not go with method Full: full fine-tuning writes a whole model anyway",
    ),
    "quantization without QLoRA": (
        ["quantization.double=false"],
        "quantization does not go with method LoRA: remove quantization, or set method to QLoRA",
    ),
    "DPO of rows that are no pairs": (
        ["dpo.beta=0.2"],
        "dpo goes with data of the format Preference: remove dpo, or set dataset.format to Preference",
    ),
    "full fine-tuning on preferences": (
        ["method=Full", "dataset.path=d", "dataset.format=Preference"],
        "the format Preference does not go with method Full, because the model without its adapter is the reference: "
        "set method to LoRA",
    ),
    "packed pairs": (
        ["dataset.path=d", "dataset.format=Preference", "dataset.packed=true"],
        "dataset: packed does not go with the format Preference, whose rows are pairs: set packed to false",
    ),
    "pairs among conversations": (
        ["dataset.mixture=[{path: d, format: Preference}]"],
        "dataset: the format Preference cannot be mixed with other formats",
    ),
    "two sources of data": (
        ["dataset.path=d", "dataset.repo=a/b"],
        "dataset: exactly one of path and repo is required",
    ),
    "two sources of held-out data": (
        ["validation.path=v", "validation.fraction=0.1"],
        "validation: exactly one of path and fraction is required",
    ),
    "the best of what is not measured": (
        ["checkpoint.keep_best=true"],
        "checkpoint.keep_best needs validation.every_steps: only a measured loss can be the best",
    ),
    "an optimizer in the backward pass of an adapter": (
        [AT_ONCE, "training.gradient_accumulation_steps=1"],
        "training.optimizer_in_backward goes with method Full, but method is LoRA: "
        "an adapter's gradients are small, set it to false",
    ),
    "an optimizer in the backward pass with accumulation": (
        ["method=Full", AT_ONCE],
        "training: optimizer_in_backward needs gradient_accumulation_steps 1, but it is 8: "
        "a gradient that is used at once cannot be added up",
    ),
    "an optimizer in the backward pass with clipping": (
        ["method=Full", AT_ONCE, "training.gradient_accumulation_steps=1", "training.max_gradient_norm=0.5"],
        "training: optimizer_in_backward needs max_gradient_norm 0, but it is 0.5: "
        "the norm is known only when all gradients are there",
    ),
    "an 8-bit optimizer in host memory": (
        ["training.cpu_offload=true", "training.optimizer=AdamW8bit"],
        "training: cpu_offload goes with the optimizer AdamW, but it is AdamW8bit: "
        "bitsandbytes' optimizers run on GPUs only",
    ),
    "magnitudes outside the blocks": (
        ["method=DoRA", "adapter.target_modules=[q_proj, lm_head]"],
        "adapter.target_modules must not name embed_tokens or lm_head with method DoRA, which trains magnitudes inside "
        "the blocks only: remove them, or set method to LoRA",
    ),
    "a layer twice": (
        ["adapter.target_modules=[q_proj, q_proj]"],
        "adapter: target_modules must not name a module twice",
    ),
    "a template by name and by affixes": (
        ["dataset.prompt_template.user.prefix=Q"],
        "dataset.prompt_template: prompt_template needs a name, or affixes for at least one of system, user and "
        "assistant, not both",
    ),
}


@pytest.mark.parametrize("case", CROSS_FIELD)
def test_a_broken_rule_is_told_with_the_remedy(case: str, told: Told) -> None:
    words, expected = CROSS_FIELD[case]
    assert told("validate", "llama3/8B_lora", *words) == [expected]


# --- recipes ---

ADAPTERS = "LoRA, DoRA, QLoRA or QDoRA"
MISMATCHED: dict[str, tuple[str, list[str], str]] = {
    "full recipe, LoRA": (
        "full_finetune_single_device",
        ["llama3/8B_lora_single_device"],
        "method: full_finetune_single_device trains with Full, but the configuration says LoRA: "
        "use lora_finetune_single_device, or set method=Full",
    ),
    "full recipe, QLoRA": (
        "full_finetune_distributed",
        ["llama3_1/405B_qlora"],
        "method: full_finetune_distributed trains with Full, but the configuration says QLoRA: "
        "use lora_finetune_distributed, or set method=Full",
    ),
    "full recipe, DPO": (
        "full_finetune_distributed",
        ["llama3/8B_lora_dpo"],
        "method: full_finetune_distributed trains with Full, but the configuration says LoRA: "
        "use lora_dpo_distributed, or set method=Full",
    ),
    "LoRA recipe, full": (
        "lora_finetune_distributed",
        ["llama3/8B_full"],
        f"method: lora_finetune_distributed trains with {ADAPTERS}, but the configuration says Full: "
        "use full_finetune_distributed, or set method=LoRA",
    ),
    "LoRA recipe, full by an override": (
        "lora_finetune_single_device",
        ["llama3/8B_lora_single_device", "method=Full"],
        f"method: lora_finetune_single_device trains with {ADAPTERS}, but the configuration says Full: "
        "use full_finetune_single_device, or set method=LoRA",
    ),
    "LoRA recipe, DPO": (
        "lora_finetune_single_device",
        ["llama3/8B_lora_dpo_single_device"],
        "dataset.format: lora_finetune_single_device does not learn from data of the format Preference: "
        "use lora_dpo_single_device",
    ),
    "DPO recipe, LoRA": (
        "lora_dpo_single_device",
        ["llama3/8B_lora_single_device"],
        "dataset.format: lora_dpo_single_device learns from data of the format Preference, but the configuration "
        "says Alpaca: use lora_finetune_single_device, or set dataset.format=Preference",
    ),
    "DPO recipe, data without a format": (
        "lora_dpo_distributed",
        ["demo/smollm2_lora", "dataset.path=d", "model.path=m", "output_dir=o"],
        "dataset.format: lora_dpo_distributed learns from data of the format Preference, but the configuration "
        "says OpenAI: use lora_finetune_distributed, or set dataset.format=Preference",
    ),
    "DPO recipe, full": (
        "lora_dpo_distributed",
        ["llama3/8B_full"],
        f"method: lora_dpo_distributed trains with {ADAPTERS}, but the configuration says Full: "
        "use full_finetune_distributed, or set method=LoRA",
    ),
    "a training recipe, a task's configuration": (
        "lora_finetune_single_device",
        ["generation"],
        "--config: generation is a configuration of generate: run that recipe",
    ),
    "a task, a training run's configuration": (
        "generate",
        ["llama3/8B_lora"],
        "--config: this is a configuration of a training run; generate goes with generation",
    ),
    "a task, another's configuration": (
        "quantize",
        ["merge"],
        "--config: this is a configuration of merge; quantize goes with quantization",
    ),
    "a slip": (
        "lora_finetune_singel_device",
        ["llama3/8B_lora"],
        "recipe: 'lora_finetune_singel_device' is unknown; did you mean lora_finetune_single_device?",
    ),
    "torchtune's file of a recipe": (
        "recipes/lora_finetune_distributed.py",
        ["llama3/8B_lora"],
        "recipe: 'recipes/lora_finetune_distributed.py' is unknown; did you mean lora_finetune_distributed?",
    ),
}


@pytest.mark.parametrize("case", MISMATCHED)
def test_a_configuration_of_another_recipe_is_told_with_the_right_one(case: str, started: Started, told: Told) -> None:
    recipe, words, expected = MISMATCHED[case]
    assert told("run", recipe, "--config", *words) == [expected]
    assert started == []


# --- all at once ---


def test_all_problems_of_a_file_are_told_in_one_go(tmp_path: Path, told: Told) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "metod: LoRA\n"
        "batch_size: 4\n"
        "model: {}\n"
        "dataset: {path: a, repo: b/c}\n"
        "quantization: {double: true}\n"
        "export: {merged: 7}\n"
        "training: {epochs: 0, cpu_offload: true, optimizer: AdamW8bit}\n"
        "optimizer: {lr: 3e-4}\n"
    )
    assert told("validate", str(path)) == [
        "batch_size: a key of torchtune; here it is training.batch_size",
        "optimizer.lr: a key of torchtune; here it is training.learning_rate",
        "dataset: exactly one of path and repo is required",
        "training.epochs: input should be greater than or equal to 1, but it is 0",
        "export.merged: input should be a valid boolean, unable to interpret input, but it is 7",
        "metod: unknown field; did you mean method?",
        "training: cpu_offload goes with the optimizer AdamW, but it is AdamW8bit: "
        "bitsandbytes' optimizers run on GPUs only",
        "quantization does not go with method LoRA: remove quantization, or set method to QLoRA",
    ]
