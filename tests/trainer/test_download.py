"""`tune download` against a local server that speaks the hub's API: as a process, or in this one."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kubetune_contract.exit_codes import ExitCode
from kubetune_trainer import cli
from kubetune_trainer.download import choose_files, without_token

from .hub_server import COMMIT, REPO, TOKEN, HubServer, redirect, serve
from .meta_folder import write_meta

CASES = pytest.mark.parametrize


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub with a gated Llama in both formats, as Meta publishes them."""
    (published / "original" / "params.json").write_text("{}")
    with serve(published) as server:
        server.gated = True
        redirect(monkeypatch, server, tmp_path / "home")
        yield server


def tune(hub: HubServer, home: Path, *words: object, **environment: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    program = "import sys; from kubetune_trainer.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        env=clean | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def names(folder: Path) -> set[str]:
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {str(name) for name in found if name.parts[0] != ".cache"}


RUN_FILES = {"LICENSE", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_the_documented_command_fetches_a_gated_model_and_hides_its_token(hub: HubServer, tmp_path: Path) -> None:
    started: list[subprocess.Popen[str]] = []
    arguments: list[bytes] = []
    hub.on_request = lambda: arguments.append(Path(f"/proc/{started[0].pid}/cmdline").read_bytes())
    words = ["download", REPO, "--output-dir", tmp_path / "out", "--hf-token", TOKEN]
    started.append(command := tune(hub, tmp_path / "home", *words))
    output = command.communicate()[0]
    assert command.returncode == 0, output
    assert names(tmp_path / "out") == RUN_FILES
    size = sum((tmp_path / "out" / name).stat().st_size for name in RUN_FILES - {"LICENSE"})
    assert f"{tmp_path / 'out'} is ready: 44,880 parameters, {size / 1e9:.2f} GB" in output
    assert all(REPO.encode() in line for line in arguments)
    assert not [line for line in arguments if TOKEN.encode() in line]
    assert TOKEN not in output
    written = [file for folder in ("out", "home") for file in (tmp_path / folder).rglob("*") if file.is_file()]
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]


def test_a_token_in_the_environment_opens_a_gated_model(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert cli.main(["download", REPO, "--output-dir", str(tmp_path / "out")]) == 0
    assert names(tmp_path / "out") == RUN_FILES
    assert TOKEN not in "".join(capsys.readouterr())


def test_without_a_directory_the_model_goes_where_torchtune_puts_it(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated = False
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert cli.main(["download", REPO, "--revision", "v1"]) == 0
    assert names(tmp_path / "tmp" / REPO.partition("/")[2]) == RUN_FILES


def test_an_interrupted_download_is_continued(
    hub: HubServer, tmp_path: Path, llama_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.folder, hub.gated = llama_folder(vocab_size=80_000), False
    size = (hub.folder / "model.safetensors").stat().st_size
    hub.stall["model.safetensors"] = 25_000_000
    words = ["download", REPO, "--output-dir", str(tmp_path / "out")]
    command = tune(hub, tmp_path / "home", *words)
    while sum(file.stat().st_size for file in (tmp_path / "out").glob(".cache/kubetune/*")) < 10_000_000:
        assert command.poll() is None
        time.sleep(0.05)
    command.kill()
    command.communicate()
    hub.go_on.set()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert cli.main(words) == 0
    assert "is ready" in capsys.readouterr().out
    assert hub.sent["model.safetensors"] <= size + 15_000_000  # the client writes in pieces of 10 MB
    assert (tmp_path / "out/model.safetensors").read_bytes() == (hub.folder / "model.safetensors").read_bytes()


def _gate(hub: HubServer) -> None:
    hub.gated = True


def _hide(hub: HubServer) -> None:
    hub.private = True


def _break(hub: HubServer) -> None:
    hub.broken = True


def _open(hub: HubServer) -> None:
    hub.gated = False


WITH = "with --hf-token or in the environment as HF_TOKEN"
REFUSED: dict[str, tuple[Callable[[HubServer], None], list[str], ExitCode, str]] = {
    "gated, without a token": (
        _gate,
        [],
        ExitCode.SOURCE_DENIED,
        f"error: {REPO} at revision main is gated: accept its terms on the hub with the account of your token, and "
        f"give that token {WITH}\n",
    ),
    "gated, with a wrong token": (_gate, ["--hf-token", "hf_bad"], ExitCode.SOURCE_DENIED, "is gated: accept"),
    "private": (
        _hide,
        [],
        ExitCode.SOURCE_DENIED,
        f"error: {REPO} at revision main does not exist or this token may not read it (HTTP 401): check the name, and "
        f"give a token that may {WITH}\n",
    ),
    "no such revision": (
        _open,
        ["--revision", "v9"],
        ExitCode.SOURCE_DENIED,
        f"error: {REPO} has no revision v9: correct --revision\n",
    ),
    "everything is ignored": (
        _open,
        ["--ignore-patterns", "*"],
        ExitCode.SOURCE_DENIED,
        "has no file of a model that is not ignored; check the ignored patterns",
    ),
    "a broken hub": (_break, [], ExitCode.SOURCE_UNAVAILABLE, "the hub does not serve"),
}


@CASES(("change", "words", "code", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_download_says_what_to_do(
    change: Callable[[HubServer], None],
    words: list[str],
    code: ExitCode,
    text: str,
    hub: HubServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(hub)
    assert cli.main(["download", REPO, "--output-dir", str(tmp_path / "out"), *words]) == code
    error = capsys.readouterr().err
    assert text in error
    assert "hf_bad" not in error


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("/sys/kubetune")  # closed for root too
    assert cli.main(["download", REPO, "--output-dir", str(folder)]) == ExitCode.OUTPUT_NOT_WRITABLE
    assert "; make the folder writable, or give another --output-dir\n" in capsys.readouterr().err


def test_what_cannot_be_trained_is_downloaded_and_told(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.gated = False
    (hub.folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert cli.main(["download", REPO, "--output-dir", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert f"the files are in {tmp_path / 'out'}. They cannot be trained as they are: config.json: the arch" in output


def test_metas_own_files_come_where_there_are_no_others(
    hub: HubServer, tmp_path: Path, llama_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.folder, hub.gated = tmp_path / "meta", False
    write_meta(llama_folder(vocab_size=96), hub.folder / "original", shards=2)
    assert cli.main(["download", REPO, "--output-dir", str(tmp_path / "out")]) == 0
    assert names(tmp_path / "out") == {f"original/{file.name}" for file in (hub.folder / "original").iterdir()}
    assert "is ready: 44,784 parameters" in capsys.readouterr().out


META = ["original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"]
HF = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
CHOICES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "both formats: safetensors": ([*HF, *META], [], HF),
    "both formats, Meta's own ignored": ([*HF, *META], ["original/consolidated*"], HF),
    "both formats, safetensors ignored": ([*HF, *META], ["*.safetensors"], ["config.json", "tokenizer.json", *META]),
    "only Meta's": (META, [], META),
    "Meta's in the folder itself": (
        ["consolidated.00.pth", "params.json", "tokenizer.model"],
        [],
        ["consolidated.00.pth", "params.json", "tokenizer.model"],
    ),
    "a folder is ignored": ([*HF, *META], ["original/", "tok*"], HF[:2]),
    "formats that cannot be trained": ([*HF, "pytorch_model.bin", "model.gguf", ".gitattributes", "x.py"], [], HF),
}


@CASES(("listed", "ignored", "wanted"), CHOICES.values(), ids=CHOICES.keys())
def test_weights_come_in_one_format(listed: list[str], ignored: list[str], wanted: list[str]) -> None:
    assert choose_files(listed, ignored) == wanted


HIDDEN = {
    "two words": ["--hf-token", "x"],
    "one word": ["--hf-token=x"],
    "shortened": ["--hf", "x"],
    "shortened, one word": ["--hf-tok=x"],
    "twice": ["--hf-token", "y", "--hf-token", "x"],
}


@CASES("given", HIDDEN.values(), ids=HIDDEN.keys())
def test_the_token_leaves_the_command_line_however_it_is_given(given: list[str]) -> None:
    before, after = ["python", "-P", "/bin/tune", "download", "a/b"], ["--output-dir", "x", "--ignore-patterns", "*"]
    assert without_token([*before, *given, *after]) == before + after
    assert without_token(before + after) == before + after


def test_files_are_those_of_the_resolved_commit(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.gated = False
    assert cli.main(["download", REPO, "--output-dir", str(tmp_path / "out")]) == 0
    assert f"downloading {REPO} at main ({COMMIT}): 5 files" in capsys.readouterr().out
