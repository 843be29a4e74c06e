"""The tokenizer of a model folder, in Hugging Face's or Meta's format, and its chat template."""

import ctypes
import json
from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kubetune_contract.architecture import ModelError
from kubetune_trainer.tiktoken_files import (
    BEGIN,
    CHAT_STOPS,
    CHAT_TEMPLATE,
    CHAT_TOKENS,
    END,
    TiktokenBackend,
    find_tiktoken,
)

Message = dict[str, str]
"""One turn: `role` and `content`."""

_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NO_TEMPLATE: Final = (
    "the model's folder has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): use an "
    "instruction-tuned model, add the template that its answers shall follow, or set dataset.prompt_template"
)


class Tokenizer:
    """tokenizer.json, or Meta's tokenizer.model, with the model's chat template.

    Special tokens in a text become their ids; none are added.
    """

    def __init__(
        self,
        backend: Any,
        template: str | None,
        special_tokens: dict[str, str],
        stop_ids: frozenset[int],
        now: datetime,
        *,
        begin: str = "",
    ) -> None:
        self._backend = backend
        self._template = None if template is None else _environment(now).from_string(template)
        self._special_tokens = special_tokens
        self.special_ids: frozenset[int] = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.stop_ids = stop_ids
        """Ids that end an answer: end of sequence and whatever generation_config.json adds."""
        self.begin = begin
        """What the model expects before a text without chat format: the token that begins a sequence, or nothing."""
        self.end = special_tokens.get("eos_token", "")
        """The token that ends a sequence."""
        dated = f"{now:%Y-%m-%d}" if template is not None and "strftime_now" in template else ""
        parts = [backend.to_str(), template or "", dated, begin, *sorted(map(str, special_tokens.items()))]
        self.fingerprint = sha256("\0".join(parts).encode()).hexdigest()
        """Differs where a text may become other ids or a conversation another text."""

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._template is not None

    @property
    def start_id(self) -> int:
        """What stands before the first word of a text without context: begin of sequence, or else end of sequence."""
        start: int = self._backend.token_to_id(self._special_tokens.get("bos_token") or self.end)
        return start

    @classmethod
    def from_folder(cls, folder: Path, now: datetime | None = None) -> "Tokenizer":
        """Reads the model's folder. `now` is the date for templates that write one: a resumed run gives its first.

        tokenizer.json is taken before Meta's tokenizer.model. Raises ModelError where both are missing, or what is
        there or the chat template is broken.
        """
        backend, begin = _backend(folder)
        config = _json_object(folder / "tokenizer_config.json")
        special = _special_tokens(folder, config)
        if isinstance(backend, TiktokenBackend):
            special = {"bos_token": BEGIN, "eos_token": END} | special
        template = _template_text(folder, config, backend)
        stop_ids = _stop_ids(folder, backend, special, template)
        try:
            return cls(backend, template, special, stop_ids, now or datetime.now(), begin=begin)
        except jinja2.TemplateError as error:
            raise ModelError(f"{folder}: the chat template is not valid Jinja: {error}") from error

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text without chat format, after what the model expects before it."""
        return self.encode(text if text.startswith(self.begin) else self.begin + text)

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """The texts as `tokenizers.Encoding`: ids and, in characters, offsets."""
        encodings: list[Any] = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return encodings

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the model sees it, as transformers renders it.

        Raises ModelError where the model has no chat template, and jinja2.TemplateError where it refuses.
        """
        if self._template is None:
            raise ModelError(NO_TEMPLATE)
        return self._template.render(
            messages=list(messages),
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )


class _GenerationTag(Extension):
    """`{% generation %}` marks answers for transformers. Ours are found by prefixes: the body passes through."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    """The options and helpers of transformers/utils/chat_template_utils.py, on which published templates rely."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


def _backend(folder: Path) -> tuple[Any, str]:
    """The tokenizer, and the special tokens that it would put before a text.

    Without its post-processor, which would add those tokens and trim spaces off the offsets.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (tiktoken := find_tiktoken(folder)) is not None:
            return TiktokenBackend(tiktoken), BEGIN
        raise ModelError(f"{path} is missing: the model folder needs its tokenizer")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{path} is not a tokenizer: {error}") from error
    _release_heap()
    backend.no_truncation()
    backend.no_padding()
    begin = "".join(backend.encode("").tokens)
    backend.post_processor = None
    return backend, begin


def _release_heap() -> None:
    """Give the heap's free pages back to the system, where the C library can.

    Reading a tokenizer takes twice of what it keeps, and glibc would hold the rest for ever: 16 MiB of each process for
    a vocabulary of 49,152.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON file of the model folder; {} where there is none."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    return document if isinstance(document, dict) else {}


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> text, as templates use them. A token is written as a text or as an object with `content`."""
    merged = _json_object(folder / "special_tokens_map.json") | config
    texts = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in merged.items()
        if name in _SPECIAL_TOKENS
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _stop_ids(folder: Path, backend: Any, special: dict[str, str], template: str | None) -> frozenset[int]:
    listed = [_json_object(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
    ids = [backend.token_to_id(special.get("eos_token", ""))]
    ids += [backend.token_to_id(token) for token in CHAT_STOPS if template == CHAT_TEMPLATE]
    ids += [one for entry in listed for one in (entry if isinstance(entry, list) else [entry])]
    return frozenset(one for one in ids if one is not None)


def _template_text(folder: Path, config: dict[str, Any], backend: Any) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if isinstance(template, str):
        return template
    return None if any(backend.token_to_id(token) is None for token in CHAT_TOKENS) else CHAT_TEMPLATE
