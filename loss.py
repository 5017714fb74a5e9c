"""The loss: masked group-relative REINFORCE (SRPO steps 5 and 6).

    L = - 1/N sum_i A_i 1/|T_i| sum_{t in T_i} log pi(y_t | y_<t)

N     all rollouts of the step, also those whose advantage is zero
A_i   advantage: the reward of rollout i, normalised inside its own group
T_i   trained tokens: every response token of a base rollout, only the suffix of a suffix rollout
      (the shared prefix is masked: it was not sampled for this group)
pi    the policy at the sampling temperature; y_t is token t of the response, y_<t all before it

From top to bottom this file follows the equation: `set_advantages` gives A_i, `token_weights` gives
A_i / (|T_i| N) for each token, `collate` makes padded tensors, `chosen_logps` gives
log pi(y_t | y_<t), `surrogate` sums weight times log-prob, and `backward` adds up the gradient.

All weights are known before the first backward, so the gradient does not depend on micro-batches,
padding, order or the number of processes. Rollouts without weight are not run. The language-model
head runs only where a weight is not zero, in chunks whose logits are computed again in the
backward: the [tokens, vocabulary] logits of a step never exist at once.

Left out: a KL term and a reference model, as in the paper. Importance ratios other than the clipped
surrogate (`--clip`, the paper's ablation, with the sampler's log-probs as the old policy's).

Try it alone:  python loss.py    # a tiny group by hand: rewards, advantages, token weights
"""

from dataclasses import dataclass, fields
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from data.contexts import can_share, hidden_of_shared_contexts, positions
from data.metrics import Sums, sums_of
from rollout import Rollout, grouped

# -------------------------------------------------------------------------- advantages and weights


def set_advantages(rollouts: list[Rollout], normalize: bool = True) -> None:
    """Writes A_i = (r_i - mean) / std of its own group into each rollout. Paper step 5.

    std is the population's; all A are zero where std < 1e-8. Rewards 1, 0, 0, 0 give advantages
    1.73, -0.58, -0.58, -0.58. normalize=False leaves the std out (tests: an unbiased gradient).
    """
    for members in grouped(rollouts).values():
        rewards = torch.tensor([r.reward for r in members], dtype=torch.float64)
        std = rewards.std(correction=0)
        if std < 1e-8:
            scale = 0.0
        elif normalize:
            scale = 1 / std
        else:
            scale = 1.0
        advantages = (rewards - rewards.mean()) * scale
        for rollout, advantage in zip(members, advantages.tolist()):
            rollout.advantage = advantage


def token_weights(
    rollout: Rollout, n_rollouts: int, mask_prefix: bool = True, length: str = "trained"
) -> list[float]:
    """Weight of each response token in the loss: A / (|T| N) on T, 0 on a masked prefix.

    A = 1.5, 5 tokens of which 2 are the shared prefix, N = 8  ->  [0, 0, 1/16, 1/16, 1/16].
    length="response" (ours) divides by the whole response, prefix included: a short suffix is then
    not louder than a base rollout  ->  [0, 0, 3/80, 3/80, 3/80].
    """
    masked = rollout.prefix_len if mask_prefix else 0
    trained = len(rollout.token_ids) - masked
    divisor = trained if length == "trained" else len(rollout.token_ids)
    return [0.0] * masked + [rollout.advantage / (divisor * n_rollouts)] * trained


# ------------------------------------------------------------------------------------------- batch


@dataclass
class Weighted:
    """A rollout with the weight of each of its response tokens."""

    rollout: Rollout
    weights: list[float]

    @property
    def start(self) -> int:
        """Response tokens before the first one that has a weight; 0 where none has."""
        for i, weight in enumerate(self.weights):
            if weight:
                return i
        return 0

    @property
    def context(self) -> tuple[int, ...]:
        """Token ids before the first weighted one: the prompt and, if it is masked, the prefix."""
        return tuple(self.rollout.prompt_ids + self.rollout.token_ids[: self.start])


