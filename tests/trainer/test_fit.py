"""What a run is told whose device is too small, and `tune estimate`."""

import itertools
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kubetune_contract.estimate import GIB, estimate
from kubetune_contract.exit_codes import ExitCode
from kubetune_contract.fit import DoesNotFitError, check_memory, relief, remedies
from kubetune_trainer import train
from kubetune_trainer.cli import main
from kubetune_trainer.distributed import World
from kubetune_trainer.families import FAMILIES, known

from .test_estimate import B8, FULL, settings

REMEDIES: dict[str, tuple[dict[str, Any], int, int, list[str]]] = {
    "LoRA that keeps its activations": (
        {},
        1,
        24,
        ["set training.activation_checkpointing to Full", "set method to QLoRA", "use 8 processes"],
    ),
    "LoRA on a card of 16 GiB": (FULL, 1, 16, ["set method to QLoRA", "use 2 processes"]),
    "full fine-tuning on one card of 80 GB": (
        FULL | {"method": "Full"},
        1,
        79,
        ["set method to LoRA", "use 2 processes"],
    ),
    "a batch of 16 in 4 bits": (
        FULL | {"method": "QLoRA", "batch_size": 16},
        1,
        16,
        [
            "set training.batch_size to 1 and training.gradient_accumulation_steps to 128",
            "set dataset.max_sequence_length to 1024",
        ],
    ),
    "two changes where none alone is enough": (
        {"method": "LoRA", "batch_size": 4},
        1,
        10,
        ["set training.activation_checkpointing to Full and set method to QLoRA"],
    ),
}


@pytest.mark.parametrize(("changes", "processes", "gib", "told"), REMEDIES.values(), ids=REMEDIES)
def test_remedies_name_settings_that_fit_the_simplest_first(changes, processes, gib, told):
    found = list(itertools.islice(remedies(settings(**changes), B8, processes, processes, gib * GIB), 3))
    assert [text.partition(" (")[0] for text in found][: len(told)] == told
    assert all(float(re.search(r"\((.*) GiB\)", text)[1]) <= gib for text in found)


@pytest.mark.parametrize("gib", [6, 8, 12, 16, 24, 40, 80])
@pytest.mark.parametrize("method", ["Full", "DoRA", "QDoRA", "LoRA", "QLoRA"])
def test_a_run_that_does_not_fit_is_told_two_ways_that_do_or_that_there_is_none(method, gib):
    config, memory = settings(method=method, max_sequence_length=4096), gib * GIB
    if estimate(config, B8).fits(memory):
        check_memory(config, B8, 1, 1, memory=memory, longest=4096)
        return
    with pytest.raises(DoesNotFitError) as caught:
        check_memory(config, B8, 1, 1, memory=memory, longest=4096)
    assert caught.value.exit_code is ExitCode.DOES_NOT_FIT
    assert re.match(r"a step needs [\d.]+ GiB of memory on each device, but the device has [\d.]+: ", str(caught.value))
    assert str(caught.value).count(" GiB)") == 2


def test_where_nothing_helps_the_error_says_so():
    with pytest.raises(DoesNotFitError, match="use larger devices, or a smaller model"):
        check_memory(settings(), B8, 1, 1, memory=GIB // 2, longest=2048)


def test_data_shorter_than_the_limit_is_judged_by_its_own_length():
    config = settings(max_sequence_length=131072, **FULL)
    check_memory(config, B8, 1, 1, memory=20 * GIB, longest=1000)
    with pytest.raises(DoesNotFitError):
        check_memory(config, B8, 1, 1, memory=20 * GIB, longest=100_000)


def test_a_gpu_is_judged_before_the_model_is_built_and_a_cpu_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 8 * GIB))
    reader, data = SimpleNamespace(config=lambda: B8), SimpleNamespace(lengths=np.array([100, 2000]))
    train._check_fits(settings(**FULL), reader, World(0, 1, 0, torch.device("cpu")), data)
    with pytest.raises(DoesNotFitError, match=r"the device has 8\.0: set method to QLoRA"):
        train._check_fits(settings(**FULL), reader, World(0, 1, 0, torch.device("cuda", 0)), data)


# --- the command ------------------------------------------------------------------------------------------------------

NAMED: dict[str, tuple[str | None, str, str | None]] = {
    "a folder named as the repository": (None, "/tmp/Meta-Llama-3-8B-Instruct", "llama3/8B"),
    "a folder with a point in the version": (None, "/models/Llama-3.2-1B", "llama3_2/1B"),
    "a folder of another name, in a preset": ("llama3_3/70B_lora", "/models/mine", "llama3_3/70B"),
    "another size than the preset's": ("llama3/8B_lora", "/tmp/Meta-Llama-3-70B", "llama3/70B"),
    "a size that does not exist": (None, "/tmp/Llama-3.2-70B", None),
    "nothing that is known": (None, "/models/mine", None),
}


@pytest.mark.parametrize(("preset", "path", "name"), NAMED.values(), ids=NAMED)
def test_a_known_model_is_found_by_its_folder_or_preset(preset, path, name):
    assert known(preset, path) == (FAMILIES[name] if name else None)


def test_tune_estimate_prints_the_table_of_a_preset(capsys):
    assert main(["estimate", "--config", "llama3/8B_lora_single_device", "model.path=/nowhere"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("LoRA of 8.03 billion parameters, 1 process, micro-batches of 2 x 2048 tokens")
    total = next(float(line.split()[1]) for line in lines if line.startswith("total"))
    assert total == pytest.approx(16.0, abs=0.1)


def test_tune_estimate_takes_processes_overrides_a_model_and_a_gpus_size(capsys, tmp_path):
    sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4} | sizes))
    options = ["--nproc_per_node", "2", "--model-config", str(file), "--gpu-memory", "0.3", "method=Full"]
    assert main(["estimate", "--config", "llama3/8B_lora", *options, "~adapter"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Full of 0.00 billion parameters, 2 processes")
    assert "fits into 0.3 GiB: no\n  no settings are enough" in output


def test_tune_estimate_says_what_it_needs_of_an_unknown_model(capsys, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("model: {path: /nowhere}\ndataset: {path: d}\noutput_dir: o\n")
    assert main(["estimate", "--config", str(config)]) == ExitCode.INVALID_CONFIG
    assert "give --model-config FILE" in capsys.readouterr().err


RELIEF: dict[str, tuple[dict[str, Any], str]] = {
    "LoRA": (
        {},
        "set training.activation_checkpointing to Full, or set method to QLoRA, or set training.batch_size to 1 and "
        "training.gradient_accumulation_steps to 16",
    ),
    "4 bits with everything recomputed": (
        FULL | {"method": "QLoRA", "batch_size": 8},
        "set training.batch_size to 1 and training.gradient_accumulation_steps to 64, or use 2 processes, or set "
        "dataset.max_sequence_length to 1024",
    ),
}


@pytest.mark.parametrize(("changes", "told"), RELIEF.values(), ids=RELIEF)
def test_a_run_that_met_the_limit_is_told_three_ways_out(changes, told):
    assert relief(settings(**changes), 1) == told
