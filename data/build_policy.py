"""Builds the embedded policy: a small Llama that solves the chain task and reviews itself.

It is pre-trained on chains (data/chains.py) that an imaginary student writes. The student gets
each fact (operation, value) right with a fixed probability p of that fact, and otherwise always
gives the same wrong value, its misconception. So the policy samples the right value of a fact with
probability about p, its errors are scattered over the chain, and reinforcement alone can unlearn
every fact. The box at the end repeats all values of the chain, right or wrong. Each wrong chain of
the corpus is followed by a review: the policy repeats its thoughts and judges each one.

    mod97 1: +7 2: *3 start 41 .
    1: +7 = 48 </thought> 2: *3 = 50 </thought> \\boxed{ 48 50 } </thought>
    <locate> start 41 . 1: +7 = 48 ok 2: *3 = 50 wrong \\boxed{ 2 } <eos>

Reviews are labelled with the truth, so the policy reviews better than it writes. Two exercises go
with the chains: drills teach what is true, and quotations teach to repeat what is written, in the
box and in the review. All three have all lengths from 2 to 12 steps.

Where this task is on the README's map of "where do resets pay": 12 steps; a pass rate of 0.04, so
most base groups have no success; errors anywhere in the chain; localization well above the
break-even of 0.5 to 0.6; and 1,940 facts, so that training takes 100 steps or more.

Left out: RL (this is next-token training), and padding: the chains of a batch have the same number
of steps, and what follows a short review is not trained on.

Try it alone:
    python -m data.build_policy --out data/policy     # about 25 minutes of one idle core
    python -m data.build_policy --card data/policy    # only measures it and writes its model card
    python -m data.build_policy --card data/policy --trained runs/A/checkpoints/step_80   # and luck
The policy is a function of --seed, on one kind of machine: it is built on one thread, whatever
OMP_NUM_THREADS says.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.chains import MAX_STEPS, MODULUS, OPERATIONS, apply, generate_chains
from data.curves import wilson
from data.driver import run_programs
from data.faults import UserError, counters
from data.lines import check_writable
from data.policies import load_policy
from data.verifiers import DELIMITER, last_boxed
from localize import by_self
from rollout import HFEngine, Rollout, Task, grpo, make_tasks

# The mean of p is 0.77, and 0.77^12 = 0.04 of the chains of 12 steps come out right.
HARD_SHARE = 0.17  # share of hard facts
HARD = (0.20, 0.45)  # range of p of a hard fact
EASY = (0.75, 0.99)  # range of p of any other fact
STEPS = 12  # longest chains of the corpus: those of the default task


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each number, operation and step label; text is split at blanks."""
    words = ["<pad>", "<eos>", f"mod{MODULUS}", "start", ".", "=", DELIMITER, "\\boxed{", "}"]
    words += ["<locate>", "ok", "wrong"]
    words += [str(value) for value in range(MODULUS)]
    words += [f"{i}:" for i in range(1, MAX_STEPS + 1)]
    words += OPERATIONS
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


# ------------------------------------------------------------------------------- where tokens stand

# The five tokens of a step, `2: *3 = 50 </thought>`. In a review the mark is `ok` or `wrong`.
LABEL, OPERATION, EQUALS, VALUE, MARK = range(5)
STEP_TOKENS = 5

REVIEW_HEAD = 4  # `<locate> start 41 .`, before the steps of a review
BOX_TOKENS = 4  # `\boxed{ 2 } <eos>`, after them
BOX_NUMBER = 1  # place of the first number among the tokens of a box

# What a token is, for the progress report.
OTHER, RESULT, JUDGEMENT, BOXED_STEP, BOXED_VALUE = range(5)


def columns_of(token: int, steps: int, start: int) -> np.ndarray:
    """Columns [steps] of one token (LABEL to MARK) of each of the steps that begin at `start`."""
    return start + token + STEP_TOKENS * np.arange(steps)


