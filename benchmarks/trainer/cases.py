"""The cases of the trainer's benchmark: who runs against whom on what, and the figures that come of it."""

import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.figures import ROOT, Figure, Table, figure
from benchmarks.harness import Rounds, Side
from benchmarks.trainer import inputs
from benchmarks.trainer.limit import Shape, step_flops
from benchmarks.trainer.work import Work

from kubetune_trainer.launch import MALLOC_SETTINGS

OURS, OURS_BF16, LIMIT = "Kubetune", "Kubetune, bf16", "matrix products"
PEFT, TRL, TORCHTUNE = "transformers + peft", "TRL", "torchtune"
MALLOC: Final = ", our malloc settings"
BF16: Final = ", bf16"
_WARM_UP: Final = {"batch": 1, "length": 16, "steps": 1}
"""Enough to have every file in the page cache."""
_LOSS_TOLERANCE: Final = 0.03
"""Of the first loss between sides: number formats and two kinds of NF4 differ by less, another batch by more."""


@dataclass(frozen=True)
class Options:
    """How the command was called."""

    torchtune: Path
    """The Python that has it."""
    quick: bool
    bf16: bool
    """Whether this machine has instructions that multiply bf16."""


@dataclass(frozen=True)
class Plan:
    """One case."""

    key: str
    title: str
    model: str
    work: Mapping[str, Any]
    """What is not `Work`'s default."""
    sides: tuple[str, ...]
    figures: Callable[["Outcome"], dict[str, Figure]]
    minutes: float
    """On two quiet cores, with five runs."""
    gpu: bool = False
    once: bool = False
    """Measured once, because it takes so long: no figure of it counts."""
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a case's rounds found."""

    plan: Plan
    work: Work
    rounds: Rounds
    command: str

    def figure(self, key: str, ours: str, peer: str) -> Figure:
        """Of one side beside another."""
        name = "Kubetune, fp32" if peer == OURS else versions(peer)
        return self.rounds.figure(key, ours, peer, command=self.command, peer_name=name)

    @property
    def gflops(self) -> float:
        """What the model needs for a step."""
        return step_flops(Shape.read(Path(self.work.model)), self.work) / 1e9

    def limit(self) -> float | None:
        """GFLOP/s of the machine's matrix products, where they were measured."""
        name = next((name for name in self.rounds.samples if name.startswith(LIMIT)), None)
        return None if name is None else self.rounds.median(name, "gflops")

    def best(self, key: str, side: str) -> str:
        """The side's number format with the highest median."""
        found = [name for name in (side, side + BF16) if name in self.rounds.samples]
        return max(found, key=lambda name: self.rounds.median(name, key))


def work_of(plan: Plan, options: Options) -> Work:
    """The work; made short for --quick."""
    folder = inputs.model("56M" if options.quick and not plan.gpu else plan.model)
    tokens, texts = inputs.rows(folder)
    work = Work(str(folder), str(tokens), str(texts), 0.0, **plan.work)
    if work.chat:
        work = replace(work, texts=str(inputs.chats()))
    return replace(work, length=min(work.length, 128)) if options.quick else work


def side_of(name: str, work: Work, options: Options) -> Side:
    """One of the sides by its name: a program, a number format, an environment."""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'trainer'}", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if MALLOC in name:
        environment |= MALLOC_SETTINGS
    if BF16 in name:
        work = replace(work, precision="BF16")
    module, python, extra = {
        OURS: ("ours", sys.executable, []),
        PEFT: ("transformers_side", sys.executable, []),
        TRL: ("transformers_side", sys.executable, ["--trl"]),
        TORCHTUNE: ("torchtune_side", str(options.torchtune), []),
        LIMIT: ("limit", sys.executable, []),
    }[program(name)]
    case = {key: value for key, value in vars(work).items() if key != "started"}
    warm_up = {"batch": 1, "steps": 1} if work.chat else _WARM_UP
    return Side(name, [python, "-m", f"benchmarks.trainer.{module}", *extra], case, environment, warm_up)


def program(side: str) -> str:
    """A side's name without its number format and environment."""
    return side.partition(",")[0]