@dataclass
class Batch:
    """B rollouts over S distinct contexts: contexts left-padded, tokens right-padded.

    The rollouts of a group share their prompt, or their reset state: it is there once. M tokens of
    the batch have a weight.
    """

    contexts: torch.Tensor  # [S, W] token ids
    contexts_mask: torch.Tensor  # [S, W] 1 on real tokens
    context_of: torch.Tensor  # [B] row of `contexts`
    tokens: torch.Tensor  # [B, L] token ids from the first weighted one on
    tokens_mask: torch.Tensor  # [B, L] 1 on real tokens
    weighted: torch.Tensor  # [B, L] bool: this token's weight is not zero
    weights: torch.Tensor  # [M] of the weighted tokens, in row order
    old_logps: torch.Tensor  # [M] the sampler's
    in_prefix: torch.Tensor  # [M] bool: a token of the shared prefix (only without the mask)

    def to(self, device) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device) for f in fields(self)))


def collate(items: list[Weighted], pad_id: int) -> Batch:
    """Padded tensors of these rollouts, on the CPU.

    Two rollouts [1 | 5, 6] and [1 | 7] of prompt [1], weights 0.5 and -0.5, pad 0:
    contexts [[1]], context_of [0, 0], tokens [[5, 6], [7, 0]], weights [0.5, 0.5, -0.5].
    """
    row_of = {}  # context -> its row
    for item in items:
        row_of.setdefault(item.context, len(row_of))
    rows, weights, old_logps, in_prefix = [], [], [], []
    for item in items:
        rollout, start = item.rollout, item.start
        rows.append(rollout.token_ids[start:])
        weights.append(item.weights[start:])
        old_logps.append(rollout.logps[start:])
        places = range(start, len(rollout.token_ids))
        in_prefix.append([place < rollout.prefix_len for place in places])
    contexts = [list(context) for context in row_of]
    padded_weights = padded(weights, 0.0)
    weighted = padded_weights != 0
    return Batch(
        contexts=padded(contexts, pad_id, side="left"),
        contexts_mask=padded([[1] * len(context) for context in contexts], 0, side="left"),
        context_of=torch.tensor([row_of[item.context] for item in items]),
        tokens=padded(rows, pad_id),
        tokens_mask=padded([[1] * len(row) for row in rows], 0),
        weighted=weighted,
        weights=padded_weights[weighted].float(),
        old_logps=padded(old_logps, 0.0)[weighted].float(),
        in_prefix=padded(in_prefix, False)[weighted],
    )


def padded(rows: list[list], value, side: str = "right") -> torch.Tensor:
    dtype = torch.float64 if isinstance(value, float) else None
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


# --------------------------------------------------------------------------------------- log-probs


