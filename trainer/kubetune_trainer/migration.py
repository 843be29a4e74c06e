"""torchtune's configuration keys and ours: the hints of `tune` and docs/from-torchtune.md show them."""

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

Where = Literal["all", "full", "lora", "distributed", "single"]
"""The recipes that know a key."""


class Key(NamedTuple):
    """One key of torchtune's fine-tuning recipes."""

    theirs: str
    ours: str | None
    """Our key with the same meaning; None where there is nothing to set."""
    note: str = ""
    """How the values differ, or why nothing is to be set. Follows a colon."""
    where: Where = "all"


_FROM_MODEL: Final = "it is read from the model's folder"
_RESUMES: Final = "a run goes on from the newest checkpoint in output_dir by itself"
_ONE_LOOP: Final = "there is one implementation"

KEYS: Final = (
    # --- the model
    Key(
        "model._component_",
        None,
        f"{_FROM_MODEL}; DoRA and QLoRA are values of method",
    ),
    Key("model.lora_attn_modules", "adapter.target_modules", "output_proj is called o_proj", "lora"),
    Key(
        "model.apply_lora_to_mlp",
        "adapter.target_modules",
        "true is gate_proj, up_proj, down_proj in the list",
        "lora",
    ),
    Key("model.apply_lora_to_output", "adapter.target_modules", "true is lm_head in the list", "lora"),
    Key("model.lora_rank", "adapter.rank", where="lora"),
    Key("model.lora_alpha", "adapter.alpha", where="lora"),
    Key("model.lora_dropout", "adapter.dropout", where="lora"),
    Key("model.use_dora", "method", "true is DoRA, or QDoRA on a base model in 4 bits", "lora"),
    Key("model.quantize_base", "method", "true is QLoRA", "lora"),
    # --- tokenizer and files
    Key("tokenizer._component_", None, _FROM_MODEL),
    Key("tokenizer.path", None, _FROM_MODEL),
    Key("tokenizer.max_seq_len", "dataset.max_sequence_length"),
    Key("tokenizer.prompt_template", "dataset.prompt_template"),
    Key("checkpointer._component_", None, "the layout of the files is recognised"),
    Key("checkpointer.checkpoint_dir", "model.path"),
    Key("checkpointer.checkpoint_files", None, "all weight files of model.path are read, however many they are"),
    Key(
        "checkpointer.adapter_checkpoint",
        None,
        _RESUMES,
        "lora",
    ),
    Key("checkpointer.recipe_checkpoint", None, _RESUMES),
    Key("checkpointer.output_dir", "output_dir"),
    Key("checkpointer.model_type", None, _FROM_MODEL),
    Key("checkpointer.safe_serialization", None, "weights are always written as safetensors"),
    Key("checkpointer.keep_last_n_checkpoints", "checkpoint.keep"),
    Key("resume_from_checkpoint", None, _RESUMES),
    Key("save_adapter_weights_only", "export.merged", "the other way round: false here is true there", "lora"),
    Key("save_every_n_steps", "checkpoint.every_steps"),
    Key("save_last_epoch_only", "checkpoint.every_epoch", "false, the default, saves by steps only"),
    Key("keep_last_n_checkpoints", "checkpoint.keep"),
    Key("enable_async_checkpointing", "checkpoint.asynchronous", where="distributed"),
    # --- data
    Key(
        "dataset._component_",
        "dataset.format",
        "alpaca_cleaned_dataset is Alpaca with dataset.repo=yahma/alpaca-cleaned",
    ),
    Key("dataset.source", "dataset.repo", "a file or folder is dataset.path"),
    Key("dataset.data_files", "dataset.path"),
    Key("dataset.data_dir", "dataset.path", "download the repository and name the folder"),
    Key("dataset.name", None, "a repository's subset is a folder of it: download it and set dataset.path"),
    Key("dataset.column_map", "dataset.columns"),
    Key("dataset.column", "dataset.columns.text"),
    Key(
        "dataset.conversation_column",
        "dataset.columns.messages",
        "of ShareGPT dataset.columns.conversations",
    ),
    Key("dataset.conversation_style", "dataset.format", "sharegpt is ShareGPT, openai is OpenAI"),
    Key("dataset.train_on_input", "dataset.train_on", "true is All, false is Assistant"),
    Key(
        "dataset.new_system_prompt",
        "dataset.prompt_template.system",
        "around the data's system turns",
    ),
    Key("dataset.max_seq_len", "dataset.max_sequence_length"),
    Key("dataset.filter_fn", None, "rows are chosen before the run; dataset.max_bad_rows allows malformed ones"),
    Key("dataset.datasets", "dataset.mixture"),
    Key("dataset.split_across_pack", None, "no conversation is cut for packing"),
    Key("packed", "dataset.packed"),
    Key("collate_fn", None, "batches are not padded"),
    Key("shuffle", "dataset.shuffle"),
    Key("seed", "training.seed", "null, a random seed, is not offered: a run can be repeated"),
    Key("batch_size", "training.batch_size"),
    Key("dataset_val._component_", "validation.path"),
    Key("dataset_val.source", "validation.path"),
    Key("dataset_val.split", "validation.path", "or validation.fraction, a part of the training data"),
    Key("run_val_every_n_steps", "validation.every_steps"),
    Key("batch_size_val", None, "training.batch_size serves both"),
    # --- optimisation
    Key("epochs", "training.epochs"),
    Key("max_steps_per_epoch", "training.max_steps", "of the whole run"),
    Key("gradient_accumulation_steps", "training.gradient_accumulation_steps"),
    Key("clip_grad_norm", "training.max_gradient_norm", "null is 0"),
    Key("optimizer._component_", "training.optimizer", "AdamW, AdamW8bit or PagedAdamW8bit"),
    Key("optimizer.lr", "training.learning_rate"),
    Key("optimizer.weight_decay", "training.weight_decay"),
    Key("optimizer.betas", "training.beta1", "and training.beta2"),
    Key("optimizer.eps", "training.epsilon"),
    Key("optimizer.fused", None, _ONE_LOOP),
    Key("optimizer.foreach", None, _ONE_LOOP),
    Key("optimizer_in_bwd", "training.optimizer_in_backward", where="full"),
    Key("lr_scheduler._component_", "training.schedule", "Cosine, Linear or Constant"),
    Key("lr_scheduler.num_warmup_steps", "training.warmup_steps"),
    Key("lr_scheduler.num_cycles", None, "the cosine goes down once, over half a wave"),
    Key("loss._component_", None, "cross-entropy in chunks, which never holds all logits"),
    Key("loss.num_output_chunks", None, "cross-entropy in chunks, which never holds all logits"),
    Key("loss.ignore_index", None, "what carries the loss follows from dataset.train_on"),
    # --- memory and speed
    Key("dtype", "training.precision", "bf16 is BF16, fp32 is FP32; fp16 is refused: gradients leave its range"),
    Key("device", None, "GPUs where there are any, else the CPU"),
    Key("compile", "training.compile"),
    Key("enable_activation_checkpointing", "training.activation_checkpointing", "true is Full, false is None"),
    Key("ac_mode", "training.activation_checkpointing", "selective is Selective", "full"),
    Key("ac_option", None, "Selective keeps the outputs of matrix products and attention", "full"),
    Key("enable_activation_offloading", None, "use training.activation_checkpointing: Full"),
    Key("activation_offloading_use_streams", None, "use training.activation_checkpointing: Full"),
    Key("low_cpu_ram", None, "each process reads only its part of the files, one tensor after the other", "single"),
    Key("custom_sharded_layers", None, "embeddings and head are sharded by themselves", "distributed"),
    Key("fsdp_cpu_offload", "training.cpu_offload", where="distributed"),
    Key("fsdp.cpu_offload", "training.cpu_offload", where="distributed"),
    Key("fsdp_sharding_strategy", "training.sharding", "FULL_SHARD is Full, HYBRID_SHARD is Hybrid", "distributed"),
    Key("fsdp_reshard_after_forward", None, "weights are always given back after use", "distributed"),
    Key("memory_efficient_fsdp_wrap", None, "embeddings and head are sharded by themselves", "distributed"),
    Key("data_parallel_replicate_dim", "training.sharding", "Hybrid has one copy for each node", "distributed"),
    Key("data_parallel_shard_dim", "training.sharding", "Hybrid shards over the processes of a node", "distributed"),
    Key("tensor_parallel_dim", None, "models are sharded with FSDP only", "distributed"),
    Key("tensor_parallel_plan", None, "models are sharded with FSDP only", "distributed"),
    Key("context_parallel_dim", None, "a sequence stays on one GPU", "distributed"),
    Key("enable_fp8_training", None, "not offered", "full"),
    Key("fp8_recipe_name", None, "not offered", "full"),
    Key("cudnn_deterministic_mode", None, "training.seed decides everything that is drawn"),
    # --- logs
    Key("metric_logger._component_", "logging.tensorboard", "or logging.wandb_project; metrics.jsonl is there anyway"),
    Key("metric_logger.log_dir", "output_dir"),
    Key("metric_logger.filename", None, "it is metrics.jsonl in output_dir"),
    Key("metric_logger.project", "logging.wandb_project"),
    Key("metric_logger.entity", None, "set the environment variable WANDB_ENTITY"),
    Key("metric_logger.name", None, "set the environment variable WANDB_NAME"),
    Key("metric_logger.group", None, "set the environment variable WANDB_RUN_GROUP"),
    Key("log_every_n_steps", None, "every step is written"),
    Key("log_peak_memory_stats", None, "the peak memory is always written"),
    Key("log_level", None, "there is one level"),
    Key("profiler._component_", None, "the section profiler turns it on"),
    Key("profiler.enabled", None, "the section profiler turns it on, ~profiler off"),
    Key("profiler.output_dir", "output_dir"),
    Key("profiler.cpu", None, "CPU and GPU are both recorded"),
    Key("profiler.cuda", None, "CPU and GPU are both recorded"),
    Key("profiler.xpu", None, "CPU and GPU are both recorded"),
    Key("profiler.profile_memory", "profiler.memory"),
    Key("profiler.with_stack", None, "not recorded"),
    Key("profiler.record_shapes", None, "not recorded"),
    Key("profiler.with_flops", None, "not recorded"),
    Key("profiler.wait_steps", "profiler.start_step", "the first recorded step"),
    Key("profiler.warmup_steps", None, "the step before profiler.start_step warms the profiler up"),
    Key("profiler.active_steps", "profiler.steps"),
    Key("profiler.num_cycles", None, "one window is recorded"),
)
"""In the order of torchtune's files. Keys with the same name and meaning here stand in SAME."""

