"""Speed (skip on a first reading): keys and values that are shared, and not copied.

Training: the rollouts of a base group share their prompt, those of a suffix group their reset
state. `loss.py` can run each row whole (`hidden_of_rows`, the plain way). This file gives the same
hidden states, but runs each distinct context once; the gradient reaches it through its keys and
values. Whole rows take 1.2 times as long on base groups of the embedded policy, whose prompts are
short (`python -m tests.speed --only embedded`).

Sampling with transformers on a CPU: its own cache copies all keys and values for each new token
(`RoomyLayer` has room for more), and its attention copies them once for each query head (`attend`
does not). Without both, one token more takes 1.8 to 3 times as long on the embedded policy, and 1.4
to 4.2 times on one of 135 M parameters.

Left out: state-space and hybrid models, whose layers keep more than keys and values. There loss.py
runs whole rows, and the sampler has transformers' own cache.

Try it alone:  python -m pytest tests/test_loss.py -k shared
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# ---------------------------------------------------------------------------------------- training


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


# ---------------------------------------------------------------------------------------- sampling


def sampling_cache(config) -> DynamicCache:
    """An empty cache; layers that keep all keys and values have room for more."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer: the filled part of tensors with room for ROOM more tokens."""

    ROOM = 64  # tokens

    def __init__(self):
        super().__init__()
        self.all_keys = self.all_values = None  # [rows, heads, tokens and room, head size]

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        filled = self.get_seq_length()
        end = filled + keys.shape[2]
        if self.all_keys is None or end > self.all_keys.shape[2]:
            self.all_keys = with_room(self.keys, keys, end + self.ROOM)
            self.all_values = with_room(self.values, values, end + self.ROOM)
        self.all_keys[:, :, filled:end] = keys
        self.all_values[:, :, filled:end] = values
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, places) -> None:
        super().reorder_cache(places)
        self.all_keys = self.all_values = None  # the next token makes room again


def keep_rows(cache: DynamicCache, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Keeps only the rows at `places`, and no column that is padding in all of them.

    mask: [rows, columns], 1 on real tokens. Returns that of what is kept.
    """
    cache.reorder_cache(places)  # transformers' word for taking rows; layers of all kinds have it
    mask = mask[places]
    if not all(isinstance(layer, RoomyLayer) for layer in cache.layers):
        return mask  # a sliding window counts its columns
    first = int(mask.any(0).int().argmax())
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
    return mask[:, first:]


def with_room(kept: torch.Tensor, new: torch.Tensor, room: int) -> torch.Tensor:
    """A tensor for `room` tokens that begins with those kept. new: [rows, heads, _, size]."""
    rows, heads, _, size = new.shape
    roomy = new.new_empty(rows, heads, room, size)
    if kept.numel():
        roomy[:, :, : kept.shape[2]] = kept
    return roomy


def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' sdpa attention, faster on a CPU.

    There it computes in float32 (bfloat16 takes 2 to 6 times as long), and the heads of one new
    token share keys and values.
    """
    if query.device.type != "cpu" or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    if query.shape[2] == 1:
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
        out = out.transpose(1, 2).contiguous()
    else:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    return out.to(dtype), None


def use_attend(model) -> None:
    """Makes a model whose attention is sdpa use `attend`."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register("sdpa_on_cpu", attend)
        AttentionMaskInterface.register("sdpa_on_cpu", sdpa_mask)
        model.set_attn_implementation("sdpa_on_cpu")
