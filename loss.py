"""The loss: masked group-relative REINFORCE (SRPO steps 5 and 6).

    L = - 1/N sum_i A_i 1/|T_i| sum_{t in T_i} log pi(y_t | y_<t)

N: all rollouts of the step, also those whose advantage is zero. A_i: reward normalised inside its own group. T_i: every response token
of a base rollout; only the suffix tokens of a suffix rollout (the shared prefix is masked: it was not sampled for this group).

Every token gets its weight A_i / (|T_i| N) before the first backward, so the gradient is the same for any micro-batch, padding, order or
number of processes. Rollouts without weight are never run, and the language-model head runs only where a weight is not zero, in chunks
whose logits are recomputed in the backward: the [tokens, vocabulary] logits of a step never exist at once.

Left out: KL to a reference model, and token-level or sequence-level importance ratios other than the clipped surrogate (`--clip`, the
paper's ablation, with the sampler's log-probs as the old policy's).

Try it alone:  python loss.py        # a tiny group by hand: rewards, advantages, token weights
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

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
        if (first.prompt_ids, first.token_ids[: first.prefix_len]) != (rollout.prompt_ids, rollout.token_ids[:n]):
            raise ValueError(f"group {rollout.group} mixes two states; give each reset state a group of its own")
    return groups


def token_weights(rollout: Rollout, n_rollouts: int, mask_prefix: bool = True, length: str = "trained") -> list[float]:
    """Weight of each response token in the loss, one per token of `token_ids`: A / (|T| N) on T, 0 on a masked prefix.

    A = 1.5, 5 tokens of which 2 are the shared prefix, N = 8  ->  [0, 0, 1/16, 1/16, 1/16].
    length="response" (ours) divides by the whole response, prefix included, so that a short suffix is not louder:  [0, 0, 3/80, 3/80, 3/80]."""
    masked = rollout.prefix_len if mask_prefix else 0
    n = len(rollout.token_ids) - masked
    divisor = n if length == "trained" else len(rollout.token_ids)
    return [0.0] * masked + [rollout.advantage / (divisor * n_rollouts)] * n


@dataclass
class Batch:
    """Padded rows. B rows of L tokens (prompt and response), M weighted tokens among them."""

    input_ids: torch.Tensor  # [B, L]
    attention_mask: torch.Tensor  # [B, L] 1 on real tokens
    position_ids: torch.Tensor  # [B, L]
    where: torch.Tensor  # [B, L] bool: this token's weight is not zero
    weights: torch.Tensor  # [M] in row order
    old_logps: torch.Tensor  # [M] the sampler's
    in_prefix: torch.Tensor  # [M] bool: a token of the shared prefix (only without the prefix mask)


def collate(rollouts: list[Rollout], weights: list[list[float]], pad_id: int, device="cpu", pad_left: bool = False) -> Batch:
    """Rows of prompt + response, padded to the longest. `weights` as from `token_weights`, one list for each rollout."""
    rows = [r.prompt_ids + r.token_ids for r in rollouts]
    B, L = len(rows), max(map(len, rows))
    input_ids = torch.full((B, L), pad_id)
    mask = torch.zeros((B, L), dtype=torch.long)
    padded = torch.zeros((3, B, L), dtype=torch.float64)  # weights, old log-probs, in the prefix
    for b, (rollout, row, w) in enumerate(zip(rollouts, rows, weights)):
        start = L - len(row) if pad_left else 0
        input_ids[b, start : start + len(row)] = torch.tensor(row)
        mask[b, start : start + len(row)] = 1
        response = slice(start + len(rollout.prompt_ids), start + len(row))
        padded[0, b, response] = torch.tensor(w, dtype=torch.float64)
        padded[1, b, response] = torch.tensor(rollout.logps, dtype=torch.float64)
        padded[2, b, response] = torch.arange(len(w), dtype=torch.float64).lt(rollout.prefix_len).double()
    where = padded[0] != 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    flat = padded[:, where]
    return Batch(
        input_ids.to(device), mask.to(device), position_ids.to(device), where.to(device),
        flat[0].float().to(device), flat[1].float().to(device), flat[2].bool().to(device),
    )  # fmt: skip


def chosen_logps(model, batch: Batch, temperature: float, chunk: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs [M], entropies [M], without gradient) of the tokens in `batch.where`, at the sampling temperature, in nats.

    The body of the model runs on whole rows; its head only on the positions before those tokens, `chunk` at a time."""
    out = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
    before = batch.where[:, 1:]  # the position before token t predicts it
    hidden = out.last_hidden_state[:, :-1][before]  # [M, D]
    targets = batch.input_ids[:, 1:][before]  # [M]
    head = model.get_output_embeddings()

    def score(h, y):
        logps = (head(h).float() / temperature).log_softmax(-1)  # [chunk, V], kept by nobody
        entropy = -(logps.detach().exp() * logps.detach()).sum(-1)
        return logps.gather(1, y[:, None])[:, 0], entropy

    parts = [checkpoint(score, h, y, use_reentrant=False) for h, y in zip(hidden.split(chunk), targets.split(chunk))]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def surrogate(logps: torch.Tensor, batch: Batch, clip: float) -> torch.Tensor:
    """The loss of a batch, a scalar: REINFORCE (clip = 0), or the clipped surrogate min(ratio w, clamp(ratio, 1-clip, 1+clip) w)."""
    if clip == 0:
        return -(batch.weights * logps).sum()
    ratio = (logps - batch.old_logps).exp()
    return -torch.minimum(ratio * batch.weights, ratio.clamp(1 - clip, 1 + clip) * batch.weights).sum()


def backward(model, rollouts, n_rollouts: int, pad_id: int, cfg, device="cpu", rank: int = 0, ranks: int = 1) -> dict[str, float]:
    """Adds the gradient of L over `rollouts` (part of a step of n_rollouts) to the model's parameters, micro-batch by micro-batch.

    With several processes each takes every ranks-th row; their gradients are to be summed, not averaged. All of them run the same number
    of forwards (a process that a last micro-batch leaves without a row runs one that weighs nothing), as sharded parameters need.
    Uses cfg.temperature, mask_prefix, length, clip, micro_batch, chunk. Returns sums over this process's trained tokens: loss, tokens, entropy
    (nats), gap = |sampler - trainer log-prob| on suffix and base tokens, gap_prefix on prefix tokens (prefix_tokens of them), gap_max."""
    weighted = [(r, token_weights(r, n_rollouts, cfg.mask_prefix, cfg.length)) for r in rollouts if r.advantage != 0]
    weighted.sort(key=lambda item: len(item[0].prompt_ids) + len(item[0].token_ids))  # little padding; the sum does not depend on it
    sums = dict.fromkeys(("loss", "tokens", "entropy", "gap", "gap_prefix", "prefix_tokens", "gap_max"), 0.0)
    score = getattr(model, "chosen_logps", None) or partial(chosen_logps, model)  # the method of a sharded model gathers its parameters
    for at in range(0, len(weighted), cfg.micro_batch * ranks):
        part = weighted[at : at + cfg.micro_batch * ranks][rank::ranks] or [(weighted[at][0], [0.0] * len(weighted[at][1]))]
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
    group = [Rollout(0, "suffix", [1], [5, 6, 7 + i], [0.0] * 3, [2, 3], "answer", prefix_len=2, reward=float(i == 0), group=(0, 1)) for i in range(4)]
    set_advantages(group)
    for rollout in group:
        print(f"reward {rollout.reward:.0f}  advantage {rollout.advantage:+.2f}  weights {token_weights(rollout, n_rollouts=8)}")
