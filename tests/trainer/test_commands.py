"""torchtune's documented commands, run: a small Llama stands where the weights belong, a local server for the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import write_llama
from .hub_server import HubServer, serve

# The hub's data set in its layout. Questions with and without an input.
ROWS = [
    {"instruction": f"Add {n} and {n}.", "input": "" if n % 2 else "Use numbers.", "output": str(n + n)}
    for n in range(24)
]
# Where things lie, and a run that is short. Nothing else differs from the documented command.
HERE = ["training.max_steps=2", "training.gradient_accumulation_steps=1", "dataset.max_sequence_length=400"]

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}  # whole blocks of 64 for NF4

COMMANDS = {
    "LoRA": ("run lora_finetune_single_device --config llama3/8B_lora_single_device", [], "adapter"),
    "QLoRA": ("run lora_finetune_single_device --config llama3/8B_qlora_single_device", [], "adapter"),
    "full fine-tuning": (
        "run full_finetune_single_device --config llama3/8B_full_single_device",
        ["training.optimizer=AdamW"],  # the 8-bit optimizers run on GPUs only
        "model",
    ),
    "LoRA on two processes, by a path of torchtune's": (
        "run --nproc_per_node 2 lora_finetune_distributed --config recipes/configs/llama3/70B_lora.yaml",
        [],
        "adapter",
    ),
    "full fine-tuning on two processes": (
        "run --nproc_per_node 2 full_finetune_distributed --config llama3/8B_full",
        [],
        "model",
    ),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("alpaca")
    (folder / "alpaca_data_cleaned.json").write_text(json.dumps(ROWS))
    with serve(folder) as server:
        server.repo = "yahma/alpaca-cleaned"
        yield server


@pytest.mark.parametrize("case", COMMANDS)
def test_a_documented_command_trains(case: str, hub: HubServer, tmp_path: Path) -> None:
    line, changes, result = COMMANDS[case]
    model = write_llama(tmp_path / "Meta-Llama-3-8B-Instruct", **SIZES)
    where = [f"model.path={model}", f"output_dir={tmp_path / 'out'}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    program = "import sys; from kubetune_trainer.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *line.split(), *where, *HERE, *changes],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = [json.loads(one) for one in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2
    assert (tmp_path / "out" / result).is_dir()