def chosen_logps(
    model, batch: Batch, temperature: float, chunk: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs [M], entropies [M]) of the weighted tokens, at the sampling temperature, in nats.

    Log-probs carry the gradient; entropies do not. chunk: tokens per call of the head.
    """
    hidden_of = hidden_of_shared_contexts if can_share(model) else hidden_of_rows
    hidden = hidden_of(model, batch)  # [B, L, D]
    hidden = hidden[batch.weighted]  # [M, D] at the position before each token: it predicts it
    targets = batch.tokens[batch.weighted]  # [M]
    head = model.get_output_embeddings()
    logps, entropies = [], []
    for h, y in zip(hidden.split(chunk), targets.split(chunk)):
        # The chunk's logits are not kept for the backward, but computed again in it.
        logp, entropy = checkpoint(score, head, h, y, temperature, use_reentrant=False)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


def hidden_of_rows(model, batch: Batch) -> torch.Tensor:
    """Hidden states [B, L, D] before each token: each row is its context, then its tokens.

    The plain way: a context runs once for each of its rollouts.
    """
    W = batch.contexts.shape[1]
    ids = torch.cat([batch.contexts[batch.context_of], batch.tokens], 1)  # [B, W + L]
    mask = torch.cat([batch.contexts_mask[batch.context_of], batch.tokens_mask], 1)
    out = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
    )
    return out.last_hidden_state[:, W - 1 : -1]


def score(head, hidden: torch.Tensor, targets: torch.Tensor, temperature: float):
    """(log-probs, entropies) [chunk] of target tokens [chunk], from hidden states [chunk, D]."""
    logps = (head(hidden).float() / temperature).log_softmax(-1)  # [chunk, V]
    entropies = -(logps.detach().exp() * logps.detach()).sum(-1)
    return logps.gather(1, targets[:, None])[:, 0], entropies


# ------------------------------------------------------------------------------------ the gradient


def surrogate(logps: torch.Tensor, batch: Batch, clip: float) -> torch.Tensor:
    """The batch's part of L, a scalar. Paper step 6.

    clip = 0: REINFORCE. Else the clipped surrogate min(ratio w, clamp(ratio, 1-clip, 1+clip) w).
    """
    if clip == 0:
        return -(batch.weights * logps).sum()
    ratio = (logps - batch.old_logps).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * batch.weights, clipped * batch.weights).sum()


def backward(
    model, rollouts, n_rollouts: int, pad_id: int, cfg, device="cpu", rank: int = 0, ranks: int = 1
) -> Sums:
    """Adds the gradient of L over `rollouts`, part of a step of n_rollouts, to the parameters.

    With several processes each takes its part of the rows; their gradients are to be summed, not
    averaged. Uses cfg.temperature, mask_prefix, length, clip, micro_batch, chunk. Returns the sums
    over this process's tokens.
    """
    items = []
    for r in rollouts:
        if r.advantage != 0:
            items.append(Weighted(r, token_weights(r, n_rollouts, cfg.mask_prefix, cfg.length)))
    # The method of a sharded model gathers its parameters; see data/parallel.py.
    logps_of = getattr(model, "chosen_logps", None) or partial(chosen_logps, model)
    sums = Sums()
    for part in micro_batches(items, cfg.micro_batch, rank, ranks):
        batch = collate(part, pad_id).to(device)
        logps, entropies = logps_of(batch, cfg.temperature, cfg.chunk)
        loss = surrogate(logps, batch, cfg.clip)
        loss.backward()
        sums.add(sums_of(loss, logps, entropies, batch.old_logps, batch.in_prefix))
    return sums


def micro_batches(items: list[Weighted], size: int, rank: int, ranks: int) -> list[list[Weighted]]:
    """This process's micro-batches of at most `size` rollouts: the same number on every process.

    Sharded parameters need that all processes run as many forwards. A process that gets no rollout
    of the last block runs one without weight.
    """

    def order(item):  # like lengths together, for little padding; then groups, for shared contexts
        return len(item.context), item.rollout.group

    items = sorted(items, key=order)
    mine = []
    for at in range(0, len(items), size * ranks):
        block = items[at : at + size * ranks]
        share = (len(block) + ranks - 1) // ranks
        part = block[rank * share : (rank + 1) * share]
        idle = Weighted(block[0].rollout, [0.0] * len(block[0].weights))
        mine.append(part or [idle])
    return mine


def demo() -> None:
    group = []
    for i in range(4):
        token_ids = [5, 6, 7 + i]
        rollout = Rollout(0, "suffix", [1], token_ids, [0.0] * 3, [2, 3], "answer", prefix_len=2)
        rollout.reward, rollout.group = float(i == 0), (0, 1)
        group.append(rollout)
    set_advantages(group)
    for rollout in group:
        weights = token_weights(rollout, n_rollouts=8)
        print(f"reward {rollout.reward:.0f}  advantage {rollout.advantage:+.2f}  weights {weights}")


if __name__ == "__main__":
    demo()
