"""A run from Meta's files alone is the run from the same model in Hugging Face's layout, and exports the latter."""

from pathlib import Path

import pytest
import torch

from kubetune_contract.config import RunConfig
from kubetune_contract.paths import METRICS_FILE
from kubetune_contract.presets import merge
from kubetune_trainer import cli, train
from kubetune_trainer.distributed import World
from kubetune_trainer.report import read_metrics
from kubetune_trainer.tiktoken_files import write_hugging_face
from kubetune_trainer.tokenizer import Tokenizer

from .conftest import write_llama
from .meta_folder import write_meta, write_ranks

WORDS = 256 + 256
"""Single bytes, special tokens."""


def test_a_run_from_metas_files_equals_one_from_hugging_faces(
    training_run: RunConfig, alone: World, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hugging_face = write_llama(tmp_path / "hf", vocab_size=WORDS)
    write_hugging_face(write_ranks(tmp_path) / "tokenizer.model", hugging_face)
    meta = tmp_path / "Tiny-Instruct"
    write_meta(hugging_face, meta / "original", shards=2)
    losses, merged = {}, {}
    for name, folder in (("hf", hugging_face), ("meta", meta)):
        changes = {
            "model": {"path": str(folder)},
            "training": {"max_steps": 3},
            "dataset": {"max_sequence_length": 128},
            "export": {"merged": True},
            "output_dir": str(tmp_path / f"out-{name}"),
        }
        train.run(RunConfig.model_validate(merge(training_run.model_dump(), changes)), alone, train.StopFlag())
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / f"out-{name}" / METRICS_FILE) if "loss" in row]
        merged[name] = AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{name}" / "merged", dtype=torch.float32)
    assert len(losses["meta"]) == 3
    assert losses["meta"] == losses["hf"]
    ours, theirs = merged["meta"].state_dict(), merged["hf"].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2."}]
    oracle = AutoTokenizer.from_pretrained(tmp_path / "out-meta" / "merged")
    rendered = oracle.apply_chat_template(messages, return_dict=True)["input_ids"]
    tokenizer = Tokenizer.from_folder(meta)
    assert rendered == tokenizer.encode(tokenizer.render(messages))


def test_an_estimate_reads_the_sizes_of_metas_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hugging_face = write_llama(tmp_path / "hf", vocab_size=WORDS)
    meta = write_meta(hugging_face, tmp_path / "meta" / "original").parent
    tables = []
    for folder in (hugging_face, meta):
        words = ["estimate", "--config", "llama3/8B_lora_single_device"]
        assert cli.main([*words, f"model.path={folder}"]) == 0
        tables.append(capsys.readouterr().out.replace(str(folder), "FOLDER"))
    assert tables[0] == tables[1]
