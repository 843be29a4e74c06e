"""Shared by the trainer's tests: small and real models, and ranks that talk over gloo."""

import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from kubetune_contract.config import RunConfig
from kubetune_trainer import cli, distributed, launch

from .stage_claim import Claim

ROOT = Path(__file__).parents[2]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# One thread per process: sums are then split the same way everywhere, and ranks do not fight for the cores.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """peft 0.21 still asks transformers 5 under the old name."""
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


Started = list[tuple[RunConfig, launch.Nodes]]
"""Runs with their processes."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """What would have been launched: the processes themselves are test_launch's and test_train's."""
    seen: Started = []

    def run(command: list[str], nodes: launch.Nodes) -> int:
        seen.append((RunConfig.model_validate_json(Path(command[-1]).read_bytes()), nodes))
        return 66

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(cli, "check_files", lambda config: None)  # what lies on the disk is another question
    return seen


Told = Callable[..., list[str]]
"""The words of a command that must be refused, to its problems."""


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """told("validate", "mine.yaml"): the problems that `tune` tells, without the headline."""

    def run(*arguments: str) -> list[str]:
        assert cli.main(arguments) == 64
        headline, *problems = capsys.readouterr().err.splitlines()
        assert headline == "error: this cannot work:"
        return [problem.removeprefix("  ") for problem in problems]

    return run


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokenized data of the tests stay among the tests; their ranks inherit the variable."""
    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBETUNE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a real pretrained model, as a Hugging Face folder."""
    script = ROOT / "examples" / "demo" / "smollm2.py"
    done = subprocess.run([sys.executable, script], check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip())


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
"""config.json of the smallest model that has everything: grouped heads, and sizes that no rank count divides."""


def write_llama(folder: Path, *, dtype: torch.dtype = torch.float32, shards: int = 1, **changes: Any) -> Path:
    """A Llama folder with random weights: TINY with `changes`, in one file or in `shards` with an index."""
    from safetensors.torch import save_file

    from kubetune_contract.architecture import LlamaConfig

    values = TINY | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, shape in LlamaConfig.from_hf(values).shapes().items():
        noise = torch.randn(shape, generator=generator)
        # Norms near 1, and matrices wide enough that attention is far from uniform.
        state[name] = (1 + 0.1 * noise if len(shape) == 1 else 0.15 * noise).to(dtype)
    names = list(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            part = {name: state[name] for name in names if weight_map[name] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return write_tokenizer(folder)


def write_tokenizer(folder: Path) -> Path:
    """One token per letter, and a chat template: enough for a folder to be whole."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *map(chr, range(32, 126))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '</s>' }}{% endfor %}"
    settings = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


CHATML = """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
WORDS = (
    "What is the capital of France? Paris. And of Peru? Lima. Be brief. Three fruits: fig, pear, plum.\n\n äöü 日本 🙂"
)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a small byte-level tokenizer with a chat template (ChatML, another or none), as a model folder has it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS] * 3, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # as published files have it
    backend.enable_truncation(7)
    backend.enable_padding()

    def write(template: str | None = CHATML, **config: Any) -> Path:
        folder = tmp_path_factory.mktemp("chat")
        backend.save(str(folder / "tokenizer.json"))
        values = {"eos_token": "<|im_end|>", "bos_token": {"__type": "AddedToken", "content": "<s>"}} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return write


@pytest.fixture
def llama_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder with a random Llama: `llama_folder(tie_word_embeddings=True)`, `llama_folder(shards=2)`."""
    numbers = itertools.count()
    return lambda **changes: write_llama(tmp_path / f"llama-{next(numbers)}", **changes)


@pytest.fixture
def tiny(llama_folder: Callable[..., Path]) -> Path:
    """A folder with the tiny Llama."""
    return llama_folder()


@pytest.fixture
def published(tiny: Path) -> Path:
    """A folder with the tiny Llama as a repository has it: with files that a run does not need."""
    (tiny / "README.md").write_text("# Tiny")
    (tiny / "LICENSE").write_text("Llama 3")
    (tiny / "original").mkdir()
    (tiny / "original" / "consolidated.00.pth").write_bytes(b"the same weights again")
    return tiny


@pytest.fixture
def claim(tmp_path: Path) -> Claim:
    """An empty models claim."""
    return Claim(tmp_path)


