"""The memory estimate: against traces of the real code, and what it says where memory is too small."""

from typing import Any

import pytest
import torch

from kubetune_contract.config import RunConfig
from kubetune_trainer.architecture import LlamaConfig
from kubetune_trainer.estimate import embedding_on_host
from kubetune_trainer.model import Llama

SMALL = LlamaConfig(97, 48, 80, 2, 6, 2, 8, 1e-5, 1e4, None, False, 512)


def settings(**changes: Any) -> RunConfig:
    """A run on packed rows of 2048 tokens; a change of `training` or `dataset` names the field alone."""
    values: dict[str, Any] = {"model": {"path": "m"}, "output_dir": "o"}
    dataset, training = {"path": "d", "packed": True}, {"precision": "BF16"}
    for name, value in changes.items():
        places = ((training, RunConfig.model_fields["training"]), (dataset, RunConfig.model_fields["dataset"]))
        known = [place for place, field in places if name in field.annotation.model_fields]
        (known[0] if known else values)[name] = value
    return RunConfig.model_validate(values | {"dataset": dataset, "training": training})


# --- the embedding in host memory -------------------------------------------------------------------------------------

PLACES: dict[str, tuple[dict[str, Any], int, bool, bool]] = {
    "an adapter on one device": ({}, 1, False, True),
    "four bits on one device": ({"method": "QLoRA"}, 1, False, True),
    "the embedding is trained whole": ({"method": "Full"}, 1, False, False),
    "the embedding has an adapter": ({"adapter": {"target_modules": ["embed_tokens", "q_proj"]}}, 1, False, False),
    "the embedding is the head too": ({}, 1, True, False),
    "the embedding is sharded": ({}, 2, False, False),
}


@pytest.mark.parametrize(("changes", "processes", "tied", "on_host"), PLACES.values(), ids=PLACES)
def test_the_embedding_stays_on_the_host_where_it_is_only_read(changes, processes, tied, on_host):
    architecture = LlamaConfig(**{**SMALL.__dict__, "tie_word_embeddings": tied})
    assert embedding_on_host(settings(**changes), architecture, processes) is on_host


def test_rows_of_an_embedding_on_another_device_move_to_the_blocks():
    model = Llama(SMALL).to("meta")  # the one device beside the CPU that is always at hand
    model.model.embed_tokens.to_empty(device="cpu")
    assert model.model.embed(torch.zeros(1, 3, dtype=torch.int64)).device.type == "meta"