def check_same(rounds: Rounds) -> None:
    """Raises ValueError where the first losses say that the sides did not do the same."""
    losses = {name: rounds.median(name, "loss") for name, found in rounds.samples.items() if "loss" in found[0].values}
    if losses and max(losses.values()) > min(losses.values()) * (1 + _LOSS_TOLERANCE):
        raise ValueError(f"the sides have other first losses, so they did other work: {losses}")


def versions(side: str) -> str:
    """The peer's name with the versions of its packages."""
    _, _, rest = side.partition(",")
    if program(side) == TORCHTUNE:
        named = " + ".join(requirement.replace("==", " ") for requirement in inputs.TORCHTUNE[:2])
    else:
        packages = ["transformers", "peft", *(["trl"] if program(side) == TRL else [])]
        named = " + ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return f"{named},{rest}" if rest else named


# --- the figures ---


def _nothing(_: Outcome) -> dict[str, Figure]:
    return {}


def _rate(key: str) -> Callable[[Outcome], dict[str, Figure]]:
    """Tokens/s beside the fastest peer, each in its best number format."""

    def figures(found: Outcome) -> dict[str, Figure]:
        ours, peer = found.best("rate", OURS), found.best("rate", PEFT)
        return {key: found.figure("rate", ours, peer)}

    return figures


def _lora(found: Outcome) -> dict[str, Figure]:
    """Also the share of the matrix products' limit, round by round."""
    pairs = zip(found.rounds.values(OURS, "step"), found.rounds.values(LIMIT, "gflops"), strict=True)
    shares = [100 * found.gflops / step / limit for step, limit in pairs]
    share = figure(shares, load=found.rounds.load, command=found.command)
    return {"lora-gemm": share, **_rate("lora")(found)}


def _bf16(found: Outcome) -> dict[str, Figure]:
    return {"bf16": found.figure("step", OURS_BF16, OURS)}


def _memory(found: Outcome) -> dict[str, Figure]:
    return {"memory": found.figure("peak", OURS, PEFT)}


def _startup(found: Outcome) -> dict[str, Figure]:
    return {
        "startup": found.figure("startup", OURS, TRL),
        "startup-memory": found.figure("resident", OURS, TRL),
    }


def table(found: Outcome, *, peak: float | None = None) -> Table:
    """All that was measured of each side. `peak`: the data sheet's GFLOP/s of the device."""
    rounds, work, limit = found.rounds, found.work, found.limit()
    runs = len(next(iter(rounds.samples.values())))
    disturbed = {0: "", 1: "; 1 disturbed round was made again"}.get(
        rounds.rejected, f"; {rounds.rejected} disturbed rounds were made again"
    )
    parts = [
        f"Batches of {work.batch} x {work.length} tokens, {work.steps} steps, the first not timed"
        if work.steps > 1
        else f"One step of {work.batch} x {work.length} tokens",
        f"; {'measured once' if runs == 1 else f'medians of {runs}'}{disturbed}.",
        f" Peak memory is the {'GPU' if found.plan.gpu else 'process'}'s. GFLOP/s count what the model needs.",
        f" The machine's matrix products of the same shapes reach {limit:,.0f} GFLOP/s." if limit else "",
        f" The data sheet says {peak:,.0f} GFLOP/s." if peak else "",
        f" {found.plan.note}" if found.plan.note else "",
    ]
    names = [name for name in rounds.samples if not name.startswith(LIMIT)]
    ours = next((name for name in names if name.startswith(OURS)), names[0])
    columns = ["side", "tokens/s", "Kubetune's divided by it", "peak memory, MiB", "first step after, s", "GFLOP/s"]
    columns += ["share of the products"] if limit else []
    columns += ["MFU"] if peak else []
    return Table(
        title=found.plan.title,
        note="".join(parts),
        columns=tuple(columns),
        rows=tuple(_row(found, name, ours, limit, peak) for name in names),
        command=found.command,
    )


def _row(found: Outcome, name: str, ours: str, limit: float | None, peak: float | None) -> tuple[str, ...]:
    rounds = found.rounds
    of_step = ["", "", ""]
    shares = [""] * ((limit is not None) + (peak is not None))
    if "rate" in rounds.samples[name][0].values:
        rate, gflops = rounds.median(name, "rate"), found.gflops / rounds.median(name, "step")
        of_step = [f"{rate:,.0f}", f"{rounds.median(ours, 'rate') / rate:.2f}", f"{gflops:,.0f}"]
        shares = [f"{gflops / whole:.0%}" for whole in (limit, peak) if whole is not None]
    memory, start = f"{rounds.median(name, 'peak'):,.0f}", f"{rounds.median(name, 'startup'):.1f}"
    return (name, *of_step[:2], memory, start, of_step[2], *shares)


