"""Text to ids and back, and chat templates; transformers is the oracle."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import jinja2
import pytest

from kubetune_contract.architecture import ModelError
from kubetune_trainer.tokenizer import Message, Tokenizer

CAPITALS: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Peru?"},
    {"role": "assistant", "content": "Lima. 🙂"},
]
NextFolder = Callable[..., Path]


def test_rendering_and_ids_equal_transformers(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(smollm2)
    ours = Tokenizer.from_folder(smollm2)
    conversations = [CAPITALS, CAPITALS[1:], CAPITALS[1:2], [{"role": "user", "content": " <|im_end|>\n\n é 日本 "}]]
    for messages in conversations:
        for prompt in (False, True):
            text = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(messages, add_generation_prompt=prompt) == text
            ids = oracle.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
            assert ours.encode(text) == ids
            assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert ours.stop_ids == {oracle.eos_token_id}


HELPERS = {
    "tojson": "{{ messages | tojson(indent=2) }}<|im_end|>",
    "generation, break and namespaces": """\
{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if ns.n > 2 %}{% break %}{% endif %}\
{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}""",
    "blocks are trimmed": """\
{% for m in messages %}
    {% if m.role == 'user' %}
{{ m.content }}
    {% endif %}
{% endfor %}
""",
    "names that are not given": "{% if tools %}T{% endif %}{{ messages[0].name | default('nobody') }}{{ unk_token }}",
}


@pytest.mark.parametrize("case", HELPERS)
def test_templates_find_the_helpers_that_transformers_gives(case: str, chat_folder: NextFolder) -> None:
    from transformers import AutoTokenizer

    folder = chat_folder(HELPERS[case], unk_token="<unk>")
    oracle = AutoTokenizer.from_pretrained(folder)
    assert Tokenizer.from_folder(folder).render(CAPITALS) == oracle.apply_chat_template(CAPITALS, tokenize=False)


def test_a_date_in_a_template_is_the_one_that_is_given(chat_folder: NextFolder) -> None:
    folder = chat_folder("{{ strftime_now('%d %b %Y') }}")
    assert Tokenizer.from_folder(folder, datetime(2024, 7, 26)).render([]) == "26 Jul 2024"


def test_templates_cannot_reach_the_interpreter(chat_folder: NextFolder) -> None:
    hostile = Tokenizer.from_folder(chat_folder("{{ messages.__class__.__mro__ }}"))
    with pytest.raises(jinja2.TemplateError, match="is unsafe"):
        hostile.render(CAPITALS)


def test_a_template_may_stand_in_the_tokenizers_configuration(chat_folder: NextFolder) -> None:
    template = (chat_folder() / "chat_template.jinja").read_text()
    plain = Tokenizer.from_folder(chat_folder(None, chat_template=template))
    listed = Tokenizer.from_folder(
        chat_folder(
            None, chat_template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
        )
    )
    assert plain.render(CAPITALS) == listed.render(CAPITALS)


def test_everything_that_ends_an_answer_stops_it(chat_folder: NextFolder) -> None:
    folder = chat_folder()
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (folder / "config.json").write_text('{"eos_token_id": 3}')
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.stop_ids == {*tokenizer.encode("<|im_end|>"), 3, 5, 6}


def test_broken_model_folders_are_told(chat_folder: NextFolder, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ModelError, match="has no chat template"):
        Tokenizer.from_folder(chat_folder(None)).render(CAPITALS)
    with pytest.raises(ModelError, match="not valid Jinja"):
        Tokenizer.from_folder(chat_folder("{% if %}"))
