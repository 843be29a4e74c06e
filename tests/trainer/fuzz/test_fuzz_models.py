"""Model folders that somebody else has written, spoilt: read whole, or refused with the file's name."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save
from tests.fuzzing import contained, damaged, fuzz, in_words, nested, spoilt

from kubetune_contract.architecture import LlamaConfig, ModelError
from kubetune_trainer import meta_files
from kubetune_trainer.hub import WeightReader, check_model
from kubetune_trainer.safetensors_files import read_header

from ..conftest import TINY, write_llama
from ..meta_folder import write_meta

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
SAFETENSORS = save(TENSORS, metadata={"format": "pt"})
_LENGTH = int.from_bytes(SAFETENSORS[:8], "little")
HEADER = json.loads(SAFETENSORS[8 : 8 + _LENGTH])
NUMBERS = SAFETENSORS[8 + _LENGTH :]


def headed(header: Any, length: int | None = None) -> bytes:
    """A safetensors file with this header, which may claim another length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + NUMBERS


def read_or_refuse(file: Path) -> None:
    """Every number that the header promises is there, or a ModelError names the file."""
    with contained():
        try:
            tensors = read_header(file)
            for tensor in tensors.values():
                if tensor.dtype in ("F32", "BF16", "F16") and tensor.shape:
                    size = {"F32": 4, "BF16": 2, "F16": 2}[tensor.dtype]
                    assert tensor.offset >= 0
                    assert tensor.offset + size * torch.Size(tensor.shape).numel() <= file.stat().st_size
        except ModelError as error:
            in_words(error, file.name)


def entry(**changes: Any) -> dict[str, Any]:
    return HEADER | {"a": HEADER["a"] | changes}


