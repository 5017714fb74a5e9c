"""The loss: masked group-relative REINFORCE (SRPO steps 5 and 6).

    L = - 1/N sum_i A_i 1/|T_i| sum_{t in T_i} log pi(y_t | y_<t)

N: all rollouts of the step, also those whose advantage is zero. A_i: reward normalised inside its own group. T_i: every response token
of a base rollout; only the suffix tokens of a suffix rollout (the shared prefix is masked: it was not sampled for this group).

Every token gets its weight A_i / (|T_i| N) before the first backward, so the gradient is the same for any micro-batch, padding, order or
number of processes. Rollouts without weight are never run. What a group has in common, its prompt or reset state, is run once for all of
its rollouts. The language-model head runs only where a weight is not zero, in chunks whose logits are recomputed in the backward: the
[tokens, vocabulary] logits of a step never exist at once.

Left out: KL to a reference model, and token-level or sequence-level importance ratios other than the clipped surrogate (`--clip`, the
paper's ablation, with the sampler's log-probs as the old policy's).

Try it alone:  python loss.py        # a tiny group by hand: rewards, advantages, token weights
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from rollout import Rollout


def set_advantages(rollouts: list[Rollout], normalize: bool = True) -> None:
    """Writes A_i = (r_i - mean) / std of its own group (population std; all zero where std < 1e-8) into each rollout. Paper step 5.

    Rewards 1, 0, 0, 0 give advantages 1.73, -0.58, -0.58, -0.58. normalize=False leaves the std out (tests: an unbiased gradient)."""
    for members in grouped(rollouts).values():
        rewards = torch.tensor([r.reward for r in members], dtype=torch.float64)
        std = rewards.std(correction=0)
        scale = 0.0 if std < 1e-8 else (1 / std if normalize else 1.0)
        for rollout, advantage in zip(members, ((rewards - rewards.mean()) * scale).tolist()):
            rollout.advantage = advantage


def grouped(rollouts: list[Rollout]) -> dict[tuple[int, int], list[Rollout]]:
    """Rollouts by group id, in order of appearance. Raises ValueError if a group mixes two states."""
    groups: dict[tuple[int, int], list[Rollout]] = {}
    for rollout in rollouts:
        members = groups.setdefault(rollout.group, [])
        members.append(rollout)
        first, n = members[0], rollout.prefix_len
        if (first.prompt_ids, first.token_ids[: first.prefix_len]) != (
            rollout.prompt_ids,
            rollout.token_ids[:n],
        ):
            raise ValueError(
                f"group {rollout.group} mixes two states; give each reset state a group of its own"
            )
    return groups


def token_weights(
    rollout: Rollout, n_rollouts: int, mask_prefix: bool = True, length: str = "trained"
) -> list[float]:
    """Weight of each response token in the loss, one per token of `token_ids`: A / (|T| N) on T, 0 on a masked prefix.

    A = 1.5, 5 tokens of which 2 are the shared prefix, N = 8  ->  [0, 0, 1/16, 1/16, 1/16].
    length="response" (ours) divides by the whole response, prefix included, so that a short suffix is not louder:  [0, 0, 3/80, 3/80, 3/80]."""
    masked = rollout.prefix_len if mask_prefix else 0
    n = len(rollout.token_ids) - masked
    divisor = n if length == "trained" else len(rollout.token_ids)
    return [0.0] * masked + [rollout.advantage / (divisor * n_rollouts)] * n


@dataclass
class Batch:
    """B rows, each a state and what follows it from its first weighted token on. S states: rows that agree so far share one, of W tokens at
    most, padded on the left; L tokens follow at most, padded on the right; M of them have a weight."""

    states: torch.Tensor  # [S, W] token ids
    states_mask: torch.Tensor  # [S, W] 1 on real tokens
    state: torch.Tensor  # [B] -> its state
    tokens: torch.Tensor  # [B, L] token ids
    tokens_mask: torch.Tensor  # [B, L]
    where: torch.Tensor  # [B, L] bool: this token's weight is not zero
    weights: torch.Tensor  # [M] in row order
    old_logps: torch.Tensor  # [M] the sampler's
    in_prefix: torch.Tensor  # [M] bool: a token of the shared prefix (only without the prefix mask)


def first_weight(weights: list[float]) -> int:
    """Tokens of the response before the first that has a weight; 0 where none has."""
    return next((i for i, w in enumerate(weights) if w), 0)


def collate(
    rollouts: list[Rollout], weights: list[list[float]], pad_id: int, device="cpu", extra: int = 0
) -> Batch:
    """Padded rows of these rollouts. `weights` as from `token_weights`, one list for each. extra: more padding, for tests."""
    starts = [first_weight(w) for w in weights]
    before = [tuple(r.prompt_ids + r.token_ids[:k]) for r, k in zip(rollouts, starts)]
    states = list(dict.fromkeys(before))
    B, W, L = (
        len(rollouts),
        max(map(len, states)) + extra,
        max(len(r.token_ids) - k for r, k in zip(rollouts, starts)) + extra,
    )
    ids, ids_mask = (
        torch.full((len(states), W), pad_id),
        torch.zeros((len(states), W), dtype=torch.long),
    )
    for s, state in enumerate(states):
        ids[s, W - len(state) :], ids_mask[s, W - len(state) :] = torch.tensor(state), 1
    tokens, mask = torch.full((B, L), pad_id), torch.zeros((B, L), dtype=torch.long)
    padded = torch.zeros((3, B, L), dtype=torch.float64)  # weights, old log-probs, in the prefix
    for b, (r, w, k) in enumerate(zip(rollouts, weights, starts)):
        n = len(w) - k
        tokens[b, :n], mask[b, :n] = torch.tensor(r.token_ids[k:]), 1
        padded[:, b, :n] = torch.tensor(
            [w[k:], r.logps[k:], [t < r.prefix_len for t in range(k, len(w))]], dtype=torch.float64
        )
    where = padded[0] != 0
    flat = padded[:, where]
    parts = (
        ids,
        ids_mask,
        torch.tensor([states.index(state) for state in before]),
        tokens,
        mask,
        where,
        flat[0].float(),
        flat[1].float(),
        flat[2].bool(),
    )
    return Batch(*(part.to(device) for part in parts))


class StateLayer(DynamicLayer):
    """Keys and values of the states in one layer: written by the run over the states; read, and not written, by the run over the rows that
    follow them. (transformers' own would grow when a layer is run again in the backward, with --grad_checkpointing.)"""

    def __init__(self, written=None, state=None):
        super().__init__()
        self.state = state  # [B], of the rows that read
        if written:
            self.keys, self.values, self.is_initialized = written.keys, written.values, True

    def update(self, keys, values, *args, **kwargs):
        if self.state is None:
            self.keys, self.values, self.is_initialized = keys, values, True
            return keys, values
        of_rows = lambda part: part.index_select(0, self.state)  # noqa: E731  (on a CPU the backward of part[state] adds in any order)
        return torch.cat([of_rows(self.keys), keys], -2), torch.cat(
            [of_rows(self.values), values], -2
        )


def chosen_logps(
    model, batch: Batch, temperature: float, chunk: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs [M], entropies [M], without gradient) of the tokens in `batch.where`, at the sampling temperature, in nats.

    The body of the model runs once on each state, and on the tokens of each row with the state's keys and values before them, through
    which the gradient goes back to it. The head runs only on the positions before weighted tokens, `chunk` at a time."""
    state, W = batch.state, batch.states.shape[1]
    mask = torch.cat([batch.states_mask[state], batch.tokens_mask], 1)  # [B, W + L]
    place = lambda mask: (mask.cumsum(1) - 1).clamp(min=0)  # noqa: E731  (position ids)
    layers = DynamicCache(config=model.config).layers
    if all(isinstance(layer, DynamicLayer) for layer in layers):
        written = [StateLayer() for _ in layers]
        first = model.base_model(
            input_ids=batch.states,
            attention_mask=batch.states_mask,
            position_ids=place(batch.states_mask),
            past_key_values=Cache(written),
        )
        read = [StateLayer(layer, state) for layer in written]
        rest = model.base_model(
            input_ids=batch.tokens,
            attention_mask=mask,
            position_ids=place(mask)[:, W:],
            past_key_values=Cache(read),
        )
        hidden = torch.cat(
            [
                first.last_hidden_state[:, -1:].index_select(0, state),
                rest.last_hidden_state[:, :-1],
            ],
            1,
        )
    else:  # a layer keeps something else than keys and values: whole rows
        ids = torch.cat([batch.states[state], batch.tokens], 1)
        hidden = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=place(mask), use_cache=False
        ).last_hidden_state[:, W - 1 : -1]
    hidden = hidden[batch.where]  # [M, D], at the position before each token: it predicts it
    targets = batch.tokens[batch.where]  # [M]
    head = model.get_output_embeddings()

    def score(h, y):
        logps = (head(h).float() / temperature).log_softmax(-1)  # [chunk, V], kept by nobody
        entropy = -(logps.detach().exp() * logps.detach()).sum(-1)
        return logps.gather(1, y[:, None])[:, 0], entropy

    parts = [
        checkpoint(score, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(chunk), targets.split(chunk))
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def surrogate(logps: torch.Tensor, batch: Batch, clip: float) -> torch.Tensor:
    """The loss of a batch, a scalar: REINFORCE (clip = 0), or the clipped surrogate min(ratio w, clamp(ratio, 1-clip, 1+clip) w)."""
    if clip == 0:
        return -(batch.weights * logps).sum()
    ratio = (logps - batch.old_logps).exp()
    return -torch.minimum(
        ratio * batch.weights, ratio.clamp(1 - clip, 1 + clip) * batch.weights
    ).sum()


def backward(
    model, rollouts, n_rollouts: int, pad_id: int, cfg, device="cpu", rank: int = 0, ranks: int = 1
) -> dict[str, float]:
    """Adds the gradient of L over `rollouts` (part of a step of n_rollouts) to the model's parameters, micro-batch by micro-batch.

    With several processes each takes its part of the rows; their gradients are to be summed, not averaged. All of them run the same number
    of forwards (a process that a last micro-batch leaves without a row runs one that weighs nothing), as sharded parameters need.
    Uses cfg.temperature, mask_prefix, length, clip, micro_batch, chunk. Returns sums over this process's trained tokens: loss, tokens, entropy
    (nats), gap = |sampler - trainer log-prob| on suffix and base tokens, gap_prefix on prefix tokens (prefix_tokens of them), gap_max."""
    weighted = [
        (r, token_weights(r, n_rollouts, cfg.mask_prefix, cfg.length))
        for r in rollouts
        if r.advantage != 0
    ]
    weighted.sort(
        key=lambda item: (len(item[0].prompt_ids) + first_weight(item[1]), item[0].group)
    )  # states together, little padding; the sum does not depend on it
    sums = dict.fromkeys(
        ("loss", "tokens", "entropy", "gap", "gap_prefix", "prefix_tokens", "gap_max"), 0.0
    )
    score = getattr(model, "chosen_logps", None) or partial(
        chosen_logps, model
    )  # the method of a sharded model gathers its parameters
    for at in range(0, len(weighted), cfg.micro_batch * ranks):
        block = weighted[at : at + cfg.micro_batch * ranks]
        each = -(-len(block) // ranks)
        part = block[rank * each : (rank + 1) * each] or [(block[0][0], [0.0] * len(block[0][1]))]
        batch = collate([r for r, _ in part], [w for _, w in part], pad_id, device)
        logps, entropy = score(batch, cfg.temperature, cfg.chunk)
        loss = surrogate(logps, batch, cfg.clip)
        loss.backward()
        gap = (logps.detach() - batch.old_logps).abs()
        sums["loss"] += loss.item()
        sums["tokens"] += len(logps)
        sums["entropy"] += entropy.sum().item()
        sums["gap"] += gap[~batch.in_prefix].sum().item()
        sums["gap_prefix"] += gap[batch.in_prefix].sum().item()
        sums["prefix_tokens"] += int(batch.in_prefix.sum())
        sums["gap_max"] = max([sums["gap_max"], *gap.tolist()])
    return sums


if __name__ == "__main__":
    group = [
        Rollout(
            0,
            "suffix",
            [1],
            [5, 6, 7 + i],
            [0.0] * 3,
            [2, 3],
            "answer",
            prefix_len=2,
            reward=float(i == 0),
            group=(0, 1),
        )
        for i in range(4)
    ]
    set_advantages(group)
    for rollout in group:
        print(
            f"reward {rollout.reward:.0f}  advantage {rollout.advantage:+.2f}  weights {token_weights(rollout, n_rollouts=8)}"
        )
