"""How long a LoRA run takes from its start to the end of its first step, and what is in memory before the model is.

Kubetune's trainer and its peer (transformers + peft + TRL) run in turns, each in a fresh process, on the same model,
the same rows and the same settings. One step of one short row: nearly all of the time is start-up. A table goes to
stdout.

    python benchmarks/trainer/startup.py --model DIR [--runs 5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

ROWS: Final = 8
ANSWER: Final = "The capital of France is Paris. It lies on the Seine and has two million inhabitants."
TARGETS: Final = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RESULT: Final = "STARTUP_RESULT "


def resident_mib() -> float:
    """Resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def tell(before_model: float) -> None:
    """The child's result: called when the first step is done."""
    print(RESULT + json.dumps({"resident": before_model, "at": time.time()}), flush=True)


def ours(model: Path, data: Path, output: Path) -> None:
    """Kubetune's trainer; the two places are looked at from outside, the run is as it is."""
    from kubetune_contract.config import RunConfig
    from kubetune_trainer import loop, train

    before: list[float] = []
    build, step = train.build, loop.train_step

    def noted_build(*arguments: Any) -> Any:
        before.append(resident_mib())
        return build(*arguments)

    def noted_step(run: Any, *arguments: Any) -> bool:
        stop = step(run, *arguments)
        tell(before[0])
        return stop

    train.build, loop.train_step = noted_build, noted_step
    config = {
        "method": "LoRA",
        "model": {"path": str(model)},
        "adapter": {"rank": 16, "alpha": 32, "target_modules": TARGETS},
        "dataset": {"path": str(data), "format": "OpenAI", "max_sequence_length": 256},
        "training": {
            "epochs": 1,
            "max_steps": 1,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "precision": "FP32",
        },
        "output_dir": str(output),
    }
    sys.exit(train.main(RunConfig.model_validate(config)))


def peers(model: Path, data: Path, output: Path) -> None:
    """The same with TRL's SFTTrainer and peft, on the CPU in float32."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=str(data), split="train", cache_dir=str(output / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = resident_mib()

    class FirstStep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            tell(before)

    settings = SFTConfig(
        output_dir=str(output), max_steps=1, per_device_train_batch_size=1, max_length=256, report_to=[],
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[FirstStep()],
    ).train()


def measure(side: str, model: Path) -> tuple[float, float]:
    """Seconds until the first step, and MiB before the model, of one fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        turns = [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": ANSWER},
        ]
        data.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(ROWS)))
        output = Path(folder) / "output"
        output.mkdir()
        command = [sys.executable, __file__, "--side", side, "--model", str(model), "--folder", folder]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        started = time.time()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not lines:
        sys.exit(f"{side} failed:\n{done.stdout}\n{done.stderr}")
    told = json.loads(lines[0].removeprefix(RESULT))
    return told["at"] - started, told["resident"]


def main() -> None:
    """Run both sides in turns and print the medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="a Hugging Face folder, such as SmolLM2-135M-Instruct"
    )
    parser.add_argument("--runs", type=int, default=5, help="of each side")
    parser.add_argument("--side", choices=("ours", "peers"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side = ours if options.side == "ours" else peers
        side(options.model, options.folder / "rows.jsonl", options.folder / "output")
        return
    sides = ("ours", "peers")
    for side in sides:
        measure(side, options.model)  # the first run of each fills the page cache
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(options.runs):
        for side in sides:
            found[side].append(measure(side, options.model))
            seconds, resident = found[side][-1]
            print(f"{side:5}  {seconds:6.2f} s  {resident:6.0f} MiB  load {os.getloadavg()[0]:.1f}", flush=True)
    for name, column, unit in (("until the first step", 0, "s"), ("resident before the model", 1, "MiB")):
        own, other = (statistics.median(row[column] for row in found[side]) for side in sides)
        print(f"{name}: {own:.2f} {unit} against {other:.2f} {unit}, ratio {own / other:.3f}")


if __name__ == "__main__":
    main()