HEADERS: dict[str, bytes] = {
    "a length beyond the file": headed(HEADER, 99_999_999),
    "a length beyond all files": headed(HEADER, 2**64 - 1),
    "deep JSON": headed(nested(200_000).encode()),
    "no object": headed([1]),
    "an entry that is no object": headed({"a": 5}),
    "no offsets": headed({"a": {"dtype": "F32", "shape": [6]}}),
    "offsets that are texts": headed(entry(data_offsets=["0", "24"])),
    "a negative offset": headed(entry(data_offsets=[-8, 24])),
    "offsets the wrong way round": headed(entry(data_offsets=[24, 0])),
    "three offsets": headed(entry(data_offsets=[0, 8, 24])),
    "overlapping offsets": headed(entry(data_offsets=[16, 32])),
    "a shape of other size": headed(entry(shape=[200, 300])),
    "a negative shape": headed(entry(shape=[-2, -3])),
    "a shape beyond all memory": headed(entry(shape=[2**62, 2**62])),
    "a shape that is a text": headed(entry(shape="23")),
    "a truth as a size": headed(entry(shape=[True, 6])),
    "a dtype that is a list": headed(entry(dtype=["F32"])),
    "no UTF-8": headed(b'{"\xff\xfe": 1}'),
    "half a character in a name": headed({"\ud800": HEADER["a"]}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_safetensors_file_is_refused_by_name_for(case: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(HEADERS[case])
    with contained(memory=64 << 20), pytest.raises(ModelError) as caught:
        read_header(file)
    in_words(caught.value, "model.safetensors")


@fuzz
@given(content=damaged(SAFETENSORS))
def test_a_damaged_safetensors_file_is_read_whole_or_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    read_or_refuse(file)


@fuzz
@given(header=spoilt(HEADER))
def test_a_spoilt_safetensors_header_is_read_whole_or_refused(header: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(headed(header))
    read_or_refuse(file)


# --- .pth files -------------------------------------------------------------------------------------------------------


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


PTH = saved(TENSORS)


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


MEMBERS = members(PTH)
PICKLE_NAME = next(name for name in MEMBERS if name.endswith("/data.pkl"))
PICKLE = MEMBERS[PICKLE_NAME]


def pickled(content: bytes) -> bytes:
    """A .pth file with this pickle."""
    return zipped(MEMBERS | {PICKLE_NAME: content})


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def doubled_key(levels: int) -> bytes:
    """A dict with the key of twice the same tuple of twice the same ...: small to write, endless to hash."""
    return b"\x80\x02}(K\x01" + b"2\x86" * levels + b"K\x01u."


PICKLES: dict[str, bytes] = {
    "a call of the system": pickle.dumps(Calls(eval, "1/0"), protocol=2),
    "a call of a shell": pickle.dumps({"a": Calls(__import__("os").system, "exit 7")}, protocol=2),
    "a call of torch.load": b"\x80\x02ctorch\nload\n(U\x01xtR.",
    "a name inside an allowed one": b"\x80\x04\x8c\x0bcollections\x8c\x15OrderedDict.__reduce__\x93.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a key that takes for ever to hash": doubled_key(60),
    "a text longer than the file": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fab.",
    "bytes longer than the file": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fab.",
    "deep tuples": b"\x80\x02" + b")" + b"\x85" * 20_000 + b".",
    "nothing on the stack": b"\x80\x02.",
    "nothing": b"",
    "no dict": pickle.dumps([1, 2], protocol=2),
    "a number of a million digits": b"\x80\x02I" + b"9" * 1_000_000 + b"\n.",
    "a changed attribute": b"\x80\x02ccollections\nOrderedDict\n)R}U\x05itemsK\x01sb.",
    "a storage that is a number": b"\x80\x02K\x01Q.",
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_is_refused_by_name_for(case: str, tmp_path: Path) -> None:
    file = tmp_path / "consolidated.00.pth"
    file.write_bytes(pickled(PICKLES[case]))
    with contained(memory=256 << 20), pytest.raises(ModelError) as caught:
        meta_files.read_parts(tmp_path)
    in_words(caught.value, "consolidated.00.pth")


def test_a_huge_place_in_the_memo_takes_no_memory(tmp_path: Path) -> None:
    """Python's own unpickler makes a table up to that place: 32 GiB."""
    (tmp_path / "consolidated.00.pth").write_bytes(pickled(b"\x80\x02}r\xff\xff\xff\x7f."))
    with contained(memory=64 << 20):
        assert meta_files.read_parts(tmp_path) == {}


ARCHIVES: dict[str, bytes] = {
    "nothing": b"",
    "a pickle without an archive": PICKLE,
    "no pickle": zipped({"archive/data/0": b"1234"}),
    "a compressed bomb": zipped({PICKLE_NAME: b"\0" * 200_000_000}, zipfile.ZIP_DEFLATED),
    "members that are compressed": zipped(MEMBERS, zipfile.ZIP_DEFLATED),
    "a compression that nobody has": PTH.replace(
        b"PK\x01\x02\0\0\0\0\x08\x08\0\0", b"PK\x01\x02\0\0\0\0\x08\x08\x63\0"
    ),
    "an encrypted member": PTH.replace(b"PK\x01\x02\0\0\0\0\x08\x08", b"PK\x01\x02\0\0\0\0\x09\x08"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_is_refused_by_name_for(case: str, tmp_path: Path) -> None:
    file = tmp_path / "consolidated.00.pth"
    file.write_bytes(ARCHIVES[case])
    with contained(memory=64 << 20), pytest.raises(ModelError) as caught:
        meta_files.read_parts(tmp_path)
    in_words(caught.value, "consolidated.00.pth")


def parts_or_refusal(folder: Path) -> None:
    with contained():
        try:
            for tensors in meta_files.read_parts(folder).values():
                for tensor in tensors:
                    size = {"F32": 4, "BF16": 2, "F16": 2}.get(tensor.dtype, 0)
                    assert tensor.offset >= 0
                    count = torch.Size(tensor.shape).numel()
                    assert tensor.offset + size * count <= tensor.file.stat().st_size
        except ModelError as error:
            in_words(error, "consolidated.00.pth")


@fuzz
@given(content=damaged(PTH))
def test_a_damaged_pth_file_is_read_whole_or_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(content)
    parts_or_refusal(tmp_path)


@fuzz
@given(content=damaged(PICKLE) | st.binary(max_size=40).map(lambda rest: b"\x80\x02" + rest + b"."))
def test_a_spoilt_pickle_is_read_whole_or_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(pickled(content))
    parts_or_refusal(tmp_path)


# --- whole folders ----------------------------------------------------------------------------------------------------

BIG = 10**9


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder."""
    return write_llama(tmp_path_factory.mktemp("hf") / "model", vocab_size=96)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder in two files."""
    return write_llama(tmp_path_factory.mktemp("sharded") / "model", shards=2)


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory, hugging_face: Path) -> Path:
    """The same in Meta's layout."""
    folder = tmp_path_factory.mktemp("meta") / "model"
    write_meta(hugging_face, folder, shards=2)
    return folder


def opened_or_refused(folder: Path) -> None:
    with contained():
        try:
            reader = WeightReader(folder)
            reader.files()
        except ModelError as error:
            in_words(error)


def with_file(folder: Path, name: str, content: bytes, check: Callable[[Path], None]) -> None:
    """`check(folder)` while that file of it has another content."""
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        check(folder)
    finally:
        (folder / name).write_bytes(before)


CONFIGS: dict[str, Any] = {
    "a billion layers": TINY | {"num_hidden_layers": BIG},
    "sizes beyond all numbers": TINY | {"vocab_size": 10**400},
    "an architecture that is a number": TINY | {"architectures": 5},
    "RoPE that is a text": TINY | {"rope_scaling": "llama3"},
    "RoPE that is a list": TINY | {"rope_parameters": [1]},
    "more heads than width": TINY | {"num_attention_heads": BIG},
    "an epsilon beyond all numbers": TINY | {"rms_norm_eps": 10**400},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_model_is_refused_for_a_configuration_with(case: str, hugging_face: Path) -> None:
    def check(folder: Path) -> None:
        with contained(memory=64 << 20), pytest.raises(ModelError) as caught:
            WeightReader(folder)
        in_words(caught.value)

    with_file(hugging_face, "config.json", json.dumps(CONFIGS[case]).encode(), check)


@fuzz
@given(values=spoilt(TINY))
def test_a_spoilt_config_json_is_read_or_refused(values: Any) -> None:
    with contained():
        try:
            LlamaConfig.from_hf(values if isinstance(values, dict) else {})
        except ModelError as error:
            in_words(error, "config.json")


@fuzz
@given(values=spoilt(TINY | {"vocab_size": 96}), levels=st.just(0))
@example(values=None, levels=100_000)
def test_a_folder_with_a_spoilt_config_json_is_opened_or_refused(values: Any, levels: int, hugging_face: Path) -> None:
    content = nested(levels) if levels else json.dumps(values)
    with_file(hugging_face, "config.json", content.encode(), opened_or_refused)


INDEX = {
    "metadata": {},
    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
}


@fuzz
@given(index=spoilt(INDEX))
@example(index={"weight_map": {"a": ["x"], "b": 1}})
@example(index={"weight_map": {"a": "a\0b"}})
@example(index={"weight_map": {"a": "../../../../../etc/passwd"}})
@example(index={"weight_map": {"a": "x" * 5000}})
@example(index={"weight_map": {"a": "\ud800"}})
def test_a_folder_with_a_spoilt_index_is_opened_or_refused(index: Any, sharded: Path) -> None:
    with_file(sharded, "model.safetensors.index.json", json.dumps(index).encode(), opened_or_refused)


PARAMS = {
    "dim": 48,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.0,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "use_scaled_rope": True,
    "rope_scaling_factor": 8,
    "rope_high_freq_factor": 4,
}


@fuzz
@given(values=spoilt(PARAMS))
@example(values=PARAMS | {"rope_theta": "x"})
@example(values=PARAMS | {"ffn_dim_multiplier": 1e308})
@example(values=PARAMS | {"n_layers": BIG})
@example(values=PARAMS | {"n_heads": 10**6})
@example(values=PARAMS | {"vocab_size": "x"})
@example(values=PARAMS | {"rope_scaling_factor": [1]})
def test_a_folder_with_spoilt_params_json_is_opened_or_refused(values: Any, meta: Path) -> None:
    with_file(meta, "params.json", json.dumps(values).encode(), opened_or_refused)


@fuzz
@given(
    name=st.sampled_from(["layers.0.attention.wq.weight", "tok_embeddings.weight", "norm.weight", "x", ""]),
    shape=st.lists(st.integers(0, 3), max_size=3),
)
def test_metas_tensors_of_any_form_are_refused(name: str, shape: list[int], meta: Path) -> None:
    content = saved({name: torch.zeros(shape)})
    with_file(
        meta,
        "consolidated.00.pth",
        content,
        lambda folder: with_file(folder, "consolidated.01.pth", content, opened_or_refused),
    )


def test_a_tokenizer_of_deep_json_is_refused(hugging_face: Path) -> None:
    def check(folder: Path) -> None:
        with contained(), pytest.raises(ModelError, match=r"tokenizer\.json"):
            check_model(folder)

    with_file(hugging_face, "tokenizer.json", nested(200_000).encode(), check)


def test_the_weights_of_a_billion_layers_are_counted_without_listing_them() -> None:
    """The operator takes the sizes from a pod's last word."""
    sizes = LlamaConfig.from_hf(TINY).sizes
    with contained(memory=64 << 20):
        more = sizes.model_copy(update={"num_hidden_layers": BIG})
        one, two = (sizes.model_copy(update={"num_hidden_layers": layers}).parameters for layers in (1, 2))
        assert more.parameters == one + (BIG - 1) * (two - one)
    assert sizes.parameters == sum(torch.Size(shape).numel() for shape in sizes.shapes().values())
