"""Measures what surrounds the steps: packing, tokenization, a second start, checkpoints; and epochs of mixed rows.

    python -m benchmarks.trainer.data [--only CASE] [--quick] [--runs 5]

`--quick` does everything small and records nothing.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from benchmarks import figures
from benchmarks.figures import Figure, Table
from benchmarks.harness import LOAD, Rounds, Side, in_turns
from benchmarks.trainer import conversations, inputs

COMMAND: Final = "python -m benchmarks.trainer.data"
EPOCH_ROWS: Final = 2_000
"""Conversations of the epoch that the mixed cases take a part of."""
MIXED_LONGEST: Final = 1024
"""TRL's default for the tokens of a sequence."""
SMALL_BASE: Final = (1_024, 512)
LARGE_BASE: Final = (128_256, 8_192)
"""Vocabulary and width of the MLP: 35 and 354 million parameters."""


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    runs: int
    packed: int = 50_000
    tokenized: int = 2_000
    cached: int = 100_000
    mixed: int = 16
    """Conversations of the part of the epoch."""
    base: tuple[int, int] = LARGE_BASE
    """Of the larger model."""
    quick: bool = False


class Found:
    """What the cases have measured."""

    def __init__(self) -> None:
        self.figures: dict[str, Figure] = {}
        self.tables: dict[str, Table] = {}


# --- packing ----------------------------------------------------------------------------------------------------------


def packing(sizes: Sizes, found: Found, _folder: Path) -> None:
    """Best-fit decreasing over lengths as chats have them, and TRL's over the same."""
    from kubetune_trainer.packing import pack

    command, load = f"{COMMAND} --only packing", LOAD.now()
    lengths = conversations.draw_lengths(sizes.packed, 300, 2048)
    rows = 0
    seconds = []
    for _ in range(2 * sizes.runs + 1):
        start = time.perf_counter()
        rows = len(pack(lengths, 2048)[1]) - 1
        seconds.append(time.perf_counter() - start)
    fill = [100 * lengths.sum() / (rows * 2048)]
    found.figures["packing-time"] = figures.figure(seconds[1:], load=load, command=command)
    found.figures["packing-fill"] = figures.figure(fill, load=load, command=command)
    table = [("Kubetune", f"{statistics.median(seconds[1:]):.3f}", f"{fill[0]:.2f}")]
    for name, batch in (("TRL, 1,000 samples at a time (default)", 1_000), ("TRL, all at once", len(lengths))):
        taken, full = _pack_with_trl(lengths, batch, sizes.runs)
        table.append((f"{name} {version('trl')}", f"{taken:.3f}", f"{full:.2f}"))
    found.tables["packing"] = Table(
        title=f"Packing of {len(lengths):,} samples into sequences of 2,048 tokens",
        note="Lengths are log-normal with a median of 300 tokens. TRL's `pack_dataset` also writes the tokens in their "
        "new order; Kubetune's rows stay where they are, memory-mapped, and are gathered when a batch is made.",
        columns=("", "seconds", "room used, %"),
        rows=tuple(table),
        command=command,
    )


def _pack_with_trl(lengths: npt.NDArray[np.int32], batch: int, runs: int) -> tuple[float, float]:
    """Seconds, and % of the room that is used."""
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import pack_dataset

    disable_progress_bars()
    data = Dataset.from_dict({"input_ids": [[1] * length for length in lengths.tolist()]})
    seconds, rows = [], 0
    for _ in range(runs):
        start = time.perf_counter()
        options = {"batch_size": batch, "load_from_cache_file": False}
        rows = len(pack_dataset(data, 2048, "bfd", map_kwargs=options))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), 100 * lengths.sum() / (rows * 2048)


# --- tokenization and the second start --------------------------------------------------------------------------------


def tokenization(sizes: Sizes, found: Found, folder: Path) -> None:
    """Conversations to tokens with their loss mask, beside two ways of transformers' users."""
    case = {
        "model": str(conversations.marked(inputs.SMOLLM2, folder / "model")),
        "rows": str(
            conversations.write(folder / "tokenized.jsonl", conversations.draw_lengths(sizes.tokenized, 300, 2048))
        ),
    }
    names = {
        "tokenize-ours": "Kubetune",
        "tokenize-rows": "`apply_chat_template` with the mask, row by row, as TRL does",
        "tokenize-batches": "`apply_chat_template` and the tokenizer over batches, no mask",
    }
    rounds = _rounds([_side(name, case) for name in names], sizes)
    found.tables["tokenization"] = Table(
        title=f"Tokenization of {sizes.tokenized:,} conversations",
        note="Rendering, tokenizing and writing to the disk, all cores; the peers with transformers "
        f"{version('transformers')} in `datasets.map` {version('datasets')}, one process.",
        columns=("", "rows/s", "tokens/s"),
        rows=tuple(
            (label, f"{rounds.median(name, 'rows'):,.0f}", f"{rounds.median(name, 'tokens'):,.0f}")
            for name, label in names.items()
        ),
        command=f"{COMMAND} --only tokenization",
    )


