"""Losses, answers and log-likelihoods are those of transformers, and of the evaluation harness's own model class."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kubetune_contract.errors import ConfigError, validated
from kubetune_trainer import evaluate, harness
from kubetune_trainer.harness import Scorer, windows_of
from kubetune_trainer.inference import Speaker, load
from kubetune_trainer.rows import DataError
from kubetune_trainer.task_config import EvaluationConfig, HarnessConfig, InferenceModel

Write = Callable[..., Path]

SUMS = [(a, b) for a in range(5) for b in range(4)]


@pytest.fixture
def tiny(llama_folder: Write) -> Path:
    """The tiny Llama, with a tokenizer that puts letters together again."""
    folder = llama_folder()
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"decoder": {"type": "Fuse"}}))
    return folder


@pytest.fixture
def speaker(tiny: Path) -> Speaker:
    return load(InferenceModel(path=str(tiny), precision="FP32"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBETUNE_CACHE", str(tmp_path / "cache"))


def data(folder: Path, answers: list[str] | None = None) -> Path:
    answers = answers or [f"{a + b}." for a, b in SUMS]
    pairs = zip(SUMS, answers, strict=True)
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": answer}]}
        for (a, b), answer in pairs
    ]
    file = folder / "held-out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    results = folder / "results" / "evaluation.json"
    values = {"model": {"path": str(model), "precision": "FP32"}, "results_file": str(results)} | changes
    assert evaluate.run(validated(EvaluationConfig, values)) == 0
    found: dict[str, Any] = json.loads(results.read_bytes())
    return found


def their_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- one's own data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["Assistant", "All"])
def test_loss_and_perplexity_are_those_of_transformers(
    train_on: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = data(tmp_path)
    dataset = {"path": str(file), "train_on": train_on, "packed": True}
    found = run(tiny, tmp_path, dataset=dataset, batch_size=3)
    model = their_model(tiny)
    letters = {chr(code): code - 29 for code in range(32, 126)}  # as write_tokenizer numbers them
    total, count = 0.0, 0
    for a, b in SUMS:
        question, answer = f"u:{a}+{b}?</s>", f"a:{a + b}.</s>"
        ids = torch.tensor([[letters[letter] for letter in question + answer]])
        labels = ids.clone()
        if train_on == "Assistant":
            labels[:, : len(question)] = -100
        tokens = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * tokens
        count += tokens
    assert found["label_tokens"] == count
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert "perplexity" in capsys.readouterr().out


def test_right_answers_are_counted(tiny: Path, tmp_path: Path, speaker: Speaker) -> None:
    """The answers in the data are the model's own, but for every fourth."""
    prompts = [speaker.tokenizer.encode(f"u:{a}+{b}?</s>") for a, b in SUMS]
    own = [speaker.tokenizer.decode(speaker.answer(prompt, 5)) for prompt in prompts]
    answers = ["no" if number % 4 == 0 else f" {answer}\n" for number, answer in enumerate(own)]
    file = data(tmp_path, answers)
    found = run(tiny, tmp_path, dataset={"path": str(file)}, answers=12, max_new_tokens=5)
    assert (found["answers"], found["exact_match"]) == (12, 0.75)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to measure": ({}, r"dataset .* or harness .* is required"),
    "answers to nothing": ({"harness": {"tasks": ["x"]}, "answers": 3}, "answers is 3, but there is no dataset"),
    "preferences": ({"dataset": {"path": "x", "format": "Preference"}}, "Preference has no single right answer"),
    "a misspelt key": ({"dataset": {"path": "x", "max_len": 3}}, "dataset.max_len: unknown field"),
    "no task": ({"harness": {"tasks": []}}, "harness.tasks: .*at least 1"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_work_is_told(changes: dict[str, Any], message: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny, tmp_path, **changes)


def test_missing_data_is_told(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        run(tiny, tmp_path, dataset={"path": str(tmp_path / "gone.jsonl")})


# --- the harness's three questions ------------------------------------------------------------------------------------

PAIRS = [
    ("The sum of 2 and 3 is ", "5."),
    ("The sum of 2 and 3 is", " 5."),
    ("", "Nothing stands before this."),
    ("A long context " * 50, "and an end"),
    ("One", " letter"),
]


def by_hand(model: Any, tokens: list[int], count: int) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([tokens[-513:-1]])).logits[0, -count:]
    targets = torch.tensor(tokens[-count:])
    score = logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return score, bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_loglikelihoods_are_those_of_transformers_in_every_batch(
    batch_tokens: int, tiny: Path, speaker: Speaker
) -> None:
    model, encode = their_model(tiny), speaker.tokenizer.encode
    found = Scorer(speaker, batch_tokens).loglikelihood(PAIRS)
    for (context, continuation), (score, is_greedy) in zip(PAIRS, found, strict=True):
        blanks = len(context) - len(context.rstrip())
        tokens = [speaker.tokenizer.start_id, *encode(context + continuation)]
        expected = by_hand(model, tokens if not context else tokens[1:], len(encode(continuation)) + blanks)
        assert score == pytest.approx(expected[0], abs=1e-4)
        assert is_greedy is expected[1]


def test_what_greedy_decoding_gives_is_called_greedy(speaker: Speaker) -> None:
    context = "Once upon a"
    answer = speaker.tokenizer.decode(speaker.answer(speaker.tokenizer.encode(context), 6))
    assert [greedy for _, greedy in Scorer(speaker).loglikelihood([(context, answer), (context, answer[::-1])])] == [
        True,
        False,
    ]


WINDOWS = {
    "the harness's example": (11, 4, [([0, 1, 2, 3, 4], 4), ([4, 5, 6, 7, 8], 4), ([6, 7, 8, 9, 10], 2)]),
    "one window": (4, 8, [([0, 1, 2, 3], 3)]),
    "an exact fit": (5, 4, [([0, 1, 2, 3, 4], 4)]),
    "nothing": (1, 4, []),
}


@pytest.mark.parametrize(("count", "room", "expected"), WINDOWS.values(), ids=WINDOWS.keys())
def test_long_texts_are_scored_window_by_window(count: int, room: int, expected: list[tuple[list[int], int]]) -> None:
    assert windows_of(range(count), room) == expected


def test_continuations_end_at_the_first_stopping_text(speaker: Speaker) -> None:
    scorer, context = Scorer(speaker), "Once upon a"
    (free,) = scorer.generate_until([(context, {"max_gen_toks": 12})])
    assert len(free) == 12
    stop, late = free[5], free[9]
    (short,) = scorer.generate_until([(context, {"max_gen_toks": 12, "until": [late, stop], "temperature": 0.0})])
    assert short == free[: min(free.index(stop), free.index(late))]
    with pytest.raises(ConfigError, match="max_gen_toks 512 leaves no room"):
        scorer.generate_until([(context, {"max_gen_toks": 512})])


# --- the harness itself -----------------------------------------------------------------------------------------------


def test_a_missing_harness_is_told(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'kubetune\[eval\]'"):
        harness.run(HarnessConfig(tasks=["x"]), speaker)


def test_an_unknown_task_is_told_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"harness.tasks: 'hellaswags' is unknown; did you mean hellaswag\?"):
        harness.check_tasks(["hellaswags", "xsum"], ["hellaswag", "xsum"])


TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{messages[0].content}}}}"
doc_to_target: {target}
metric_list: [{{metric: {metric}}}]
"""


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_the_harness_finds_with_us_what_it_finds_with_its_own_model_class(
    tiny: Path, speaker: Speaker, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny)
    theirs, ours = HFLM(their_model(tiny), tokenizer=tokenizer, batch_size=2, device="cpu"), harness.as_lm(speaker)

    def requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]

    asked = requests("loglikelihood", [pair for pair in PAIRS if pair[0]])
    for one, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert one == (pytest.approx(other[0], abs=1e-3), other[1])
    texts = requests("loglikelihood_rolling", [("Some words.",), ("Many words " * 100,)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)
    options = {"until": ["q", "\n"], "max_gen_toks": 10, "do_sample": False}
    open_ended = requests("generate_until", [("Once upon a", options), ("2+3", options)])
    assert ours.generate_until(open_ended) == theirs.generate_until(open_ended)


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_the_harness_runs_a_task_of_ones_own(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    file = data(tmp_path)
    (tmp_path / "tasks").mkdir()
    text = TASK.format(file=file, kind="multiple_choice", metric="acc", target='"{{messages[1].content}}"')
    (tmp_path / "tasks" / "sums.yaml").write_text(text + 'doc_to_choice: ["1.", "2.", "3."]\n')
    options = {"tasks": ["sums"], "limit": 4, "include_path": str(tmp_path / "tasks")}
    found = run(tiny, tmp_path, harness=options)
    assert 0 <= found["tasks"]["sums"]["acc,none"] <= 1
