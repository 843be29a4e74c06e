"""Meta's tokenizer.model: the ids, offsets and chats of the same tokenizer in tokenizers and transformers."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubetune_contract.architecture import ModelError
from kubetune_trainer.tiktoken_files import PATTERN, special_tokens, write_hugging_face
from kubetune_trainer.tokenizer import Message, Tokenizer

from .conftest import CHATML, WORDS
from .meta_folder import write_ranks

CORPUS = (
    [WORDS, "the theatre there; other mothers gather 1234567 numbers, 20.5 %\n\n  indented\n\ttabs  \r\n"] * 4
    + ["don't I'll WE'RE they've  it's   ever so   wide spaces ", "naïve façade — “quotes” … ½ ñandú Ελλάδα Россия"] * 3
    + ["日本語のテキスト 中文 한국어 العربية עברית हिन्दी 🙂🙂👩‍👩‍👧 🇫🇷"] * 4
)


@pytest.fixture(scope="module")
def merged() -> tuple[bytes, ...]:
    """The tokens of some 400 merges over CORPUS."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokens = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    return tuple(bytes(byte_of[letter] for letter in token) for token, _ in tokens if len(token) > 1)


@pytest.fixture(scope="module")
def folder(merged: tuple[bytes, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.model alone."""
    return write_ranks(tmp_path_factory.mktemp("tiktoken"), merged)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own conversion to Hugging Face's format."""
    target = tmp_path_factory.mktemp("converted")
    write_hugging_face(folder / "tokenizer.model", target)
    return target


PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(CORPUS),
    st.sampled_from(
        [" ", "\n", "\t", "\r\n", "   ", "'S", "'ll", "123456", "<|eot_id|>", "<|begin_of_text|>", "<|eot"]
    ),
    st.text(alphabet="theraots .'\n", max_size=20),
    st.text(alphabet=st.characters(min_codepoint=0x300, max_codepoint=0x1FAFF, exclude_categories=["Cs"]), max_size=6),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)


def test_ids_and_offsets_equal_tokenizers_and_transformers(folder: Path, ours: Tokenizer, converted: Path) -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = list(special_tokens(len((folder / "tokenizer.model").read_bytes().splitlines())))
    oracle = TikTokenConverter(str(folder / "tokenizer.model"), PATTERN, extra_special_tokens=special).converted()
    same = Tokenizer.from_folder(converted)

    @settings(max_examples=200, deadline=None, database=None)
    @given(TEXTS)
    def check(text: str) -> None:
        expected = oracle.encode(text, add_special_tokens=False)
        (mine,) = ours.encode_batch([text])
        assert mine.ids == expected.ids
        assert mine.offsets == expected.offsets
        assert same.encode(text) == expected.ids
        assert ours.decode(mine.ids) == oracle.decode(expected.ids, skip_special_tokens=True)

    check()


def test_the_special_tokens_are_llama_3s() -> None:
    numbers = special_tokens(128_000)
    assert len(numbers) == 256
    assert {name: number for name, number in numbers.items() if "reserved" not in name} == {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|finetune_right_pad_id|>": 128004,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
    }
    assert numbers["<|reserved_special_token_2|>"] == 128005
    assert numbers["<|reserved_special_token_247|>"] == 128255


LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""As the tokenizer_config.json of Llama 3's instruction-tuned models has it."""

ROLES = st.sampled_from(["system", "user", "assistant", "ipython"])
CHATS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS}), min_size=1, max_size=5)


def test_chats_equal_llama_3s_template_in_transformers(ours: Tokenizer, converted: Path) -> None:
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(converted)

    @settings(max_examples=80, deadline=None, database=None)
    @given(CHATS, st.booleans())
    def check(messages: list[Message], prompt: bool) -> None:
        text = oracle.apply_chat_template(messages, chat_template=LLAMA_3, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(messages, add_generation_prompt=prompt) == text
        assert oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) == text
        assert ours.encode(text) == oracle(text, add_special_tokens=False)["input_ids"]

    check()
    assert oracle("a")["input_ids"][0] == oracle.bos_token_id == ours.encode("<|begin_of_text|>")[0]


def test_an_answer_ends_with_any_of_llama_3s_stops(ours: Tokenizer) -> None:
    assert ours.stop_ids == {ours.encode(token)[0] for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")}
    assert (ours.begin, ours.end) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_a_template_in_the_folder_goes_before_the_built_in_one(merged: tuple[bytes, ...], tmp_path: Path) -> None:
    write_ranks(tmp_path, merged)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert Tokenizer.from_folder(tmp_path).render([{"role": "user", "content": "x"}]).startswith("<|im_start|>user")


def test_the_vocabulary_of_a_base_model_brings_the_format_too(converted: Path, ours: Tokenizer, tmp_path: Path) -> None:
    """Hugging Face's folder of a base model has no chat template."""
    (tmp_path / "tokenizer.json").write_bytes((converted / "tokenizer.json").read_bytes())
    messages = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Ho"}]
    assert Tokenizer.from_folder(tmp_path).render(messages) == ours.render(messages)


def test_fingerprints_tell_vocabularies_apart(merged: tuple[bytes, ...], ours: Tokenizer, tmp_path: Path) -> None:
    other = write_ranks(tmp_path, merged[:-1])
    assert Tokenizer.from_folder(other).fingerprint != ours.fingerprint


@pytest.mark.parametrize("letter", ["a", " ", "\n", "é", "1"])
def test_very_long_runs_of_one_letter_are_taken(letter: str, ours: Tokenizer) -> None:
    """tiktoken's regex gives up on a million spaces."""
    text = "start " + letter * 1_000_000 + " end"
    (encoding,) = ours.encode_batch([text])
    assert ours.decode(encoding.ids) == text
    assert encoding.offsets[-1][1] == len(text)


def test_a_run_of_letters_is_cut_at_25000_as_in_metas_code(ours: Tokenizer) -> None:
    part, whole = ours.encode("b" * 25_000), ours.encode("b" * 60_000)
    assert whole == part + part + ours.encode("b" * 10_000)


def test_half_a_character_becomes_the_replacement_character(ours: Tokenizer) -> None:
    (encoding,) = ours.encode_batch(["é\ud800x"])
    assert encoding == ours.encode_batch(["é\ufffdx"])[0]
    assert ours.decode(encoding.ids) == "é\ufffdx"


DAMAGE: dict[str, tuple[bytes, str]] = {
    "a line without a rank": (b"IQ==\n", r"tokenizer\.model is no tiktoken file \(line 1\)"),
    "no base64": (b"!!!! 0\n", r"is no tiktoken file \(line 1\)"),
    "a hole in the ranks": (b"IQ== 0\nIg== 2\n", r"is damaged: ranks or single bytes are missing"),
    "empty": (b"", r"is damaged: ranks or single bytes are missing"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_folder(tmp_path)
