"""EleutherAI's lm-evaluation-harness, through its own model interface. It is imported only when it is asked for."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from kubetune_contract.errors import ConfigError
from kubetune_trainer.generate import Sampling, generate, sampler
from kubetune_trainer.inference import Speaker
from kubetune_trainer.model import IGNORE
from kubetune_trainer.task_config import HarnessConfig

_BATCH_TOKENS: Final = 2048
"""Most tokens of a forward pass, if one request is not longer: their logits are held, 0.5 GB for Llama 3 in bf16."""
_GENERATED_TOKENS: Final = 256
"""Longest answer where a task says nothing: the harness's own default."""
_SEED: Final = 0


class Scored(NamedTuple):
    """What is asked about one sequence: how probable its last tokens are."""

    tokens: list[int]
    """What the model sees, all but the last of them, and what it is to say, all but the first."""
    scored: int
    """The last so many tokens are scored."""


class Scorer:
    """The three questions that the harness asks. Log-likelihoods are natural logarithms.

    A text is tokenized as the model expects it; where nothing stands before the first word, the token that begins a
    sequence does.
    """

    def __init__(self, speaker: Speaker, batch_tokens: int = _BATCH_TOKENS) -> None:
        self._speaker, self._batch_tokens = speaker, batch_tokens
        self._encode = speaker.tokenizer.encode

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the continuation's log-likelihood, and whether greedy decoding gives it."""
        return self._score([self._pair(context, continuation) for context, continuation in pairs])

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Of each whole text. A text longer than the model's positions is scored window by window."""
        start, room = self._speaker.tokenizer.start_id, self._speaker.positions
        windows = [windows_of([start, *self._encode(text)], room) for text in texts]
        scores = iter(self._score([window for of_text in windows for window in of_text]))
        return [sum((next(scores)[0] for _ in of_text), 0.0) for of_text in windows]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Continuations, each up to one of its stopping texts (`until`) or `max_gen_toks` tokens."""
        return [self._generate(context, options) for context, options in requests]

    def _pair(self, context: str, continuation: str) -> Scored:
        """The cut is where the context's own tokens end; blanks at its end belong to what follows them."""
        bare, encode = context.rstrip(), self._speaker.tokenizer.encode_text
        if bare:
            whole, head = encode(context + continuation), len(encode(bare))
        else:
            whole, head = [self._speaker.tokenizer.start_id, *self._encode(context + continuation)], 1
        return Scored(whole[-self._speaker.positions - 1 :], len(whole) - head)

    def _score(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        results: dict[int, tuple[float, bool]] = {}
        by_length = sorted(range(len(requests)), key=lambda number: -len(requests[number].tokens))
        for batch in self._batches(by_length, requests):
            results |= zip(batch, self._forward([requests[number] for number in batch]), strict=True)
        return [results[number] for number in range(len(requests))]

    def _batches(self, order: Sequence[int], requests: Sequence[Scored]) -> Iterator[list[int]]:
        batch: list[int] = []
        tokens = 0
        for number in order:
            tokens += len(requests[number].tokens)
            if batch and tokens > self._batch_tokens:
                yield batch
                batch, tokens = [], len(requests[number].tokens)
            batch.append(number)
        if batch:
            yield batch

    @torch.no_grad()
    def _forward(self, batch: Sequence[Scored]) -> list[tuple[float, bool]]:
        """One ragged row of all requests."""
        device = self._speaker.world.device
        inputs = [token for request in batch for token in request.tokens[:-1]]
        lengths = [len(request.tokens) - 1 for request in batch]
        targets = [token for request in batch for token in _targets(request)]
        wanted = torch.tensor(targets, device=device)
        logits = self._speaker.model(torch.tensor([inputs], device=device), lengths=lengths)[0]
        chosen = wanted != IGNORE
        logits, wanted = logits[chosen].float(), wanted[chosen]
        scores = logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
        best = logits.argmax(dim=-1) == wanted
        counts = [min(request.scored, length) for request, length in zip(batch, lengths, strict=True)]
        return [(float(s.sum()), bool(b.all())) for s, b in zip(scores.split(counts), best.split(counts), strict=True)]

    def _generate(self, context: str, options: Mapping[str, Any]) -> str:
        speaker = self._speaker
        limit = int(options.get("max_gen_toks", _GENERATED_TOKENS))
        room = speaker.positions - limit
        if room < 1:
            raise ConfigError([f"harness: max_gen_toks {limit} leaves no room for a question: lower it"])
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)

        def is_done(answer: list[int]) -> bool:
            text = speaker.tokenizer.decode(answer)
            return any(stop in text for stop in stops)

        tokens = (speaker.tokenizer.encode_text(context) or [speaker.tokenizer.start_id])[-room:]
        choose = sampler(_sampling(options), _SEED, speaker.world.device)
        stop_ids = speaker.tokenizer.stop_ids
        answer = generate(speaker.model, tokens, limit, stop_ids, speaker.world, choose=choose, is_done=is_done)
        text = speaker.tokenizer.decode(answer)
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _targets(request: Scored) -> list[int]:
    """The next token of each position, IGNORE where it is not scored."""
    following = request.tokens[1:]
    ignored = max(0, len(following) - request.scored)
    return [IGNORE] * ignored + following[ignored:]


def _sampling(options: Mapping[str, Any]) -> Sampling:
    temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
    return Sampling(temperature, options.get("top_k"), options.get("top_p"))


def windows_of(tokens: Sequence[int], room: int) -> list[Scored]:
    """Every token after the first, scored once: in windows of `room` inputs, the last with all context it can have."""
    windows = []
    done = 1
    while done < len(tokens):
        end = min(done + room, len(tokens))
        windows.append(Scored(list(tokens[max(0, end - room - 1) : end]), end - done))
        done = end
    return windows


def run(config: HarnessConfig, speaker: Speaker) -> dict[str, dict[str, float]]:
    """Task -> metric -> value. Raises ConfigError where the harness or a task is missing."""
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            [f"harness: lm-evaluation-harness is missing ({error}): pip install 'kubetune[eval]'"]
        ) from error
    manager = TaskManager(include_path=_include(config))
    check_tasks(config.tasks, manager.all_tasks)
    found = simple_evaluate(
        model=as_lm(speaker),
        tasks=list(config.tasks),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.chat_template,
        task_manager=manager,
        log_samples=False,
    )
    numbers = found["results"].items()
    return {task: {k: v for k, v in metrics.items() if isinstance(v, int | float)} for task, metrics in numbers}


def as_lm(speaker: Speaker) -> Any:
    """The speaker as lm_eval's `LM`."""
    from lm_eval.api.model import LM

    scorer = Scorer(speaker)

    class KubetuneLM(LM):  # type: ignore[misc]  # lm_eval has no types
        """Passes on the arguments of the harness's requests."""

        tokenizer_name = "kubetune"

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002
            """As Scorer's."""
            return scorer.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
            """As Scorer's."""
            return scorer.loglikelihood_rolling([text for (text,) in (request.args for request in requests)])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
            """As Scorer's."""
            return scorer.generate_until([request.args for request in requests])

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """A conversation as the model's template renders it."""
            return speaker.tokenizer.render(chat_history, add_generation_prompt)

    return KubetuneLM()


def _include(config: HarnessConfig) -> str | None:
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise ConfigError([f"harness.include_path: there is no folder {config.include_path}"])
    return config.include_path


def check_tasks(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ConfigError for a task that is not known."""
    problems = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            problems.append(f"harness.tasks: {name!r} is unknown; {hint}")
    if problems:
        raise ConfigError(problems)
