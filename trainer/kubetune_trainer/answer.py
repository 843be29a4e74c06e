"""The task `generate`: one answer to one prompt, with its speed."""

import sys
import time

from kubetune_contract.exit_codes import ExitCode
from kubetune_trainer.generate import Sampling, sampler
from kubetune_trainer.inference import load
from kubetune_trainer.task_config import GenerationConfig, PromptConfig
from kubetune_trainer.tokenizer import Tokenizer


def run(config: GenerationConfig) -> int:
    """Prints the answer, and on standard error how fast it came. Raises JobError."""
    speaker = load(config.model)
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    choose = sampler(sampling, config.seed, speaker.world.device)
    started = time.perf_counter()
    prompt = _tokens(config.prompt, speaker.tokenizer)
    answer = speaker.answer(prompt, config.max_new_tokens, choose)
    seconds = time.perf_counter() - started
    print(speaker.tokenizer.decode(answer).strip(), flush=True)
    print(f"{len(answer)} tokens in {seconds:.2f} s, {len(answer) / seconds:.1f} tokens/s", file=sys.stderr)
    return ExitCode.DONE


def _tokens(prompt: PromptConfig, tokenizer: Tokenizer) -> list[int]:
    if prompt.text is not None:
        return tokenizer.encode_text(prompt.text)
    turns = {"system": prompt.system, "user": prompt.user}
    messages = [{"role": role, "content": content} for role, content in turns.items() if content is not None]
    return tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
