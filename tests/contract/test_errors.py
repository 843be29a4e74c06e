"""How fields are spelt in what people read."""

import pytest

from kubetune_contract.config import RunConfig
from kubetune_contract.errors import as_in_manifests


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no row has a label: set dataset.train_on to All", "no row has a label: set dataset.trainOn to All"),
        (
            "lower training.batch_size, then dataset.max_sequence_length.",
            "lower training.batchSize, then dataset.maxSequenceLength.",
        ),
        ("adapter.rank: 0 is too small", "adapter.rank: 0 is too small"),
        ("dataset.path is missing", "dataset.volumePath is missing"),
        ("/mnt/models/dataset.train_on/x is no file", "/mnt/models/dataset.train_on/x is no file"),
        ("dataset.train_one is no field of ours", "dataset.train_one is no field of ours"),
        ("read model.safetensors and config.json", "read model.safetensors and config.json"),
    ],
)
def test_fields_in_a_sentence_are_spelt_as_in_a_manifest(text: str, expected: str) -> None:
    assert as_in_manifests(text, RunConfig) == expected
