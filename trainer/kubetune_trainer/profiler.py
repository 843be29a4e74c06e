"""torch's profiler over a window of steps. Every process writes a trace of its own."""

from pathlib import Path
from typing import Any, Self

from kubetune_contract.config import ProfilerConfig
from kubetune_contract.paths import PROFILE_DIR
from kubetune_trainer.distributed import World


class Profiler:
    """Records the steps of the window, as a context around the loop. Without options it does nothing.

    A run that ends or starts inside the window leaves what was recorded of it.
    """

    def __init__(self, options: ProfilerConfig | None, folder: Path, world: World) -> None:
        self._options = options
        self._folder = folder / PROFILE_DIR
        self._world = world
        self._recording: Any = None
        self._first = self._last = 0

    def begin(self, step: int) -> None:
        """Before a step, counted from 1."""
        options = self._options
        if options is None or self._recording is not None:
            return
        if options.start_step <= step < options.start_step + options.steps:
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._recording = profile(activities=activities, profile_memory=options.memory, record_shapes=True)
            self._recording.start()
            self._first = step

    def end(self, step: int) -> None:
        """After a step."""
        if self._recording is not None:
            assert self._options is not None
            self._last = step
            if step == self._options.start_step + self._options.steps - 1:
                self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._recording is not None:
            self._write()

    def _write(self) -> None:
        """A trace for Perfetto or chrome://tracing, and a table of the ops that took longest."""
        recording, self._recording = self._recording, None
        recording.stop()
        if self._last < self._first:
            return  # not even one step was finished
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._first}-{self._last}-rank-{self._world.rank}"
        recording.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        order = "self_cuda_time_total" if self._world.device.type == "cuda" else "self_cpu_time_total"
        (self._folder / f"{name}.txt").write_text(recording.key_averages().table(sort_by=order, row_limit=50))
