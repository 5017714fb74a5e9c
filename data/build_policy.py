"""Builds the embedded policy: a small Llama that solves the chain task and reviews itself.

It is pre-trained on chains (data/chains.py) that an imaginary student writes. The student gets
each fact (operation, value) right with a fixed probability p of that fact, and otherwise always
gives the same wrong value, its misconception. So the policy samples the right value of a fact with
probability about p, its errors are scattered over the chain, and reinforcement alone can unlearn
every fact. Each wrong chain of the corpus is followed by a review: the policy repeats its thoughts
and judges each one.

    <locate> start 41 . 1: +7 = 48 ok 2: *3 = 50 wrong \\boxed{ 2 } <eos>

Reviews are labelled with the truth, so the policy reviews better than it writes.

Where this task is on the map of tests/README.md ("Why resets lose here"): 12 steps; a pass rate of
0.04, so most base groups have no success; errors anywhere in the chain; localization well above
the break-even of 0.5 to 0.6; and 1,940 facts, so that training takes 100 steps or more.

Left out: RL (this is next-token training with AdamW), and padding: the chains of a batch have the
same number of steps, and what follows a short review is not trained on.

Try it alone:
    python -m data.build_policy --out data/policy     # 30 to 40 minutes on one thread
    python -m data.build_policy --card data/policy    # only measures it and writes its model card
The policy is a function of --seed.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.chains import MAX_STEPS, MODULUS, OPERATIONS, apply, generate_chains
from data.driver import run_programs
from data.faults import counters
from data.policies import load_policy
from data.verifiers import DELIMITER
from eval import evaluate
from localize import by_self
from rollout import HFEngine, Rollout, Task, make_tasks

# The mean of p is 0.76, and 0.76^12 = 0.04 of the chains of 12 steps come out right.
HARD_SHARE = 0.20  # share of hard facts
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
BOX_NUMBER = 1  # place of the number among the tokens of the box

# What a token is, for the progress report.
OTHER, RESULT, JUDGEMENT, BOXED_STEP = range(4)


def columns_of(token: int, steps: int, start: int) -> np.ndarray:
    """Columns [steps] of one token (LABEL to MARK) of each of the steps that begin at `start`."""
    return start + token + STEP_TOKENS * np.arange(steps)


@dataclass
class Text:
    """B rows of L tokens, with what training needs to know of each token."""

    ids: np.ndarray  # [B, L] token ids
    mask: np.ndarray  # [B, L] bool: trained on
    kind: np.ndarray  # [B, L] OTHER, RESULT, JUDGEMENT or BOXED_STEP


@dataclass
class Chains:
    """B chains of K steps."""

    operations: np.ndarray  # [B, K] places in OPERATIONS
    start: np.ndarray  # [B] numbers
    values: np.ndarray  # [B, K] results, as they are written
    right: np.ndarray  # [B, K] bool: the step is true of the value before it
    answer: np.ndarray  # [B] numbers in the box


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

    def drills(self, B: int) -> Text:
        """B single judgements, `<locate> start 41 . 5: +7 = 48 ok`: [B, 9].

        Half of the values are right, a quarter are the student's error, a quarter are any other
        error: a judgement is about what is true, not about what the student would say."""
        operation = self.rng.integers(len(OPERATIONS), size=B)
        value = self.rng.integers(MODULUS, size=B)
        draw = self.rng.random(B)
        truth = self.truth[operation, value]
        any_error = (truth + self.rng.integers(1, MODULUS, size=B)) % MODULUS
        label = self.labels[self.rng.integers(STEPS, size=B)]
        right = draw < 0.5
        said = np.select([right, draw < 0.75], [truth, self.wrong[operation, value]], any_error)

        head = self.rows(B, "<locate>", "start", self.numbers[value], ".")
        step = self.rows(
            B, label, self.operations[operation], "=", self.numbers[said], self.judgement(right)
        )
        ids = np.concatenate([head, step], axis=1)
        kind = np.full(ids.shape, OTHER)
        kind[:, REVIEW_HEAD + MARK] = JUDGEMENT
        return Text(ids, kind == JUDGEMENT, kind)

    def quotations(self, B: int, K: int) -> Text:
        """B chains with random values, each repeated in a review; only repeated values are trained.

        A reviewer that knows a fact tends to read what it expects, not what is written, and then
        judges its own value."""
        chains = self.draw(B, K)
        chains.values = self.rng.integers(MODULUS, size=(B, K))
        written = self.solution(chains).ids
        repeated = self.judged_steps(chains, self.id["ok"])
        ids = np.concatenate([written, repeated], axis=1)
        kind = np.full(ids.shape, OTHER)
        kind[:, columns_of(VALUE, K, start=written.shape[1] + REVIEW_HEAD)] = RESULT
        return Text(ids, kind == RESULT, kind)

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
        return Chains(operations, start, values, right, answer=value)

    # Below, chains become tokens; nothing is drawn any more.

    def solution(self, chains: Chains) -> Text:
        """The question, and the response, which is trained on.

        Prompt: `mod97 1: +7 2: *3 start 41 .`
        Response: `1: +7 = 48 </thought> 2: *3 = 50 </thought> \\boxed{ 50 } </thought>`"""
        B, K = chains.values.shape
        steps = self.steps(chains, mark=self.id[DELIMITER])
        question = steps[:, :, [LABEL, OPERATION]].reshape(B, 2 * K)
        prompt = [self.rows(B, f"mod{MODULUS}"), question, self.given(chains)]
        box = self.rows(B, "\\boxed{", self.numbers[chains.answer], "}", DELIMITER)
        response = [steps.reshape(B, K * STEP_TOKENS), box]
        ids = np.concatenate(prompt + response, axis=1)

        response_start = sum(part.shape[1] for part in prompt)
        mask = np.zeros(ids.shape, bool)
        mask[:, response_start:] = True
        kind = np.full(ids.shape, OTHER)
        kind[:, columns_of(VALUE, K, response_start)] = RESULT
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
    """Pre-training, or the polish after it, which adds quotations."""

    name: str
    updates: int
    lr: float  # peak learning rate
    polish: bool


def train(model, student: Student, args, phase: Phase) -> None:
    """AdamW on chains, drills and, while polishing, quotations."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    parameters = sum(p.numel() for p in model.parameters())
    bar = tqdm(range(phase.updates), desc=f"{phase.name} {parameters / 1e6:.2f} M parameters")
    for update in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(phase, update)
        K = draw_length(student.rng, phase, update)
        B = args.chains * STEPS // K
        reviewed = phase.polish or update / phase.updates > 0.25
        chains = score(model, student.batch(B, K, reviewed))
        drills = score(model, student.drills(args.drills))
        loss = chains.losses.mean() + 0.3 * drills.losses.mean()
        right = {
            "drills": drills.right,
            "judgements": chains.right[chains.kind == JUDGEMENT],
            "boxed": chains.right[chains.kind == BOXED_STEP],
        }
        if phase.polish:
            quotations = score(model, student.quotations(args.chains // 3, STEPS))
            loss = loss + 0.3 * quotations.losses.mean()
            right["quotations"] = quotations.right
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (update + 1) % 100 == 0:
            bar.write(f"{update + 1}: K {K} {progress_line(chains, student.floor, right)}")


def learning_rate(phase: Phase, update: int) -> float:
    """Warms up over 100 updates, holds, and falls to zero over the last 40%."""
    warm_up = min(1, (update + 1) / 100)
    cool_down = min(1, (1 - update / phase.updates) / 0.4)
    return phase.lr * warm_up * cool_down


def draw_length(rng: np.random.Generator, phase: Phase, update: int) -> int:
    """Steps of a batch's chains: few at the start, later STEPS in every second batch."""
    beginner = not phase.polish and update / phase.updates < 0.08
    longest = 5 if beginner else STEPS
    K = int(rng.integers(2, longest + 1))
    if not beginner and update % 2 == 1:
        return STEPS
    return K


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


def measure(model, tokenizer, n: int, steps: int, seed: int = 0) -> dict:
    """The model card's measures, on n held-out chains of `steps` steps, 4 samples each.

    Shares are in [0, 1]."""
    engine = HFEngine(model, tokenizer)
    context = model.config.max_position_embeddings
    problems = generate_chains(steps, n, seed=2 * 10**6 + seed)
    tasks = make_tasks(problems, engine, context, seed)
    sampled = evaluate(tasks, engine, 4)
    greedy_tasks = make_tasks(problems, engine, context, seed, temperature=0.0)
    greedy = evaluate(greedy_tasks, engine, 1)

    judged = []
    for task, group in zip(tasks, sampled.groups):
        for rollout in group:
            first_wrong = task.problem.check_steps(rollout.thoughts(tokenizer))
            judged.append(Judged(task, rollout, first_wrong))
    failures = [j for j in judged if j.rollout.reward == 0]
    return {
        "pass_rate": sampled.pass_rate,
        "greedy": greedy.pass_rate,
        "finish": sampled.finish,
        **measure_steps(judged, steps),
        **measure_localization(failures, engine),
    }


def measure_steps(judged: list[Judged], steps: int) -> dict:
    """Right steps among those that follow only right steps, and wrong chains that pass; shares."""
    steps_right = steps_seen = wrong_chains = lucky = 0
    for j in judged:
        right = steps if j.first_wrong is None else min(j.first_wrong - 1, steps)
        steps_right += right
        steps_seen += min(right + 1, steps)
        if j.first_wrong is not None:
            wrong_chains += 1
            if j.rollout.reward == 1:
                lucky += 1
    return {"per_step": steps_right / steps_seen, "luck": lucky / max(1, wrong_chains)}


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
    by_first_error = {}
    for h in np.unique(first_wrong):
        here = first_wrong == h
        by_first_error[int(h)] = (round(float(exact[here].mean()), 2), int(here.sum()))
    faults = {name: n for name, n in counters.items() if name.startswith("localize")}
    blind = [1 / len(f.rollout.thought_ends) for f in failures]  # chance of a random choice
    return {
        "localization_exact": float(exact.mean()),
        "localization_by_first_error": by_first_error,
        "localization_faults": faults,
        "random_localization": float(np.mean(blind)),
        "always_first": float((first_wrong == 1).mean()),
        "localization_tokens": float(np.mean([r.generated for r in sampled.generated])),
    }


CARD = """---
library_name: transformers
license: mit
---
# The embedded policy of SRPO

A Llama-architecture model of {parameters:.2f} M parameters ({megabytes:.1f} MB, float32, \
untied embeddings, heads of size {head}) \
that does
arithmetic modulo 97, one step per thought, with planted misconceptions, \
and reviews its own chains when it reads `<locate>`.
It exists to be trained by `srpo.py`; it is good for nothing else.

Built from nothing by `python -m data.build_policy --out data/policy` (seeded), \
which also measures it (`--card data/policy` alone does):
{n} held-out chains of each length, 4 samples each at T = 1 \
(share of all; the default task is `chain-{usual}`).

| measure | {lengths} |
|---{columns}|
{rows}

On chains of {usual} steps: self-localization by the true first wrong step \
(exact share, number of failures): {localization_by_first_error}.
Localization answers without a usable step: {localization_faults}. Responses ended by: {finish}.
"""
ROWS = {
    "pass_rate": "sampled pass rate",
    "greedy": "greedy pass rate",
    "per_step": "right steps, among those that follow only right steps",
    "localization_exact": "self-localization: exact first wrong step, on its own failures",
    "random_localization": "by a uniformly random choice",
    "always_first": "by always answering step 1",
    "luck": "right answers among chains with a wrong step (luck)",
    "localization_tokens": "tokens of a localization answer, mean",
}


def write_card(folder: Path, n: int = 512) -> None:
    """Measures the policy in `folder` and writes its README.md."""
    model, tokenizer = load_policy(folder)
    measures = {}
    for steps in tqdm((4, 6, 8, 10, 12), desc="measure"):
        measures[steps] = measure(model, tokenizer, n, steps)
    rows = []
    for key, text in ROWS.items():
        numbers = " | ".join(f"{measured[key]:.3f}" for measured in measures.values())
        rows.append(f"| {text} | {numbers} |")
    files = [file for file in folder.glob("*") if file.suffix != ".md"]
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        megabytes=sum(file.stat().st_size for file in files) / 1e6,
        head=model.config.hidden_size // model.config.num_attention_heads,
        n=n,
        usual=STEPS,
        lengths=" | ".join(f"chain-{steps}" for steps in measures),
        columns="|---" * len(measures),
        rows="\n".join(rows),
        **measures[STEPS],
    )
    (folder / "README.md").write_text(card)
    print(card)


# ------------------------------------------------------------------------------------ command line


def build(args) -> None:
    """Trains the policy from nothing and saves it, with its model card, in --out."""
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
    train(model, student, args, Phase("pre-train", args.updates, args.lr, polish=False))
    student.rng = np.random.default_rng([args.seed, 2])  # whatever --updates was
    train(model, student, args, Phase("polish", args.polish, args.lr / 3, polish=True))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    write_card(args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder for the model and its tokenizer")
    add("--card", type=Path, help="only measure the policy in this folder and write its model card")
    add("--seed", type=int, default=0, help="of misconceptions, corpus and initial weights")
    add("--updates", type=int, default=5000, help="updates; reviews begin after a quarter of them")
    add("--polish", type=int, default=1000, help="updates after those, with quotations added")
    add("--chains", type=int, default=24, help="chains of 12 steps a batch; more of shorter ones")
    add("--drills", type=int, default=256, help="single judgements a batch")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--layers", type=int, default=3, help="transformer layers")
    add("--width", type=int, default=96, help="hidden size; heads have size 32")
    args = parser.parse_args()
    if args.card:
        write_card(args.card)
    elif args.out:
        build(args)
    else:
        parser.error("give --out FOLDER (or --card FOLDER)")


if __name__ == "__main__":
    main()
