"""Models and data for the drills: small ones that work, and one for each way in which they do not."""

import json
import shutil
from pathlib import Path

from tests.trainer.conftest import write_llama


def write(root: Path) -> Path:
    """Write what goes onto the models volume, a folder for each."""
    write_llama(root / "tiny")
    # Half of it is more than the hub's client writes at once.
    write_llama(root / "hub", hidden_size=336, num_hidden_layers=5, intermediate_size=1024)
    bert = write_llama(root / "bert") / "config.json"
    bert.write_text(
        json.dumps(json.loads(bert.read_text()) | {"architectures": ["BertForMaskedLM"], "model_type": "bert"})
    )
    for name in ("cut", "bare", "mute"):
        shutil.copytree(root / "tiny", root / name)
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (root / "bare" / "config.json").unlink()
    (root / "mute" / "tokenizer.json").unlink()
    spoil(shutil.copytree(root / "tiny", root / "nan") / "model.safetensors")
    write_data(root / "data")
    shutil.copy(root / "data" / "train.jsonl", root / "hub")  # the hub's repository is one of data too
    return root


def spoil(weights: Path) -> None:
    """Overwrite a weight with NaN."""
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    state["model.norm.weight"][0] = float("nan")
    save_file(state, weights, metadata={"format": "pt"})


def write_data(folder: Path) -> None:
    """Data files: good ones, questions without an answer, a line that is no JSON, a row of another format."""
    folder.mkdir()
    chats = [(f"What is {n} and {n}?", f"It is {2 * n}. " * 8) for n in range(64)]
    lines = [chat(question, answer) for question, answer in chats]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "questions.jsonl").write_text("".join(chat(question, None) for question, _ in chats))
    (folder / "broken.jsonl").write_text("".join([*lines[:3], lines[3][:20] + "\n", *lines[4:]]))
    (folder / "other.jsonl").write_text('{"instruction": "Say yes.", "output": "Yes."}\n' * 8)


def chat(question: str, answer: str | None) -> str:
    """A row of a data file."""
    turns = [("user", question), ("assistant", answer)]
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns if text]}) + "\n"