@pytest.fixture(name="run_config")
def _run_config() -> Callable[..., RunConfig]:
    """`run_config(model_folder, method="Full", ...)`."""
    return run_config


@pytest.fixture
def training_run(tmp_path: Path) -> RunConfig:
    """A run that can start: 48 sums to learn, 8 held out, LoRA on the tiny model with dropout, 2 x 2 rows a step."""
    sums = [(a, b) for a in range(8) for b in range(7)]
    rows = [{"messages": [_said("user", f"{a}+{b}?"), _said("assistant", f"{a + b}.")]} for a, b in sums]
    for name, chosen in (("train", rows[:48]), ("held-out", rows[48:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return run_config(
        write_llama(tmp_path / "model"),
        adapter={"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ALL_LINEAR},
        dataset={"path": str(tmp_path / "train.jsonl"), "max_sequence_length": 64},
        validation={"path": str(tmp_path / "held-out.jsonl"), "samples": 2, "sample_tokens": 3},
        training={
            "precision": "FP32",
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.005,
            "warmup_steps": 2,
        },
        checkpoint={"every_steps": 5},
        output_dir=str(tmp_path / "out"),
    )


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def run_config(model: Path, **changes: Any) -> RunConfig:
    """A complete configuration of a LoRA run over all linear layers; `changes` go to the top level."""
    values: dict[str, Any] = {
        "method": "LoRA",
        "model": {"path": str(model)},
        "dataset": {"path": "unused.jsonl"},
        "training": {"precision": "FP32"},
        "output_dir": "unused",
    }
    if changes.get("method") != "Full":
        values["adapter"] = {"rank": 4, "alpha": 8, "target_modules": ALL_LINEAR}
    return RunConfig.model_validate(values | changes)


@pytest.fixture
def alone() -> distributed.World:
    """The world of a single process on the CPU."""
    return distributed.World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(name="spawn")
def _spawn() -> Callable[..., list[Any]]:
    """`spawn(2, function, *arguments)`."""
    return spawn


def spawn(size: int, function: Callable[..., Any], *arguments: Any, per_node: int | None = None) -> list[Any]:
    """`function(world, *arguments)` on `size` gloo ranks at once; returns their results, rank 0's first.

    The ranks believe that they are on nodes with `per_node` of them; without it, on one.

    `function` must stand at the top of a test module; arguments and results are pickled. If a rank raises, the others
    are ended, and its traceback is this call's AssertionError.
    """
    context = _forkserver()
    port = free_port()
    pipes, processes = [], []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": per_node or size}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = context.Process(target=_rank, args=(theirs, environment, function, arguments))
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        return _collect(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture(name="forkserver")
def _forkserver_fixture() -> Any:
    """The multiprocessing context of spawn(), for ranks that a test wants to kill."""
    return _forkserver()


def _forkserver() -> Any:
    """A server that has imported torch once; each rank is a fork of it and starts in no time."""
    if str(ROOT) not in sys.path:  # ranks find their function by its module's name, such as tests.trainer.test_peft
        sys.path.insert(0, str(ROOT))
    context = multiprocessing.get_context("forkserver")
    # torch._dynamo: torch imports it for the first optimizer or meta tensor, 1-3 s that each rank would spend again.
    saver = "torch.distributed.checkpoint.state_dict_saver"
    context.set_forkserver_preload(
        ["kubetune_trainer.train", "pytest", "torch.distributed.fsdp", saver, "torch._dynamo", "bitsandbytes"]
    )
    return context


def _collect(pipes: list[Any]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        for pipe in multiprocessing.connection.wait(waiting):
            rank = pipes.index(pipe)
            try:
                failure, results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                failure = "it ended without a result"
            assert failure is None, f"rank {rank}: {failure}"
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe: Any, environment: dict[str, Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {key: str(value) for key, value in environment.items()}
    torch.set_num_threads(1)
    try:
        world = distributed.start()
        torch.set_num_threads(1)
        outcome = (None, function(world, *arguments))
        distributed.stop()
    except BaseException:  # noqa: BLE001 - whatever it is, the test must see it
        outcome = (traceback.format_exc(), None)
    pipe.send_bytes(pickle.dumps(outcome))


def free_port() -> int:
    """A TCP port that is free now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