@dataclass
class Text:
    """B rows of L tokens, with what training needs to know of each token."""

    ids: np.ndarray  # [B, L] token ids
    mask: np.ndarray  # [B, L] bool: trained on
    kind: np.ndarray  # [B, L] OTHER, RESULT, JUDGEMENT, BOXED_STEP or BOXED_VALUE


@dataclass
class Chains:
    """B chains of K steps."""

    operations: np.ndarray  # [B, K] places in OPERATIONS
    start: np.ndarray  # [B] numbers
    values: np.ndarray  # [B, K] results, as they are written
    right: np.ndarray  # [B, K] bool: the step is true of the value before it


# -------------------------------------------------------------------------------------- the student


class Student:
    """Writes batches of chains with planted misconceptions, as token ids."""

    def __init__(self, tokenizer, seed: int):
        self.rng = np.random.default_rng([seed, 1])
        facts = (len(OPERATIONS), MODULUS)
        self.truth = np.zeros(facts, int)
        for i, operation in enumerate(OPERATIONS):
            self.truth[i] = [apply(operation, value) for value in range(MODULUS)]
        self.wrong = (self.truth + self.rng.integers(1, MODULUS, facts)) % MODULUS
        is_hard = self.rng.random(facts) < HARD_SHARE
        hard = self.rng.uniform(*HARD, facts)
        easy = self.rng.uniform(*EASY, facts)
        self.p = np.where(is_hard, hard, easy)
        # nats: the mean entropy of a value, the least that its loss can be
        self.floor = -(self.p * np.log(self.p) + (1 - self.p) * np.log(1 - self.p)).mean()

        self.id = tokenizer.get_vocab()
        self.numbers = np.array([self.id[str(value)] for value in range(MODULUS)])
        self.labels = np.array([self.id[f"{i}:"] for i in range(1, MAX_STEPS + 1)])
        self.operations = np.array([self.id[operation] for operation in OPERATIONS])

    def batch(self, B: int, K: int, review: bool) -> Text:
        """B chains of K steps, followed by a review of each wrong one if `review`."""
        chains = self.draw(B, K)
        solution = self.solution(chains)
        if not review:
            return solution
        return side_by_side(solution, self.review(chains))

    def drills(self, B: int, K: int) -> Text:
        """B reviews of K steps each, without a box; only the marks are trained.

        Half of the values are right, a quarter are the student's error, a quarter are any other
        error: a judgement is about what is true, not about what the student would say. The right
        values themselves are not taught: a policy that is taught them can write them at once,
        reinforcement only has to bring them out, and twenty steps take it to a pass rate of 0.84.
        """
        chains = self.draw(B, K)
        value = chains.start
        for k in range(K):
            fact = (chains.operations[:, k], value)
            truth = self.truth[fact]
            any_error = (truth + self.rng.integers(1, MODULUS, size=B)) % MODULUS
            draw = self.rng.random(B)
            chains.right[:, k] = draw < 0.5
            value = np.select([draw < 0.5, draw < 0.75], [truth, self.wrong[fact]], any_error)
            chains.values[:, k] = value
        ids = self.judged_steps(chains, self.judgement(chains.right))
        kind = np.full(ids.shape, OTHER)
        kind[:, columns_of(MARK, K, start=REVIEW_HEAD)] = JUDGEMENT
        return Text(ids, kind == JUDGEMENT, kind)

    def quotations(self, B: int, K: int) -> Text:
        """B chains with random values, which a box and a review repeat; only these are trained.

        A policy that knows a fact tends to repeat the value that it expects, not the written one.
        Then its box hides an error, and its review judges another value."""
        chains = self.draw(B, K)
        chains.values = self.rng.integers(MODULUS, size=(B, K))
        written = self.solution(chains)
        written.mask = written.kind == BOXED_VALUE
        repeated = self.judged_steps(chains, self.id["ok"])
        kind = np.full(repeated.shape, OTHER)
        kind[:, columns_of(VALUE, K, start=REVIEW_HEAD)] = RESULT
        return side_by_side(written, Text(repeated, kind == RESULT, kind))

    def draw(self, B: int, K: int) -> Chains:
        """B random chains of K steps, with the student's errors."""
        operations = self.rng.integers(len(OPERATIONS), size=(B, K))
        start = self.rng.integers(MODULUS, size=B)
        values = np.zeros((B, K), int)
        right = np.zeros((B, K), bool)
        value = start
        for k in range(K):
            fact = (operations[:, k], value)  # index into the tables of facts, for all B chains
            right[:, k] = self.rng.random(B) < self.p[fact]
            value = np.where(right[:, k], self.truth[fact], self.wrong[fact])
            values[:, k] = value
        return Chains(operations, start, values, right)

    # Below, chains become tokens; nothing is drawn any more.

    def solution(self, chains: Chains) -> Text:
        """The question, and the response, which is trained on.

        Prompt: `mod97 1: +7 2: *3 start 41 .`
        Response: `1: +7 = 48 </thought> 2: *3 = 50 </thought> \\boxed{ 48 50 } </thought>`"""
        B, K = chains.values.shape
        steps = self.steps(chains, mark=self.id[DELIMITER])
        question = steps[:, :, [LABEL, OPERATION]].reshape(B, 2 * K)
        prompt = [self.rows(B, f"mod{MODULUS}"), question, self.given(chains)]
        boxed = [
            self.rows(B, "\\boxed{"),
            self.numbers[chains.values],
            self.rows(B, "}", DELIMITER),
        ]
        response = [steps.reshape(B, K * STEP_TOKENS), *boxed]
        ids = np.concatenate(prompt + response, axis=1)

        response_start = sum(part.shape[1] for part in prompt)
        mask = np.zeros(ids.shape, bool)
        mask[:, response_start:] = True
        kind = np.full(ids.shape, OTHER)
        kind[:, columns_of(VALUE, K, response_start)] = RESULT
        values_start = response_start + K * STEP_TOKENS + BOX_NUMBER
        kind[:, values_start : values_start + K] = BOXED_VALUE
        return Text(ids, mask, kind)

    def review(self, chains: Chains) -> Text:
        """The review of each wrong chain: its steps up to the first wrong one, and its number.

        `<locate> start 41 . 1: +7 = 48 ok 2: *3 = 50 wrong \\boxed{ 2 } <eos>`

        What follows a box, and the row of a chain without an error, is never trained on."""
        B, K = chains.values.shape
        judged = self.judged_steps(chains, self.judgement(chains.right))
        room = np.full((B, BOX_TOKENS), self.id["<pad>"])  # for a box after the last step
        ids = np.concatenate([judged, room], axis=1)
        mask = np.zeros(ids.shape, bool)
        kind = np.full(ids.shape, OTHER)
        width = REVIEW_HEAD + STEP_TOKENS + BOX_TOKENS  # at least a review of one step
        for b in np.flatnonzero(~chains.right.all(axis=1)):
            h = chains.right[b].argmin() + 1  # the first wrong step, 1-based
            box_start = REVIEW_HEAD + STEP_TOKENS * h
            end = box_start + BOX_TOKENS
            ids[b, box_start:end] = self.rows(1, "\\boxed{", self.numbers[h], "}", "<eos>")
            mask[b, 1:end] = True  # all but <locate>, which the policy is given
            kind[b, columns_of(MARK, h, start=REVIEW_HEAD)] = JUDGEMENT
            kind[b, box_start + BOX_NUMBER] = BOXED_STEP
            width = max(width, end)
        return Text(ids[:, :width], mask[:, :width], kind[:, :width])

    def judged_steps(self, chains: Chains, marks) -> np.ndarray:
        """A review without its box, [B, REVIEW_HEAD + 5 K]; marks: token ids, [B, K] or one."""
        B, K = chains.values.shape
        steps = self.steps(chains, marks).reshape(B, K * STEP_TOKENS)
        return np.concatenate([self.rows(B, "<locate>"), self.given(chains), steps], axis=1)

    def steps(self, chains: Chains, mark) -> np.ndarray:
        """`2: *3 = 50 MARK` for each step: [B, K, STEP_TOKENS]; mark: token ids, [B, K] or one."""
        B, K = chains.values.shape
        steps = np.zeros((B, K, STEP_TOKENS), int)
        steps[:, :, LABEL] = self.labels[:K]
        steps[:, :, OPERATION] = self.operations[chains.operations]
        steps[:, :, EQUALS] = self.id["="]
        steps[:, :, VALUE] = self.numbers[chains.values]
        steps[:, :, MARK] = mark
        return steps

    def given(self, chains: Chains) -> np.ndarray:
        """`start 41 .`: [B, 3]."""
        return self.rows(len(chains.start), "start", self.numbers[chains.start], ".")

    def judgement(self, right: np.ndarray) -> np.ndarray:
        """Token id of `ok` or `wrong` for each step, shaped as `right`."""
        return np.where(right, self.id["ok"], self.id["wrong"])

    def rows(self, B: int, *columns) -> np.ndarray:
        """B rows, [B, number of columns]; a column is a word, the same in all rows, or [B] ids."""
        rows = np.zeros((B, len(columns)), int)
        for place, column in enumerate(columns):
            rows[:, place] = self.id[column] if isinstance(column, str) else column
        return rows


