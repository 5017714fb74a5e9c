"""Speed (skip on a first reading): the model runs a context that rollouts share only once.

The rollouts of a base group share their prompt, those of a suffix group their reset state.
`loss.py` can run each row whole (`hidden_of_rows`, the plain way). This file gives the same hidden
states, but runs each distinct context once; the gradient reaches it through its keys and values.
Measured on one CPU core: whole rows take 1.3 times as long on the default step, whose contexts are
short (`python -m tests.speed --engine hf`), and more the longer the contexts are.

Left out: state-space and hybrid models, whose layers keep more than keys and values. There loss.py
runs whole rows.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer


def can_share(model) -> bool:
    """Whether every layer of the model keeps just keys and values."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def hidden_of_shared_contexts(model, batch) -> torch.Tensor:
    """Hidden states [B, L, D] before each token. batch: a loss.Batch (loss.py is a layer above)."""
    W = batch.contexts.shape[1]
    layers = [ContextLayer() for _ in DynamicCache(config=model.config).layers]
    context = model.base_model(
        input_ids=batch.contexts,
        attention_mask=batch.contexts_mask,
        position_ids=positions(batch.contexts_mask),
        past_key_values=Cache(layers),
    )
    mask = torch.cat([batch.contexts_mask[batch.context_of], batch.tokens_mask], 1)  # [B, W + L]
    rows = model.base_model(
        input_ids=batch.tokens,
        attention_mask=mask,
        position_ids=positions(mask)[:, W:],
        past_key_values=Cache([RowLayer(layer, batch.context_of) for layer in layers]),
    )
    before_first = context.last_hidden_state[:, -1:].index_select(0, batch.context_of)
    return torch.cat([before_first, rows.last_hidden_state[:, :-1]], 1)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids of a padded batch: the first real token of each row has position 0."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class ContextLayer(DynamicLayer):
    """Keys and values of the contexts in one layer.

    --grad_checkpointing runs a layer twice: transformers' own would then append the keys again.
    """

    def update(self, keys, values, *args, **kwargs):
        self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


class RowLayer(DynamicLayer):
    """One layer for the rows: puts the keys and values of each row's context before its own."""

    def __init__(self, context: ContextLayer, context_of: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = context.keys, context.values, True
        self.context_of = context_of  # [B]

    def update(self, keys, values, *args, **kwargs):
        # index_select, not indexing: on a CPU its backward adds up in a fixed order.
        before_keys = self.keys.index_select(0, self.context_of)
        before_values = self.values.index_select(0, self.context_of)
        return torch.cat([before_keys, keys], -2), torch.cat([before_values, values], -2)
