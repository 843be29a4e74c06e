"""What the benchmarks' figures are held against."""

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True)
class Aim:
    """One row of the page."""

    key: str
    """Under which the benchmark records its figure."""
    what: str
    unit: str
    """Of both sides' figures."""
    kind: Literal["at least", "at most"]
    bound: float
    of: Literal["ratio", "ours"] = "ratio"
    """Whether the bound holds ours divided by the peer's, or our own figure."""
    why: str = ""
    """Why it is missed, from a profile; only shown while it is."""

    def reached(self, ours: float, ratio: float | None) -> bool:
        """Whether the figures reach the aim."""
        value = ours if self.of == "ours" else ratio
        if value is None:
            return False
        return value >= self.bound if self.kind == "at least" else value <= self.bound

    def words(self) -> str:
        """As in `at least 1.2x` or `at most 80 MiB`."""
        return f"{self.kind} {self.bound:g}{'x' if self.of == 'ratio' else f' {self.unit}'}"


AIMS: Final[dict[Literal["trainer", "operator"], tuple[Aim, ...]]] = {
    "trainer": (
        Aim("lora", "LoRA, 4 x 512 tokens, best precision of each", "tokens/s", "at least", 1.2),
        Aim("lora-gemm", "LoRA, share of the machine's matrix product limit", "%", "at least", 75, "ours"),
        Aim("full", "full fine-tuning, 4 x 512 tokens, best precision of each", "tokens/s", "at least", 1.15),
        Aim("qlora", "QLoRA, 4 x 512 tokens", "tokens/s", "at least", 1.2),
        Aim("mixed", "2,000 conversations of mixed length, peer's defaults", "label tokens/s", "at least", 2),
        Aim("mixed-packed", "2,000 conversations of mixed length, peer packs", "label tokens/s", "at least", 1.2),
        Aim("bf16", "bf16 step time beside our fp32, no bf16 instructions", "s", "at most", 1.5),
        Aim("memory", "peak resident memory, LoRA, vocabulary 128,256, 4 x 512 tokens", "MiB", "at most", 0.5),
        Aim("startup", "start to the end of the first step", "s", "at most", 0.4),
        Aim("startup-memory", "resident memory before the model is loaded", "MiB", "at most", 0.6),
        Aim("packing-fill", "packing: room used", "%", "at least", 99.5, "ours"),
        Aim("packing-time", "packing: 50,000 samples", "s", "at most", 0.2, "ours"),
        Aim("second-start", "second start on 100,000 cached samples: the data", "s", "at most", 1, "ours"),
        Aim("gpu-lora", "8B shape, LoRA, 2 x 2,048 tokens, bf16, one GPU", "tokens/s", "at least", 1),
        Aim("gpu-qlora", "8B shape, QLoRA, 2 x 2,048 tokens, bf16, one GPU", "tokens/s", "at least", 1),
        Aim("gpu-full", "8B shape, full, 1 x 2,048 tokens, bf16, one GPU", "tokens/s", "at least", 1),
        Aim("adapter-save", "save of an adapter's checkpoint, large base beside small", "s", "at most", 1.1),
    ),
    "operator": (
        Aim("child-p50", "submit to child Job at 20 jobs/s, p50", "ms", "at most", 100, "ours"),
        Aim("child-p99", "submit to child Job at 20 jobs/s, p99", "ms", "at most", 1000, "ours"),
        Aim("sustained", "sustained jobs, cores shared with the API server", "jobs/s", "at least", 30, "ours"),
        Aim("memory-idle", "resident memory, idle", "MiB", "at most", 80, "ours"),
        Aim("memory-1000", "resident memory, 1,000 jobs", "MiB", "at most", 130, "ours"),
        Aim("cpu-per-job", "CPU per job's life", "ms", "at most", 15, "ours"),
        Aim("kills", "1,000 jobs with random kills: lost or doubled", "jobs", "at most", 0, "ours"),
    ),
}