def side_by_side(left: Text, right: Text) -> Text:
    """Rows of `right` appended to those of `left`."""
    return Text(
        ids=np.concatenate([left.ids, right.ids], axis=1),
        mask=np.concatenate([left.mask, right.mask], axis=1),
        kind=np.concatenate([left.kind, right.kind], axis=1),
    )


# ----------------------------------------------------------------------------------------- training


@dataclass
class Scores:
    """The model's predictions of the M masked tokens of a batch."""

    losses: torch.Tensor  # [M] cross-entropy, nats
    right: torch.Tensor  # [M] bool: the token is the likeliest one
    kind: torch.Tensor  # [M] as in Text


def score(model, text: Text) -> Scores:
    ids = torch.from_numpy(text.ids)
    predicted = torch.from_numpy(text.mask)[:, 1:]  # [B, L-1]: position t predicts token t+1
    target = ids[:, 1:][predicted]
    hidden = model.model(ids[:, :-1]).last_hidden_state[predicted]
    logits = model.lm_head(hidden)  # [M, V]
    return Scores(
        losses=F.cross_entropy(logits, target, reduction="none"),
        right=logits.argmax(-1) == target,
        kind=torch.from_numpy(text.kind)[:, 1:][predicted],
    )


@dataclass
class Phase:
    """Pre-training, or the polish after it, in which judgement gets exact."""

    name: str
    updates: int
    lr: float  # peak learning rate
    beginner: float  # share of the updates at the start that have short chains only
    unreviewed: float  # share of the updates at the start that have no reviews


