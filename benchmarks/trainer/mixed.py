"""One epoch over conversations of mixed length: Kubetune's side as `tune run` starts it, and TRL's SFTTrainer.

Either side reads the same file of conversations in its order, renders them with the same template and learns the
answers only. The clock runs from the beginning of the first step to the end of the last one; label tokens of the epoch
divided by that time is the figure. Both run in float32 without recomputation (TRL's defaults, bf16 and recomputation,
are slower on a CPU); the rest is as their users get it.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trainer.work import ALPHA, CLIP, LINEAR, RANK, RATE


@dataclass(frozen=True)
class Epoch:
    """What either side is given."""

    started: float
    """By the harness."""
    model: str
    """A folder in Hugging Face's layout."""
    rows: str
    """The conversations, as JSON Lines."""
    longest: int
    """Tokens of a sequence."""
    batch: int
    """Sequences of a step."""
    packed: bool
    """Whether conversations share sequences."""


class Clock:
    """Of the steps. Ends the process after the last one: checkpoints are measured elsewhere."""

    def __init__(self, result: Path) -> None:
        self._result = result
        self._start = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._start = self._start or time.perf_counter()

    def end(self, labels: int) -> None:
        """The last step has ended; the epoch had so many label tokens."""
        seconds = time.perf_counter() - self._start
        self._result.write_text(json.dumps({"rate": labels / seconds, "labels": labels, "seconds": seconds}))
        os._exit(0)


def ours(epoch: Epoch, result: Path) -> int:
    """The worker of our launcher: a run that is looked at from outside."""
    from kubetune_contract.config import RunConfig
    from kubetune_contract.paths import CACHE_ENV
    from kubetune_trainer import loop, train

    clock = Clock(result)
    module: Any = loop
    step = loop.train_step

    def timed(run: Any, number: int) -> bool:
        clock.begin()
        stop = step(run, number)
        if number + 1 == run.total:
            clock.end(int(run.data.label_counts.sum()))
        return stop

    module.train_step = timed
    os.environ[CACHE_ENV] = str(result.parent / "tokens")
    config = {
        "method": "LoRA",
        "model": {"path": epoch.model},
        "adapter": {"rank": RANK, "alpha": ALPHA, "target_modules": LINEAR},
        "dataset": {
            "path": epoch.rows,
            "max_sequence_length": epoch.longest,
            "packed": epoch.packed,
            "shuffle": False,
        },
        "training": {
            "batch_size": epoch.batch,
            "gradient_accumulation_steps": 1,
            "learning_rate": RATE,
            "max_gradient_norm": CLIP,
            "precision": "FP32",
        },
        "output_dir": str(result.parent / "output"),
    }
    return train.main(RunConfig.model_validate(config))


def trl(epoch: Epoch, result: Path) -> None:
    """The peer."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock, labels = Clock(result), [0]

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == state.max_steps:
                clock.end(labels[0])

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(epoch.model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(result.parent / "output"), num_train_epochs=1, per_device_train_batch_size=epoch.batch,
            learning_rate=RATE, weight_decay=0.01, max_grad_norm=CLIP, max_length=epoch.longest,
            packing=epoch.packed, assistant_only_loss=True, train_sampling_strategy="sequential",
            bf16=False, gradient_checkpointing=False, use_cpu=True,
            report_to=[], disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=load_dataset(
            "json", data_files=epoch.rows, split="train", cache_dir=str(result.parent / "cache")
        ),
        processing_class=AutoTokenizer.from_pretrained(epoch.model),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, task_type="CAUSAL_LM"
        ),
        callbacks=[Steps()],
    )  # fmt: skip
    collate = trainer.data_collator

    def counted(rows: Any) -> Any:
        batch = collate(rows)
        labels[0] += int((batch["labels"] != -100).sum())
        return batch

    trainer.data_collator = counted
    trainer.train()


def main() -> int:
    """`ours | worker | trl`, then what the harness appends."""
    side, (case, result) = sys.argv[1], sys.argv[-2:]
    if side == "ours":
        from kubetune_trainer import launch

        return launch.run([sys.executable, "-m", "benchmarks.trainer.mixed", "worker", case, result], launch.Nodes())
    epoch = Epoch(**json.loads(Path(case).read_text()))
    if side == "worker":
        return ours(epoch, Path(result))
    trl(epoch, Path(result))
    return 1  # the last step ends the process


if __name__ == "__main__":
    sys.exit(main())