def second_start(sizes: Sizes, found: Found, folder: Path) -> None:
    """From the beginning of the data's preparation to a packed dataset whose tokens an earlier run has left."""
    rows = conversations.write(folder / "cached.jsonl", conversations.draw_lengths(sizes.cached, 100, 2048))
    case = {
        "model": str(conversations.marked(inputs.SMOLLM2, folder / "model")),
        "rows": str(rows),
        "cache": str(folder / "tokens"),
    }
    rounds = _rounds([_side("second-start", case)], sizes)  # the first one, thrown away, tokenizes
    found.figures["second-start"] = rounds.figure("seconds", "second-start", command=f"{COMMAND} --only second-start")


def _side_second_start(case: Mapping[str, Any], _folder: Path) -> dict[str, float]:
    from kubetune_contract.config import RunConfig
    from kubetune_trainer.data import load_data
    from kubetune_trainer.tokenizer import Tokenizer

    config = RunConfig.model_validate(
        {
            "method": "LoRA",
            "model": {"path": case["model"]},
            "dataset": {"path": case["rows"], "packed": True},
            "output_dir": case["cache"],
        }
    )
    start = time.perf_counter()
    data = load_data(config, Tokenizer.from_folder(Path(case["model"])), Path(case["cache"]), {}).training
    data.batch(range(min(2, len(data))))
    assert min(data.label_counts.min(), data.lengths.min()) > 0, "no row is empty"
    return {"seconds": time.perf_counter() - start, "rows": len(data)}


def _side_tokenize_ours(case: Mapping[str, Any], folder: Path) -> dict[str, float]:
    from kubetune_contract.dataset import DatasetConfig
    from kubetune_trainer.data import load_parts
    from kubetune_trainer.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(Path(case["model"]))
    start = time.perf_counter()
    (part,) = load_parts(DatasetConfig(path=case["rows"]), tokenizer, folder / "tokens", {})
    return _speed(start, len(part.chosen), len(part.documents.ids))


def _side_tokenize_rows(case: Mapping[str, Any], folder: Path) -> dict[str, float]:
    tokenizer, rows = _peer_data(case, folder)

    def tokenize(row: Mapping[str, Any]) -> dict[str, Any]:
        made = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {key: made[key] for key in ("input_ids", "assistant_masks")}

    start = time.perf_counter()
    made = rows.map(tokenize, remove_columns=rows.column_names)
    return _speed(start, len(made), _count(made))