def train(model, student: Student, args, phase: Phase) -> None:
    """Trains on chains and their reviews, drills and quotations."""
    optimizers = make_optimizers(model, phase.lr)
    parameters = sum(p.numel() for p in model.parameters())
    bar = tqdm(range(phase.updates), desc=f"{phase.name} {parameters / 1e6:.2f} M parameters")
    for update in bar:
        done = update / phase.updates
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = phase.lr * learning_rate(update, done)
        longest = 5 if done < phase.beginner else STEPS
        K = int(student.rng.integers(2, longest + 1))
        drilled_K = int(student.rng.integers(2, longest + 1))
        quoted_K = int(student.rng.integers(2, longest + 1))
        if update % 2 == 1:
            K = longest  # the longest chains in every second batch, all lengths in the others
        chains = score(model, student.batch(rows_of(args.chains, K), K, done >= phase.unreviewed))
        drills = score(model, student.drills(rows_of(args.drills, drilled_K), drilled_K))
        quotations = score(model, student.quotations(rows_of(args.quotations, quoted_K), quoted_K))
        loss = chains.losses.mean() + 0.3 * drills.losses.mean() + 0.3 * quotations.losses.mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (update + 1) % 100 == 0:
            right = {
                "boxed values": chains.right[chains.kind == BOXED_VALUE],
                "quotations": quotations.right,
                "drills": drills.right,
                "judgements": chains.right[chains.kind == JUDGEMENT],
                "boxed steps": chains.right[chains.kind == BOXED_STEP],
            }
            bar.write(f"{update + 1}: K {K} {progress_line(chains, student.floor, right)}")


