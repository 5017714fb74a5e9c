"""The loss: masked group-relative REINFORCE (SRPO steps 5 and 6).

    L = - 1/N sum_i 1/|T_i| sum_{t in T_i} A_i(t) log pi(y_t | y_<t)

N       all trained rollouts of the step, also those whose advantages are zero
A_i(t)  advantage of the thought that holds token t: by default one number for the whole rollout,
        its reward normalised inside its own group; a program may set one for each thought
T_i     trained tokens: every response token of a base rollout, only the suffix of a suffix rollout
        (the shared prefix is masked: it was not sampled for this group)
pi      the policy at the sampling temperature; y_t is token t of the response, y_<t all before it

So every rollout has the same weight, 1/N, whatever its group. A prompt with one group of 4 has half
the weight of a prompt with two, and one with 5 rollouts 5/8 of one with 8. Flat groups (all
rewards equal) count in N: a step in which most groups are flat is a small step.

From top to bottom this file follows the equation: `set_advantages` gives A_i, `token_weights` gives
A_i(t) / (|T_i| N), `collate` makes padded tensors, `body_and_head` gives log pi(y_t | y_<t),
`surrogate` sums weight times log-prob, and `backward` adds up the gradient.

All weights are known before the first forward. So the gradient does not depend on micro-batches,
padding, order or the number of processes, and the head (`through_head`) needs its logits only for
a moment: it runs on one chunk of trained tokens after the other, forward and backward, and the
[tokens, vocabulary] logits of a step never exist at once. torch's own chunked head,
`torch.nn.functional.linear_cross_entropy`, gives no entropies, and takes a matrix, no module.

Left out: a KL term and a reference model, as in the paper. Importance ratios other than the clipped
surrogate (`--clip`, the paper's ablation, with the sampler's log-probs as the old policy's).

Try it alone:  python loss.py    # a tiny group by hand: rewards, advantages, token weights
"""

from dataclasses import dataclass, fields
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

from data.contexts import can_share, hidden_of_shared_contexts, positions
from data.metrics import Sums, sums_of
from rollout import Rollout, grouped

# -------------------------------------------------------------------------- advantages and weights


def set_advantages(rollouts: list[Rollout], normalize: bool = True) -> None:
    """Writes A_i = (r_i - mean) / std of its own group into each rollout. Paper step 5.

    std is the population's; all A are zero where std < 1e-8. Rewards 1, 0, 0, 0 give advantages
    1.73, -0.58, -0.58, -0.58, the same for all thoughts of a rollout. Groups whose program has set
    advantages keep them. normalize=False does not divide by std: the expected gradient is then
    (G-1)/G times the state's own (for tests and tests/gradient.py). Raises ValueError if a group
    does not start from one state.
    """
    for group, members in grouped(rollouts).items():
        if all(rollout.advantages is not None for rollout in members):
            continue
        check_group(group, members)
        rewards = torch.tensor([rollout.reward for rollout in members], dtype=torch.float64)
        std = rewards.std(correction=0)
        scale = 1 / std if normalize else 1.0
        if std < 1e-8:  # a flat group
            scale = 0.0
        advantages = (rewards - rewards.mean()) * scale
        for rollout, advantage in zip(members, advantages.tolist()):
            rollout.advantages = [advantage] * len(rollout.thought_ends)


def check_group(group: tuple[int, int], members: list[Rollout]) -> None:
    """Rewards can be compared only between continuations of one state."""
    if any(rollout.advantages is not None for rollout in members):
        raise ValueError(f"group {group}: its program sets the advantages of some, but not of all")
    if any(rollout.trained_state() != members[0].trained_state() for rollout in members):
        raise ValueError(
            f"group {group} mixes two states; give each reset state a group of its own"
        )


