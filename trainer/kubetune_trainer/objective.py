"""What a step minimises: the cross-entropy of answers, or that of preferences between two answers (DPO).

Both give sums over what they weigh (label tokens, or pairs), so that micro-batches and ranks add up.
"""

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from kubetune_contract.config import DPOConfig
from kubetune_trainer.model import IGNORE, Llama
from kubetune_trainer.peft import adapter_disabled

PREFERENCE_MEASURES: Final = ("reward_chosen", "reward_rejected", "reward_accuracy")
"""What preference() measures besides the loss, under torchtune's and TRL's names for them in one word each."""


def preference(model: Llama, input_ids: Tensor, labels: Tensor, lengths: Sequence[int], options: DPOConfig) -> Tensor:
    """Direct preference optimization (Rafailov et al. 2023) of a ragged row of chosen, rejected, chosen, ... documents.

    Returns float32 [4], summed over the pairs: the loss, then PREFERENCE_MEASURES without gradient. A pair without
    labels (a rank without a row) counts nothing.
    """
    with torch.no_grad(), adapter_disabled(model):
        reference = -model(input_ids, labels, lengths=lengths, by_document=True)
    policy = -model(input_ids, labels, lengths=lengths, by_document=True)
    chosen, rejected = (options.beta * (policy - reference)).view(-1, 2).unbind(1)
    margin = chosen - rejected
    flipped = options.label_smoothing
    losses = -(1 - flipped) * F.logsigmoid(margin) - flipped * F.logsigmoid(-margin)
    counts = torch.tensor(
        [_has_labels(one) for one in torch.split(labels[0], list(lengths))[::2]], device=losses.device
    )
    measures = torch.stack([chosen, rejected, (margin > 0).float()]).detach()
    return torch.cat([losses[None], measures]).mul(counts).sum(dim=1)


def _has_labels(labels: Tensor) -> bool:
    return bool((labels != IGNORE).any())