def _gpu(key: str) -> Callable[[Outcome], dict[str, Figure]]:
    """Tokens/s of an 8B shape on a GPU, in bf16."""

    def figures(found: Outcome) -> dict[str, Figure]:
        return {key: found.figure("rate", OURS_BF16, PEFT + BF16)}

    return figures


# --- the plans ---

_START: Final = {"batch": 1, "length": 256, "steps": 1, "chat": True}

_SMALL: Final = "56M"
_GPU_SIDES: Final = (OURS_BF16, PEFT + BF16, TORCHTUNE + BF16, LIMIT + BF16)
_GPU_WORK: Final = {"batch": 2, "length": 2048, "steps": 6}
_FULL: Final = {"method": "Full"}
_QLORA: Final = {"method": "QLoRA"}
_TINY: Final = {"batch": 1, "length": 32}
_SLOW: Final = "The batch is so small because bf16 takes that long where there are no instructions for it."

PLANS: Final = (
    Plan("smollm2", "SmolLM2-135M, LoRA", inputs.SMOLLM2, {}, (OURS, PEFT, LIMIT), _lora, 8.5),
    Plan("lora", "56M shape, LoRA", _SMALL, {}, (OURS, PEFT, PEFT + MALLOC, TORCHTUNE), _nothing, 8),
    Plan("full", "56M shape, full", _SMALL, _FULL, (OURS, PEFT), _rate("full"), 4.5),
    Plan("qlora", "56M shape, QLoRA", _SMALL, _QLORA, (OURS, PEFT), _rate("qlora"), 4),
    Plan("full-once", "56M shape, full, once", _SMALL, _FULL, (OURS, TORCHTUNE), _nothing, 1, once=True),
    Plan("qlora-once", "56M shape, QLoRA, once", _SMALL, _QLORA, (OURS, TORCHTUNE), _nothing, 1, once=True),
    Plan("bf16", "56M shape, LoRA, a small batch", _SMALL, _TINY, (OURS, OURS_BF16), _bf16, 2, note=_SLOW),
    *(
        Plan(
            f"bf16-{work['method']}".lower(),
            f"56M shape, {work['method']}, bf16, a small batch, once",
            _SMALL,
            {**_TINY, **work},
            (OURS_BF16, PEFT + BF16),
            _nothing,
            0.8,
            once=True,
            note=_SLOW,
        )
        for work in ({"method": "LoRA"}, _FULL, _QLORA)
    ),
    Plan(
        "memory",
        "Vocabulary 128,256, four layers of 256 numbers, LoRA",
        "vocabulary 128,256",
        {"steps": 1},
        (OURS, PEFT),
        _memory,
        2,
    ),
    Plan("startup", "SmolLM2-135M, LoRA, start", inputs.SMOLLM2, _START, (OURS, TRL), _startup, 1.5),
    Plan("gpu-lora", "8B shape, LoRA, one GPU", "8B", _GPU_WORK, _GPU_SIDES, _gpu("gpu-lora"), 15, gpu=True),
    Plan(
        "gpu-qlora",
        "8B shape, QLoRA, one GPU",
        "8B",
        {**_GPU_WORK, "method": "QLoRA"},
        _GPU_SIDES,
        _gpu("gpu-qlora"),
        20,
        gpu=True,
    ),
    Plan(
        "gpu-full",
        "8B shape, full, activations computed again, one GPU",
        "8B",
        {**_GPU_WORK, "method": "Full", "batch": 1, "recompute": True},
        _GPU_SIDES,
        _gpu("gpu-full"),
        20,
        gpu=True,
        note="Weights and the optimizer's state are in bf16 on each side.",
    ),
)


def sides_of(plan: Plan, options: Options) -> tuple[str, ...]:
    """The plan's sides; where bf16 is multiplied in hardware, each side of a speed's figure in bf16 too."""
    if not options.bf16 or plan.key not in ("smollm2", "lora", "full", "qlora"):
        return plan.sides
    return (*plan.sides, OURS_BF16, PEFT + BF16)