def token_weights(
    rollout: Rollout,
    n_rollouts: int,
    mask_prefix: bool = True,
    length: str = "trained",
    n_tokens: int = 0,
) -> list[float]:
    """Weight of each response token in the loss: A / (|T| N) on T, 0 on a masked prefix.

    A = 1.5, 5 tokens of which 2 are the shared prefix, N = 8  ->  [0, 0, 1/16, 1/16, 1/16].
    length="response" (ours) divides by the whole response, prefix included, so that a token of a
    short suffix does not weigh more than one of a base rollout  ->  [0, 0, 3/80, 3/80, 3/80].
    length="step" divides by the n_tokens trained tokens of the step: all weigh the same.
    """
    masked = rollout.masked(mask_prefix)
    n = len(rollout.token_ids)
    if length == "step":
        divisor = n_tokens
    else:
        divisor = n_rollouts * (n - masked if length == "trained" else n)
    weights = []
    for advantage, end in zip(rollout.advantages, rollout.thought_ends):
        weights += [advantage / max(1, divisor)] * (end - len(weights))
    return [0.0] * masked + weights[masked:]


@dataclass
class Weighted:
    """A rollout, the weight of each of its response tokens, and which of them are trained.

    A trained token may have weight 0: nothing pulls it, but an entropy bonus or a KL term could.
    """

    rollout: Rollout
    weights: list[float]
    trained: list[bool]

    @property
    def start(self) -> int:
        """Response tokens before the first trained one; 0 where none is."""
        return self.trained.index(True) if True in self.trained else 0

    @property
    def own_length(self) -> int:
        """Tokens from the first trained one on."""
        return len(self.rollout.token_ids) - self.start

    @property
    def context(self) -> tuple[int, ...]:
        """Token ids before the first trained one: the prompt and, if it is masked, the prefix."""
        prompt_ids = self.rollout.trained_prompt or self.rollout.prompt_ids
        return tuple(prompt_ids + self.rollout.token_ids[: self.start])


def weigh(rollouts: list[Rollout], cfg) -> list[Weighted]:
    """All trained rollouts of a step with their weights. Uses cfg.mask_prefix and length."""
    masked = [rollout.masked(cfg.mask_prefix) for rollout in rollouts]
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    n_tokens = sum(lengths) - sum(masked)
    items = []
    for rollout, m, n in zip(rollouts, masked, lengths):
        weights = token_weights(rollout, len(rollouts), cfg.mask_prefix, cfg.length, n_tokens)
        items.append(Weighted(rollout, weights, [False] * m + [True] * (n - m)))
    return items


# ------------------------------------------------------------------------------------------- batch


@dataclass
class Tokens:
    """The M trained tokens of a batch, in row order. Each field is a tensor [M]."""

    ids: torch.Tensor
    weights: torch.Tensor
    old_logps: torch.Tensor  # the sampler's, nats
    in_prefix: torch.Tensor  # bool: in a kept prefix that is trained (no mask; the walk)
    off_policy: torch.Tensor  # bool: sampled from another prompt

    def to(self, device) -> "Tokens":
        return Tokens(*(getattr(self, f.name).to(device) for f in fields(self)))

    def split(self, size: int) -> list["Tokens"]:
        """Parts of at most `size` tokens, in order."""
        columns = [getattr(self, f.name).split(size) for f in fields(self)]
        return [Tokens(*part) for part in zip(*columns)]


@dataclass
class Batch:
    """B rollouts over S distinct contexts: contexts left-padded, tokens right-padded.

    Rollouts of a group share their context (the prompt, or the reset state): it is stored once.
    W: longest context, L: longest row of tokens.
    """

    contexts: torch.Tensor  # [S, W] token ids
    contexts_mask: torch.Tensor  # [S, W] 1 on real tokens
    context_of: torch.Tensor  # [B] row of `contexts`
    tokens: torch.Tensor  # [B, L] token ids from the first trained one on
    tokens_mask: torch.Tensor  # [B, L] 1 on real tokens
    trained: torch.Tensor  # [B, L] bool
    chosen: Tokens  # [M] the trained ones of `tokens`

    def to(self, device) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device) for f in fields(self)))


