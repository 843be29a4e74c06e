"""How much memory a training step takes at most, in closed form, without torch and before any is taken.

All numbers are bytes of one process. A test holds them against live tensors of the real code. T is the micro-batch's
tokens, batch_size x max_sequence_length, which is the most: rows are never padded.
"""

from kubetune_contract.config import RunConfig
from kubetune_trainer.architecture import LlamaConfig


def embedding_on_host(config: RunConfig, architecture: LlamaConfig, processes: int) -> bool:
    """Whether the embedding's table stays in host memory: a step reads some of its rows and never writes it.

    It saves 1 GB for 8B and costs a copy of those rows. Not where it is trained, or is the head too, or is sharded.
    """
    trained = config.lora is None or "embed_tokens" in config.lora.target_modules
    return not (trained or architecture.tie_word_embeddings or processes > 1)