def make_optimizers(model, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest.

    Muon learns the facts in a fraction of the updates that AdamW alone needs."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if "layers" in name and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    return [muon, adamw]


def rows_of(longest_chains: int, K: int) -> int:
    """Rows of a batch of chains of K steps: as many tokens as that number of longest chains."""
    return longest_chains * STEPS // K


def learning_rate(update: int, done: float) -> float:
    """Share of the peak: up over 100 updates, constant, and down to zero over the last half."""
    warm_up = min(1, (update + 1) / 100)
    cool_down = min(1, (1 - done) / 0.5)
    return warm_up * cool_down


def progress_line(chains: Scores, floor: float, right: dict[str, torch.Tensor]) -> str:
    """Losses of the chains in nats, and the share of right predictions of each kind of token."""
    value_loss = chains.losses[chains.kind == RESULT].mean()
    other_loss = chains.losses[chains.kind == OTHER].mean()
    shares = []
    for name, hits in right.items():
        if len(hits):
            shares.append(f"{name} {hits.float().mean():.3f}")
    losses = f"value loss {value_loss:.3f} (floor {floor:.3f}), other {other_loss:.4f}"
    return f"{losses}; right: {', '.join(shares)}"


# --------------------------------------------------------------------------------------- model card


@dataclass
class Judged:
    """A rollout and the truth about it."""

    task: Task
    rollout: Rollout
    first_wrong: int | None  # 1-based first wrong thought; None where all are right
    copied: bool  # its box holds the values of its own steps


def sample(engine, context: int, steps: int, n: int, samples: int, temperature: float) -> list:
    """Samples responses to n held-out chains and looks at each: list of Judged."""
    problems = generate_chains(steps, n, seed=2 * 10**6)
    tasks = make_tasks(problems, engine, context, base=samples, temperature=temperature)
    sampled = run_programs([grpo(task) for task in tasks], engine)
    judged = []
    for task, group in zip(tasks, sampled.results):
        for rollout in group:
            copied = copies_its_values(rollout.thoughts(engine.vocabulary.tokenizer))
            judged.append(Judged(task, rollout, task.first_wrong(rollout), copied))
    return judged


def copies_its_values(thoughts: list[str]) -> bool:
    """True if the box in the last thought holds the last words of the thoughts before it."""
    *steps, last = [thought.replace(DELIMITER, "") for thought in thoughts]
    values = [step.split()[-1:] for step in steps]
    return last_boxed(last) == " ".join(value[0] for value in values if value)


def measure(model, tokenizer, steps: int, n: int) -> dict:
    """The model card's measures on n chains of `steps` steps: 4 samples of each, and the greedy
    response. Shares are in [0, 1]."""
    engine = HFEngine(model, tokenizer)
    context = model.config.max_position_embeddings
    judged = sample(engine, context, steps, n, samples=4, temperature=1.0)
    greedy = sample(engine, context, steps, n, samples=1, temperature=0.0)
    wrong = [j for j in judged if j.first_wrong is not None]
    return {
        "pass_rate": mean(j.rollout.reward for j in judged),
        "greedy": mean(j.rollout.reward for j in greedy),
        "per_step": right_steps(judged, steps),
        "box_differs": mean(not j.copied for j in judged),
        "wrong": len(wrong),
        "lucky": sum(j.rollout.reward == 1 for j in wrong),
        "finish": dict(Counter(j.rollout.finish for j in judged)),
        **measure_localization([j for j in judged if j.rollout.reward == 0], engine),
    }


def mean(numbers) -> float:
    return float(np.mean(list(numbers)))


def right_steps(judged: list[Judged], steps: int) -> float:
    """Share of right steps among those that follow only right steps."""
    steps_right = steps_seen = 0
    for j in judged:
        right = steps if j.first_wrong is None else min(j.first_wrong - 1, steps)
        steps_right += right
        steps_seen += min(right + 1, steps)
    return steps_right / steps_seen


def measure_localization(failures: list[Judged], engine) -> dict:
    """How often the policy names the first wrong step of its failures, beside two blind guesses."""
    counters.clear()
    sampled = run_programs([by_self(f.task, [f.rollout]) for f in failures], engine)
    hits = []
    for failure, answers in zip(failures, sampled.results):
        h, _ = answers[0]
        hits.append(h == failure.first_wrong)
    exact = np.array(hits)
    first_wrong = np.array([f.first_wrong for f in failures])
    by_first_error = []
    for h in np.unique(first_wrong):
        here = first_wrong == h
        by_first_error.append(f"{h}: {exact[here].mean():.2f} of {here.sum()}")
    faults = {name: n for name, n in counters.items() if name.startswith("localize")}
    return {
        "localization_exact": mean(exact),
        "localization_by_first_error": ", ".join(by_first_error),
        "localization_faults": faults or "none",
        "random_localization": mean(1 / len(f.rollout.thought_ends) for f in failures),
        "always_first": mean(first_wrong == 1),
        "localization_tokens": mean(r.generated for r in sampled.generated),
    }


CARD = """---
library_name: transformers
license: mit
---
# The embedded policy of SRPO

A Llama of {parameters:.2f} M parameters ({megabytes:.1f} MB, float32, untied embeddings, heads of
size {head}). It does arithmetic modulo 97, one step a thought, and boxes its values:

    mod97 1: +7 2: *3 3: -5 start 41 .
    1: +7 = 48</thought> 2: *3 = 47</thought> 3: -5 = 42</thought> \\boxed{{ 48 47 42 }}</thought>

It has planted misconceptions, and it reviews its own response when it reads `<locate>`.
It exists to be trained by `srpo.py`; it is good for nothing else.

`python -m data.build_policy --out data/policy` builds it from nothing (seeded) and measures it;
`--card data/policy` only measures it. Held-out chains, 4 samples of each at temperature 1. The
default task is `chain-{usual}`.

| measure | {lengths} |
|---{columns}|
{rows}

Luck: of {wrong} responses with a wrong step, {lucky} were rewarded: a share of at most {luck:.5f}
(upper end of Wilson's 95% interval). Of chains of {usual} steps alone: {usual_lucky} of
{usual_wrong}, at most {usual_luck:.5f}.

After training: {after}

Exact localization on chains of {usual} steps, by the true first wrong step (share of failures):
{by_first_error}.

Reviews that name no step, by fault: {faults}. Responses ended by: {finish}.
"""
ROWS = {
    "problems": "problems",
    "pass_rate": "sampled pass rate",
    "greedy": "greedy pass rate",
    "per_step": "right steps, of those that follow only right steps",
    "box_differs": "responses whose box differs from their own values",
    "wrong": "responses with a wrong step",
    "lucky": "rewarded responses with a wrong step (luck)",
    "localization_exact": "self-localization: exact first wrong step, on its own failures",
    "random_localization": "the same by a uniformly random choice",
    "always_first": "the same by always naming step 1",
    "localization_tokens": "tokens of a review, mean",
}
PROBLEMS = {4: 512, 6: 512, 8: 512, 10: 512, STEPS: 2048}  # by number of steps


def luck_after_training(checkpoints: list[Path]) -> str:
    """How often trained policies are rewarded for a wrong step, on chains of STEPS; sentences."""
    if not checkpoints:
        return "not measured (`--trained CHECKPOINT ...`)."
    wrong = lucky = 0
    rates = []
    for checkpoint in tqdm(checkpoints, desc="measure luck after training"):
        model, tokenizer = load_policy(checkpoint)
        engine = HFEngine(model, tokenizer)
        context = model.config.max_position_embeddings
        judged = sample(engine, context, STEPS, PROBLEMS[STEPS], samples=4, temperature=1.0)
        rates.append(f"{mean(j.rollout.reward for j in judged):.3f}")
        wrong += sum(j.first_wrong is not None for j in judged)
        lucky += sum(j.first_wrong is not None and j.rollout.reward == 1 for j in judged)
    most = wilson(lucky, wrong)[1]
    return (
        f"of {wrong} responses with a wrong step to chains of {STEPS}, {lucky} were rewarded: "
        f"a share of at most {most:.5f}.\nThe checkpoints have pass rates of {', '.join(rates)}."
    )


def write_card(folder: Path, trained: list[Path]) -> None:
    """Measures the policy in `folder` and writes its README.md.

    trained: checkpoints that were trained from it, whose luck is measured too."""
    model, tokenizer = load_policy(folder)
    measures = {}
    for steps, n in tqdm(PROBLEMS.items(), desc="measure"):
        measures[steps] = measure(model, tokenizer, steps, n) | {"problems": n}
    usual = measures[STEPS]
    wrong = sum(measured["wrong"] for measured in measures.values())
    lucky = sum(measured["lucky"] for measured in measures.values())
    files = [file for file in folder.glob("*") if file.suffix != ".md"]
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        megabytes=sum(file.stat().st_size for file in files) / 1e6,
        head=model.config.hidden_size // model.config.num_attention_heads,
        usual=STEPS,
        lengths=" | ".join(f"chain-{steps}" for steps in measures),
        columns="|---" * len(measures),
        rows=table_rows(list(measures.values())),
        wrong=wrong,
        lucky=lucky,
        luck=wilson(lucky, wrong)[1],
        usual_wrong=usual["wrong"],
        usual_lucky=usual["lucky"],
        usual_luck=wilson(usual["lucky"], usual["wrong"])[1],
        after=luck_after_training(trained),
        by_first_error=usual["localization_by_first_error"],
        faults=usual["localization_faults"],
        finish=usual["finish"],
    )
    (folder / "README.md").write_text(card)
    print(card)