def collate(items: list[Weighted], pad_id: int) -> Batch:
    """Padded tensors of these rollouts, on the CPU.

    Two rollouts [1 | 5, 6] and [1 | 7] of prompt [1], weights 0.5 and -0.5, pad 0:
    contexts [[1]], context_of [0, 0], tokens [[5, 6], [7, 0]], chosen.weights [0.5, 0.5, -0.5].
    """
    row_of = {}  # context -> its row
    for item in items:
        row_of.setdefault(item.context, len(row_of))
    rows, trained, weights, old_logps, in_prefix, off_policy = [], [], [], [], [], []
    for item in items:
        rollout, start = item.rollout, item.start
        n = len(rollout.token_ids)
        rows.append(rollout.token_ids[start:])
        trained.append(item.trained[start:])
        weights.append(item.weights[start:])
        old_logps.append(rollout.logps[start:])
        in_prefix.append([place < rollout.prefix_len for place in range(start, n)])
        off_policy.append([rollout.trained_prompt is not None] * (n - start))
    contexts = [list(context) for context in row_of]
    where = padded(trained, False)
    tokens = padded(rows, pad_id)
    chosen = Tokens(
        ids=tokens[where],
        weights=padded(weights, 0.0)[where].float(),
        old_logps=padded(old_logps, 0.0)[where].float(),
        in_prefix=padded(in_prefix, False)[where],
        off_policy=padded(off_policy, False)[where],
    )
    return Batch(
        contexts=padded(contexts, pad_id, side="left"),
        contexts_mask=padded([[1] * len(context) for context in contexts], 0, side="left"),
        context_of=torch.tensor([row_of[item.context] for item in items]),
        tokens=tokens,
        tokens_mask=padded([[1] * len(row) for row in rows], 0),
        trained=where,
        chosen=chosen,
    )


def padded(rows: list[list], value, side: str = "right") -> torch.Tensor:
    # Weights and log-probs stay exact until collate rounds them once, to float32.
    dtype = torch.float64 if isinstance(value, float) else None
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


# --------------------------------------------------------------------------------------- log-probs


def body_and_head(model, batch: Batch, cfg) -> tuple[torch.Tensor, "Scored"]:
    """Runs the body, then the head forward and backward: (hidden states [M, D], `Scored`).

    The body runs on context and tokens; the hidden state one position before each trained token
    goes through the head, which gives log pi(y_t | y_<t) at the sampling temperature. Adds to the
    gradient of the head; `backward` goes on from the hidden states, through the body.
    """
    # Both give the same numbers; the second is the plain way, the first is faster.
    hidden_of = hidden_of_shared_contexts if can_share(model) else hidden_of_rows
    hidden = hidden_of(model, batch)  # [B, L, D]: the state one position earlier predicts the token
    hidden = hidden[batch.trained]  # [M, D]
    return hidden, through_head(model.get_output_embeddings(), hidden, batch.chosen, cfg)


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
    return out.last_hidden_state[:, W - 1 : -1]  # position W - 1 predicts the first token


@dataclass
class Scored:
    """What the head gives for M trained tokens. Nothing in it carries a gradient."""

    logps: torch.Tensor  # [M] nats
    entropies: torch.Tensor  # [M] of the whole next-token distribution, nats
    loss: torch.Tensor  # the batch's part of L, a scalar
    hidden_grad: torch.Tensor  # [M, D] of the loss with respect to the hidden states


CHUNK = {"cpu": 256, "cuda": 4096}  # tokens; on a CPU larger logits get new memory each time


def through_head(head, hidden: torch.Tensor, chosen: Tokens, cfg) -> Scored:
    """Head, loss and their backward, on one chunk of the hidden states [M, D] after the other.

    Adds to the gradient of the head's parameters. Uses cfg.temperature, clip, off_policy_shape,
    chunk (tokens; 0: see CHUNK).
    """
    chunk = cfg.chunk or CHUNK[hidden.device.type]
    logps, entropies, losses, grads = [], [], [], []
    for part, tokens in zip(hidden.detach().split(chunk), chosen.split(chunk)):
        part.requires_grad_()  # the backward stops here: that of the body runs once, for all chunks
        logp, entropy = score(head, part, tokens.ids, cfg.temperature)
        loss = surrogate(logp, tokens, cfg.clip, cfg.off_policy_shape)
        loss.backward()  # frees the logits of this chunk
        logps.append(logp.detach())
        entropies.append(entropy)
        losses.append(loss.detach())
        grads.append(part.grad)
    loss = torch.stack(losses).sum()
    return Scored(torch.cat(logps), torch.cat(entropies), loss, torch.cat(grads))


