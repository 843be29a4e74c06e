"""torchtune's keys: each is told with ours, the page shows the same table."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from kubetune_contract.config import RunConfig
from kubetune_trainer import cli, reference
from kubetune_trainer.migration import KEYS, SAME, table, take_out

OURS = {row.path for row in reference.rows(RunConfig)}

# A file as torchtune's users have it, with every kind of key that its four fine-tuning recipes read.
THEIRS = """
output_dir: /tmp/out
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: /tmp/m/tokenizer.model, max_seq_len: null}
model:
  _component_: torchtune.models.llama3.lora_llama3_8b
  lora_attn_modules: [q_proj, v_proj, output_proj]
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 8
  lora_alpha: 16
  lora_dropout: 0.0
checkpointer:
  _component_: torchtune.training.FullModelMetaCheckpointer
  checkpoint_dir: /tmp/m/original/
  checkpoint_files: [consolidated.00.pth]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3
resume_from_checkpoint: False
save_adapter_weights_only: False
dataset: {_component_: torchtune.datasets.alpaca_cleaned_dataset, packed: False}
seed: null
shuffle: True
batch_size: 2
optimizer: {_component_: torch.optim.AdamW, fused: True, weight_decay: 0.01, lr: 3e-4}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 100}
loss: {_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 8
clip_grad_norm: null
compile: False
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger, log_dir: "${output_dir}/logs"}
log_every_n_steps: 1
log_peak_memory_stats: True
device: cuda
dtype: bf16
enable_activation_checkpointing: True
enable_activation_offloading: False
profiler: {_component_: torchtune.training.setup_torch_profiler, enabled: False, wait_steps: 5, active_steps: 2}
"""


def leaves(values: dict[str, Any], path: str = "") -> list[str]:
    return [
        leaf
        for name, value in values.items()
        for leaf in (leaves(value, f"{path}{name}.") if isinstance(value, dict) else [path + name])
    ]


def test_no_key_stands_twice_or_is_one_of_ours() -> None:
    theirs = [key.theirs for key in KEYS]
    assert len(set(theirs)) == len(theirs)
    assert not OURS & set(theirs)
    assert set(SAME) <= OURS


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.theirs)
def test_what_a_key_became_exists_or_the_reason_is_given(key: Any) -> None:
    assert key.ours in OURS if key.ours else key.note


def test_every_key_of_a_torchtune_file_is_told_at_once() -> None:
    values = yaml.safe_load(THEIRS)
    rest, problems = take_out(values)
    assert [problem.partition(":")[0] for problem in problems] == [leaf for leaf in leaves(values) if leaf not in SAME]
    assert rest == {"output_dir": "/tmp/out", "dataset": {"packed": False}}


TOLD = {
    "batch_size=4": "batch_size: a key of torchtune; here it is training.batch_size",
    "optimizer.lr=1e-4": "optimizer.lr: a key of torchtune; here it is training.learning_rate",
    "epochs=3": "epochs: a key of torchtune; here it is training.epochs",
    "checkpointer.checkpoint_dir=/tmp/m": "checkpointer.checkpoint_dir: a key of torchtune; here it is model.path",
    "model.lora_rank=16": "model.lora_rank: a key of torchtune; here it is adapter.rank",
    "dtype=bf16": "dtype: a key of torchtune; here it is training.precision "
    "(bf16 is BF16, fp32 is FP32; fp16 is refused: gradients leave its range)",
    "enable_activation_checkpointing=True": "enable_activation_checkpointing: a key of torchtune; here it is "
    "training.activation_checkpointing (true is Full, false is None)",
    "model._component_=torchtune.models.llama3.llama3_8b": "model._component_: a key of torchtune that has no like "
    "here: it is read from the model's folder; DoRA and QLoRA are values of method",
    "device=cuda": "device: a key of torchtune that has no like here: GPUs where there are any, else the CPU",
    "resume_from_checkpoint=True": "resume_from_checkpoint: a key of torchtune that has no like here: a run goes on "
    "from the newest checkpoint in output_dir by itself",
}


@pytest.mark.parametrize("override", TOLD)
@pytest.mark.parametrize(
    "command", [["validate"], ["run", "lora_finetune_single_device", "--config"], ["manifest", "--config"]]
)
def test_an_override_of_torchtune_is_told_with_our_key(
    command: list[str], override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "llama3/8B_lora", override]) == 64
    assert capsys.readouterr().err == f"error: this cannot work:\n  {TOLD[override]}\n"


# --- the pages ---


def test_the_committed_pages_are_as_generated(capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main(["--check"]) == 0, capsys.readouterr().out


def test_the_page_has_the_whole_table() -> None:
    assert table() in (reference.REPOSITORY / reference.MOVING_PAGE).read_text()


def test_the_reference_has_every_key() -> None:
    page = reference.config_page()
    assert len(OURS) > 80
    assert [path for path in OURS if f"| `{path}` |" not in page] == []


ROWS = {
    "a choice": "| `training.schedule` | choice | `Cosine`, `Linear`, `Constant` | `Cosine` |",
    "bounds": "| `training.learning_rate` | number | > 0, <= 1 | `0.0003` |",
    "what is required": "| `output_dir` | string |  | required |",
    "a list": "| `adapter.target_modules` | list of choices | `q_proj`, `k_proj`,",
    "items of a list": "| `dataset.mixture[].weight` | number |",
    "an option without a default": "| `training.max_steps` | integer | >= 1 |  |",
    "a rule": "- `training`: cpu_offload goes with the optimizer AdamW, but it is `optimizer`: bitsandbytes'",
}


@pytest.mark.parametrize("case", ROWS)
def test_the_reference_shows(case: str) -> None:
    assert ROWS[case] in reference.config_page()


def test_the_check_tells_what_differs_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in reference.outputs(reference.REPOSITORY):
        target = tmp_path / path.relative_to(reference.REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    page = tmp_path / reference.MOVING_PAGE
    page.write_text(page.read_text().replace("| `batch_size` |", "| `batch` |"))
    edited = page.read_text()
    assert reference.main(["--check"], tmp_path) == 1
    assert "+| `batch_size` | all | `training.batch_size` |" in capsys.readouterr().out
    assert page.read_text() == edited
    assert reference.main([], tmp_path) == 0
    assert reference.main(["--check"], tmp_path) == 0