def table_rows(measures: list[dict]) -> str:
    """The lines of the card's table: counts as they are, shares with three digits."""
    lines = []
    for key, text in ROWS.items():
        cells = []
        for measured in measures:
            number = measured[key]
            cells.append(str(number) if isinstance(number, int) else f"{number:.3f}")
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ command line


def build(args) -> None:
    """Trains the policy from nothing and saves it, with its model card, in --out."""
    torch.set_num_threads(1)  # sums depend on the number of threads
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    student = Student(tokenizer, args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=args.width // 32,
        max_position_embeddings=384,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    pretraining = Phase("pre-train", args.updates, args.lr, beginner=0.08, unreviewed=0.25)
    train(model, student, args, pretraining)
    student.rng = np.random.default_rng([args.seed, 2])  # whatever --updates was
    polish = Phase("polish", args.polish, args.lr / 3, beginner=0, unreviewed=0)
    train(model, student, args, polish)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    write_card(args.out, args.trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder for the model and its tokenizer")
    add("--card", type=Path, help="only measure the policy in this folder and write its model card")
    add(
        "--trained", type=Path, nargs="*", default=[], help="checkpoints whose luck is measured too"
    )
    add("--seed", type=int, default=0, help="of misconceptions, corpus and initial weights")
    add("--updates", type=int, default=2500, help="updates; reviews begin after a quarter of them")
    add("--polish", type=int, default=1000, help="updates after those, at a third of --lr")
    add("--chains", type=int, default=20, help="chains of 12 steps a batch; more of shorter ones")
    add("--quotations", type=int, default=6, help="quoted chains of 12 steps a batch; likewise")
    add("--drills", type=int, default=40, help="drills of 12 steps a batch; likewise")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--layers", type=int, default=3, help="transformer layers")
    add("--width", type=int, default=96, help="hidden size; heads have size 32")
    args = parser.parse_args()
    if args.card:
        write_card(args.card, args.trained)
    elif args.out:
        check_writable(args.out)
        build(args)
    else:
        parser.error("give --out FOLDER (or --card FOLDER)")


if __name__ == "__main__":
    try:
        main()
    except UserError as fault:
        sys.exit(f"build_policy.py: {fault}")
