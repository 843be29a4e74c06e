"""Meta's tokenizer.model, a tiktoken file: a line for each token, its bytes in base64 and its rank.

Importing this module imports neither torch nor tiktoken.
"""

import base64
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Final, NamedTuple

from kubetune_contract.architecture import ModelError
from kubetune_trainer.stored import read_start

TIKTOKEN_FILE: Final = "tokenizer.model"

PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts a text before it merges bytes (llama3/tokenizer.py in Meta's llama-models)."""

BEGIN: Final = "<|begin_of_text|>"
END: Final = "<|end_of_text|>"
CHAT_STOPS: Final = ("<|eom_id|>", "<|eot_id|>")
"""What ends a message: one that waits for a tool, and any other."""

CHAT_TOKENS: Final = (BEGIN, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
"""What a vocabulary must have for CHAT_TEMPLATE."""

CHAT_TEMPLATE: Final = (
    "<|begin_of_text|>{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Llama 3's chat format, for folders of its vocabulary that have none: Meta's own, and base models."""

_NAMED: Final = {
    0: BEGIN,
    1: END,
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_SPECIAL: Final = 256

_LONGEST_RUN: Final = 25_000
_RUN: Final = re.compile(r"\s+|\S+")


class Encoding(NamedTuple):
    """What `tokenizers.Encoding` has of a text."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """Start and end in characters. A character whose bytes lie in several tokens belongs to each of them."""


@dataclass(frozen=True)
class SpecialToken:
    """What `tokenizers.AddedToken` has."""

    content: str
    special: bool = True


class TiktokenBackend:
    """tiktoken behind the part of `tokenizers.Tokenizer` that this package uses. Names and defaults are theirs."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError for a file that is missing, damaged or no tiktoken file."""
        import tiktoken

        ranks = read_ranks(path)
        self._special = special_tokens(len(ranks))
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self._special
        )
        self._lengths = {rank: len(token) for token, rank in ranks.items()}
        self._lengths |= {number: len(token.encode()) for token, number in self._special.items()}
        self._digest = sha256(path.read_bytes()).hexdigest()

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """The ids of a text. Special tokens in it become their ids; none are added."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[Encoding]:
        """The same for many."""
        assert not add_special_tokens, "the chat format writes them"
        texts = [_without_surrogates(text) for text in texts]
        pieces = [_split_runs(text) for text in texts]
        flat = [piece for some in pieces for piece in some]
        threads = len(os.sched_getaffinity(0))
        parts = iter(self._encoding.encode_batch(flat, num_threads=threads, allowed_special="all"))
        batches = [[one for _ in some for one in next(parts)] for some in pieces]
        return [Encoding(ids, self._offsets(text, ids)) for text, ids in zip(texts, batches, strict=True)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        special = set(self._special.values()) if skip_special_tokens else set()
        return self._encoding.decode([one for one in ids if one not in special])

    def token_to_id(self, token: str) -> int | None:
        """The id of a special token, or None."""
        return self._special.get(token)

    def get_added_tokens_decoder(self) -> dict[int, SpecialToken]:
        """Id -> special token."""
        return {number: SpecialToken(token) for token, number in self._special.items()}

    def to_str(self) -> str:
        """What tells this tokenizer from others."""
        return f"{TIKTOKEN_FILE} {self._digest}"

    def _offsets(self, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
        ends = list(accumulate(self._lengths[one] for one in ids))
        starts = [0, *ends][:-1]
        if text.isascii():
            return list(zip(starts, ends, strict=True))
        import numpy as np

        content = np.frombuffer(text.encode(), dtype=np.uint8)
        characters = np.cumsum(content & 0xC0 != 0x80) - 1  # for each byte, the character that it belongs to
        firsts, lasts = characters[starts].tolist(), characters[np.array(ends) - 1] + 1
        return list(zip(firsts, lasts.tolist(), strict=True))


def _split_runs(text: str) -> list[str]:
    """The text, cut where white space or its absence lasts very long, as in Meta's code: tiktoken's regex gives up."""
    if len(text) <= _LONGEST_RUN:
        return [text]
    cuts = [cut for run in _RUN.finditer(text) for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN)]
    return [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]


def _without_surrogates(text: str) -> str:
    """JSON may hold halves of characters, which are no text: each becomes U+FFFD, as in tiktoken."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def find_tiktoken(folder: Path) -> Path | None:
    """tokenizer.model in a model's folder or in its `original`."""
    places = (folder / TIKTOKEN_FILE, folder / "original" / TIKTOKEN_FILE)
    return next((path for path in places if path.is_file()), None)


def special_tokens(words: int) -> dict[str, int]:
    """Llama 3.1's 256 special tokens behind a vocabulary of so many others; 3.0 names fewer, in the same places."""
    names, reserved = [], 0
    for number in range(_SPECIAL):
        if number in _NAMED:
            names.append(_NAMED[number])
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return {name: words + number for number, name in enumerate(names)}


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank. Raises ModelError for a file that is missing, damaged or of another kind."""
    ranks = read_start(path, _parse)
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ModelError(f"{path} is damaged: ranks or single bytes are missing; copy or download it again")
    return ranks


def _parse(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ModelError(
                f"{path} is no tiktoken file (line {number}); SentencePiece files, as Llama 2 has them, are not read: "
                "add the model's tokenizer.json"
            ) from error
    return ranks


# --- as a tokenizer.json ----------------------------------------------------------------------------------------------


def write_hugging_face(path: Path, folder: Path) -> None:
    """The same tokenizer as tokenizer.json, and Llama 3's chat format in tokenizer_config.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    ranks = read_ranks(path)
    special = special_tokens(len(ranks))
    vocabulary = {_letters(token): rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocabulary, _merges(ranks), ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    begin = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, special[BEGIN])]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """tiktoken joins the neighbours that make the token of the lowest rank, whatever they are: all pairs that do so."""
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks]
        pairs += [(_letters(left), _letters(right)) for _, _, left, right in sorted(known)]
    return pairs


def _letters(token: bytes) -> str:
    return "".join(_letter(byte) for byte in token)


@lru_cache(maxsize=256)
def _letter(byte: int) -> str:
    """GPT-2's visible letter for a byte: itself where Latin-1 prints it, else one from 256 on."""
    hidden = [other for other in range(256) if not _is_visible(other)]
    return chr(byte if _is_visible(byte) else 256 + hidden.index(byte))


def _is_visible(byte: int) -> bool:
    return 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE
