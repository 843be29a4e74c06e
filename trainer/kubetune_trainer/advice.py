"""What a configuration allows and yet rarely means: warnings before a run."""

import json
from pathlib import Path

from kubetune_contract.config import RunConfig

_TUNED = ("instruct", "chat")
"""In the names of models that know a chat format."""


def warnings(config: RunConfig) -> list[str]:
    """A sentence for each. Reads small files of the model; says nothing about a model that is not there."""
    return [text for text in (_untrained_tokens(config),) if text]


def _untrained_tokens(config: RunConfig) -> str | None:
    """Base weights under a chat format: nobody has trained the embeddings of the special tokens between the turns."""
    lora, folder = config.lora, Path(config.model.path)
    rows = (config.dataset, *config.dataset.mixture)
    if lora is None or all(row.format == "Completion" for row in rows) or "embed_tokens" in lora.target_modules:
        return None
    if not folder.is_dir() or _knows_chats(folder):
        return None
    train_them = "" if config.has_magnitude else " add embed_tokens and lm_head to adapter.target_modules,"
    return (
        f"{folder} looks like base weights: it has no chat template, and its name does not say Instruct. The "
        f"special tokens of a chat have untrained embeddings there, and {config.method} does not train embeddings: "
        f"take the Instruct weights,{train_them} or set dataset.format to Completion"
    )


def _knows_chats(folder: Path) -> bool:
    whole = folder.resolve()
    name = whole.parent.name if whole.name == "original" else whole.name  # original/ holds Meta's own files
    if any(word in name.lower() for word in _TUNED):
        return True
    if (folder / "chat_template.jinja").exists():
        return True
    settings = folder / "tokenizer_config.json"
    try:
        return "chat_template" in json.loads(settings.read_text())
    except (OSError, ValueError):
        return False  # whether the file can be read at all is the tokenizer's question