SAME: Final = ("output_dir", "dataset.split", "dataset.packed")
"""Keys that need no change."""

_HINTS: Final = {key.theirs: key for key in KEYS}


def take_out(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values without torchtune's keys, and a sentence for each of those."""
    problems: list[str] = []
    return _walk(values, "", problems), problems


def tell(key: Key) -> str:
    """The sentence about a key."""
    if key.ours is None:
        return f"{key.theirs}: a key of torchtune that has no like here: {key.note}"
    return f"{key.theirs}: a key of torchtune; here it is {key.ours}" + (f" ({key.note})" if key.note else "")


def table() -> str:
    """The keys as a Markdown table."""
    lines = ["| torchtune | recipes | Kubetune | |", "|---|---|---|---|"]
    lines += [f"| `{name}` | all | `{name}` | |" for name in SAME]
    lines += [f"| `{key.theirs}` | {key.where} | {f'`{key.ours}`' if key.ours else '-'} | {key.note} |" for key in KEYS]
    return "\n".join(lines)


def _walk(values: Mapping[str, Any], path: str, problems: list[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in values.items():
        below = f"{path}{name}"
        if below in _HINTS:
            problems.append(tell(_HINTS[below]))
        elif isinstance(value, Mapping) and any(theirs.startswith(f"{below}.") for theirs in _HINTS):
            rest = _walk(value, f"{below}.", problems)
            kept |= {name: rest} if rest or not value else {}
        else:
            kept[name] = value
    return kept