def score(head, hidden: torch.Tensor, targets: torch.Tensor, temperature: float):
    """(log-probs, entropies) [chunk] of target tokens [chunk], from hidden states [chunk, D].

    Entropies carry no gradient.
    """
    logps = (head(hidden).float() / temperature).log_softmax(-1)  # [chunk, V]
    entropies = -(logps.detach().exp() * logps.detach()).sum(-1)
    return logps.gather(1, targets[:, None])[:, 0], entropies


# ------------------------------------------------------------------------------------ the gradient


def surrogate(logps: torch.Tensor, tokens: Tokens, clip: float, shape: float = 0.0) -> torch.Tensor:
    """The part of L that these tokens [M] have, a scalar. Paper step 6.

    clip = 0: REINFORCE. Else the clipped surrogate min(ratio w, clamp(ratio, 1-clip, 1+clip) w).
    Off-policy tokens have no ratio: their term is w log p, or w p / (p + shape) with shape > 0,
    which pulls most on the tokens that the policy finds unlikely (Critique-GRPO: 0.1).
    """
    terms = tokens.weights * logps
    if clip > 0:
        ratio = (logps - tokens.old_logps).exp()
        clipped = ratio.clamp(1 - clip, 1 + clip)
        bounded = torch.minimum(ratio * tokens.weights, clipped * tokens.weights)
        terms = torch.where(tokens.off_policy, terms, bounded)
    if shape > 0:
        p = logps.exp()
        terms = torch.where(tokens.off_policy, tokens.weights * p / (p + shape), terms)
    return -terms.sum()


def backward(
    model, items: list[Weighted], pad_id: int, cfg, device="cpu", rank: int = 0, ranks: int = 1
) -> Sums:
    """Adds the gradient of L over these rollouts to the parameters.

    With several processes each takes its part of the rows; their gradients are to be summed, not
    averaged. Uses cfg.temperature, clip, off_policy_shape, micro_batch, chunk. Returns the sums
    over this process's tokens.
    """
    # The method of a sharded model gathers its parameters; see data/parallel.py.
    run = getattr(model, "body_and_head", None) or partial(body_and_head, model)
    sums = Sums()
    for part in micro_batches(items, cfg.micro_batch, rank, ranks):
        batch = collate(part, pad_id).to(device)
        hidden, scored = run(batch, cfg)
        hidden.backward(scored.hidden_grad)  # the chain rule, from where `through_head` stopped
        sums.add(sums_of(scored, batch.chosen))
    return sums


def micro_batches(items: list[Weighted], size: int, rank: int, ranks: int) -> list[list[Weighted]]:
    """This process's micro-batches of at most `size` rollouts: the same number on every process.

    With sharded parameters all processes must run the same number of forwards. A process that gets
    no rollout of the last block runs one in which no token is trained.
    """

    def by_context(item):  # groups stay together: each context runs once
        return len(item.context), item.rollout.group

    def by_length(item):  # little padding, where the responses of a group differ in length
        return item.own_length, len(item.context), item.rollout.group

    def cost(order):
        return sum(tokens_run(order[at : at + size]) for at in range(0, len(order), size))

    items = min(sorted(items, key=by_context), sorted(items, key=by_length), key=cost)
    mine = []
    for at in range(0, len(items), size * ranks):
        block = items[at : at + size * ranks]
        share = (len(block) + ranks - 1) // ranks
        part = block[rank * share : (rank + 1) * share]
        if not part:
            rollout = block[0].rollout
            n = len(rollout.token_ids)
            part = [Weighted(rollout, [0.0] * n, [False] * n)]
        mine.append(part)
    return mine


def tokens_run(part: list[Weighted]) -> int:
    """Tokens that a micro-batch runs, padding included: its distinct contexts, then its rows."""
    contexts = {item.context for item in part}
    longest = max(item.own_length for item in part)
    return len(contexts) * max(map(len, contexts)) + len(part) * longest


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
        advantage = rollout.advantages[0]
        print(f"reward {rollout.reward:.0f}  advantage {advantage:+.2f}  weights {weights}")


if __name__ == "__main__":
    demo()