def _side_tokenize_batches(case: Mapping[str, Any], folder: Path) -> dict[str, float]:
    tokenizer, rows = _peer_data(case, folder)

    def tokenize(batch: Mapping[str, Any]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    start = time.perf_counter()
    made = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    return _speed(start, len(made), _count(made))


def _peer_data(case: Mapping[str, Any], folder: Path) -> tuple[Any, Any]:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    rows = load_dataset("json", data_files=case["rows"], split="train", cache_dir=str(folder / "cache"))
    return AutoTokenizer.from_pretrained(case["model"]), rows


def _count(made: Any) -> int:
    return sum(map(len, made["input_ids"]))


def _speed(start: float, rows: int, tokens: int) -> dict[str, float]:
    seconds = time.perf_counter() - start
    return {"rows": rows / seconds, "tokens": tokens / seconds}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints(sizes: Sizes, found: Found, folder: Path) -> None:
    """The same adapter on a small and a ten times larger base, saved in turns; peft beside the larger one."""
    from benchmarks.trainer import adapters

    command, load = f"{COMMAND} --only checkpoints", LOAD.now()
    small, large = (
        adapters.Ours(adapters.base(*base), folder / name)
        for name, base in (("small", SMALL_BASE), ("large", sizes.base))
    )
    assert small.trained == large.trained, "both train the same number of parameters"
    saves: dict[str, list[float]] = {"small": [], "large": []}
    for number in range(4 * sizes.runs + 1):
        for name, side in (("small", small), ("large", large)) if number % 2 else (("large", large), ("small", small)):
            saves[name].append(side.save())
    found.figures["adapter-save"] = figures.figure(
        saves["large"][1:], saves["small"][1:], load=load, command=command,
        peer_name=f"ours, base of {small.frozen / 1e6:.0f}M instead of {large.frozen / 1e6:.0f}M",
    )  # fmt: skip
    mine = {"save": saves["large"][1:], **large.times(2 * sizes.runs)}
    del small, large
    theirs = adapters.Peft(adapters.base(*sizes.base), folder / "peft").times(2 * sizes.runs)
    labels = {
        "save": "save for resuming: adapter and AdamW's state",
        "load": "load both again",
        "export": "write the adapter for users",
    }
    found.tables["checkpoints"] = Table(
        title="Checkpoints of an adapter",
        note="Rank 64 on the attention's layers. Kubetune brings every file to the disk (fsync) before it gives it its "
        "name; peft's `save_pretrained` and `torch.save`, as transformers' Trainer uses them, do not.",
        columns=("seconds", "Kubetune", f"peft {version('peft')}"),
        rows=tuple(
            (label, f"{statistics.median(mine[key]):.3f}", f"{statistics.median(theirs[key]):.3f}")
            for key, label in labels.items()
        ),
        command=command,
    )


# --- epochs -----------------------------------------------------------------------------------------------------------


def mixed(sizes: Sizes, found: Found, folder: Path) -> None:
    """Ragged batches beside TRL's padded ones: 8 conversations a step."""
    _epochs("mixed", sizes, found, folder, batch=8, packed=False)


def mixed_packed(sizes: Sizes, found: Found, folder: Path) -> None:
    """Either side packs: 2 sequences of 1,024 tokens a step."""
    _epochs("mixed-packed", sizes, found, folder, batch=2, packed=True)


def _epochs(key: str, sizes: Sizes, found: Found, folder: Path, *, batch: int, packed: bool) -> None:
    case: dict[str, Any] = {"longest": MIXED_LONGEST, "batch": batch, "packed": packed}
    case |= {"model": str(conversations.marked("56M", folder / "model"))}
    epoch = conversations.draw_lengths(EPOCH_ROWS, 200, MIXED_LONGEST)
    for name, count in (("mixed", sizes.mixed), ("warm-up", 8)):
        conversations.write(folder / f"{name}.jsonl", conversations.like(epoch, count))
    sides = [
        Side(
            name,
            [sys.executable, "-m", "benchmarks.trainer.mixed", name],
            case | {"rows": str(folder / "mixed.jsonl")},
            warm_up={"rows": str(folder / "warm-up.jsonl")},
        )
        for name in ("ours", "trl")
    ]
    rounds = _rounds(sides, sizes)
    labels = {name: set(rounds.values(name, "labels")) for name in ("ours", "trl")}
    assert labels["ours"] == labels["trl"], f"both sides learn the same tokens: {labels}"
    name = f"TRL {version('trl')}{', packing' if packed else ''}"
    found.figures[key] = rounds.figure("rate", "ours", "trl", command=f"{COMMAND} --only {key}", peer_name=name)


# --- the command ------------------------------------------------------------------------------------------------------

CASES: Final[Mapping[str, Callable[[Sizes, Found, Path], None]]] = {
    "packing": packing,
    "tokenization": tokenization,
    "second-start": second_start,
    "checkpoints": checkpoints,
    "mixed": mixed,
    "mixed-packed": mixed_packed,
}
SIDES: Final[Mapping[str, Callable[[Mapping[str, Any], Path], dict[str, float]]]] = {
    "second-start": _side_second_start,
    "tokenize-ours": _side_tokenize_ours,
    "tokenize-rows": _side_tokenize_rows,
    "tokenize-batches": _side_tokenize_batches,
}
QUICK: Final = Sizes(
    runs=1,
    packed=2_000,
    tokenized=200,
    cached=500,
    mixed=8,
    base=(4_096, 1_024),
    quick=True,
)


def _side(name: str, case: Mapping[str, Any]) -> Side:
    return Side(name, [sys.executable, "-m", "benchmarks.trainer.data", "--side", name], case)


def _rounds(sides: list[Side], sizes: Sizes) -> Rounds:
    return in_turns(sides, sizes.runs, allowed=1.0) if sizes.quick else in_turns(sides, sizes.runs)


def _run_side(name: str, case: Path, result: Path) -> None:
    values = SIDES[name](json.loads(case.read_text()), result.parent)
    result.write_text(json.dumps(values))


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append", help="this case; may come again")
    parser.add_argument("--quick", action="store_true", help="everything small; nothing is recorded")
    parser.add_argument("--runs", type=int, default=5, help="of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("files", type=Path, nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        _run_side(options.side, *options.files)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    sizes = QUICK if options.quick else Sizes(runs=options.runs)
    for name in options.only or CASES:
        print(f"--- {name}", file=sys.stderr, flush=True)
        found = Found()
        with tempfile.TemporaryDirectory(prefix="kubetune-bench-") as folder:
            CASES[name](sizes, found, Path(folder))
        for key, one in found.figures.items():
            print(f"{key}: {one.ours:.4g}" + (f" against {one.peer:.4g}, {one.ratio:.3f}x" if one.ratio else ""))
        for table in found.tables.values():
            print("\n".join([table.title, *("  ".join(row) for row in table.rows)]), flush=True)
        if not options.quick:
            figures.record("trainer", found.figures, found.tables)


if __name__ == "__main__":
    main()
