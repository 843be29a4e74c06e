"""What loading takes at its peak: a rank's rows and no second copy of them, whatever the format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kubetune_trainer import distributed
from kubetune_trainer.hub import WeightReader
from kubetune_trainer.parallel import build

from .conftest import run_config, write_llama
from .meta_folder import write_meta

SIZES = {"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4}
MIB = 2**20


def _peak(world: distributed.World, folder: str) -> tuple[int, int, int]:
    """Bytes by which building the model raised this process's resident memory, of its rows, and of the largest tensor.

    Resident memory counts mapped files too; the kernel's high-water mark misses nothing.
    """
    build(run_config(Path(folder).parent / "tiny", method="Full"), WeightReader(Path(folder).parent / "tiny"), world)
    reader, config = WeightReader(folder), run_config(Path(folder), method="Full")
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew at what is resident now
    before = _resident("VmRSS")
    model = build(config, reader, world)
    peak = _resident("VmHWM") - before
    rows = [parameter.to_local() if world.size > 1 else parameter for parameter in model.parameters()]
    return peak, sum(part.nbytes for part in rows), max(part.nbytes for part in rows)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loading")
    write_llama(root / "tiny")
    hugging_face = write_llama(root / "hugging-face", **SIZES, **HEADS)
    return {
        "safetensors": hugging_face,
        "one Meta file": write_meta(hugging_face, root / "meta-1"),
        "two Meta files": write_meta(hugging_face, root / "meta-2", shards=2),
    }


@pytest.mark.parametrize("size", [1, 2], ids=["alone", "two ranks"])
@pytest.mark.parametrize("kind", ["safetensors", "one Meta file", "two Meta files"])
def test_loading_takes_the_ranks_rows_and_at_most_a_tensor_more(
    kind: str, size: int, folders: dict[str, Path], spawn: Callable[..., list[Any]]
) -> None:
    for peak, shard, tensor in spawn(size, _peak, str(folders[kind])):
        print(f"{kind}, {size} ranks: peak {peak / MIB:.0f} MiB, rows {shard / MIB:.0f}, tensor {tensor / MIB:.0f}")
        assert shard > 75 * MIB
        assert peak <= 1.2 * shard + tensor
