"""Kubetune's side: the launcher as `tune run` starts it, and in its worker a run that is looked at from outside."""

import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.trainer.work import ALPHA, CLIP, LINEAR, RANK, RATE, Probe, Work

from kubetune_contract.paths import CACHE_ENV


def config(work: Work, output: Path) -> dict[str, Any]:
    """The RunConfig."""
    adapter = {"rank": RANK, "alpha": ALPHA, "target_modules": LINEAR}
    masters = (
        {"master_weights": "BF16"} if (work.method, work.precision) == ("Full", "BF16") else {}
    )  # as the peers have
    data = {"format": "OpenAI"} if work.chat else {"format": "Completion", "shuffle": False}
    return {
        "method": work.method,
        "model": {"path": work.model},
        # A row of n + 1 tokens has n inputs, each with its next token.
        "dataset": {"path": work.texts, "max_sequence_length": work.length + 1, **data},
        "training": {
            "epochs": 10000,
            "max_steps": work.steps,
            "batch_size": work.batch,
            "gradient_accumulation_steps": 1,
            "learning_rate": RATE,
            "max_gradient_norm": CLIP,
            "precision": work.precision,
            "activation_checkpointing": "Full" if work.recompute else "None",
            **masters,
        },
        "output_dir": str(output / "output"),
    } | ({} if work.method == "Full" else {"adapter": adapter})


def worker() -> int:
    """The run."""
    from kubetune_contract.config import RunConfig
    from kubetune_trainer import loop, train

    work, result = Work.read()
    probe = Probe(work, result)
    modules: tuple[Any, Any] = train, loop
    build, step = modules[0].build, modules[1].train_step

    def noted_build(*arguments: Any) -> Any:
        probe.before_model()
        return build(*arguments)

    def noted_step(run: Any, number: int) -> Any:
        stop = step(run, number)
        probe.step(run.reporter.metrics.last_loss())
        return stop

    modules[0].build, modules[1].train_step = noted_build, noted_step
    os.environ[CACHE_ENV] = str(result.parent / "tokens")
    return train.main(RunConfig.model_validate(config(work, result.parent)))


def main() -> int:
    """The launcher and, started by it, the worker."""
    if "--worker" in sys.argv:
        return worker()
    from kubetune_trainer import launch

    command = [sys.executable, "-m", "benchmarks.trainer.ours", "--worker", *sys.argv[1:]]
    return launch.run(command, launch.Nodes())


if __name__ == "__main__":
    sys.exit(main())
