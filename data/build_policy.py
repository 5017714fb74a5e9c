"""Builds the embedded policy from nothing: a small Llama that does the chain task with planted misconceptions, and reviews itself.

The policy is pre-trained on chains (data/problems.py) written by an imaginary student who gets a fact (operation, value) right with a fixed
probability p of that fact, and otherwise always gives the same wrong value. So the policy samples the right value of a fact with
probability about p, its errors are scattered over the chain, and every fact can be unlearned by reinforcement alone.
The wrong chains of the corpus are followed by a review, `<locate> start 41 . 1: +7 = 48 ok 2: *3 = 50 wrong \\boxed{ 2 } <eos>`:
the policy repeats its thoughts and judges each one. Reviews are labelled with the truth, so it reviews better than it writes.

Where this is on the map of "where do resets pay" (README): 12 steps, pass rate 0.04 (most base groups have no success), errors
anywhere in the chain, localization well above the break-even of 0.5-0.6, and 1,940 facts so that training takes 100 steps or more.

Left out: anything about RL. This is only supervised next-token training, AdamW, with batches of equal-length chains (no padding but reviews).

    python -m data.build_policy --out data/policy          # 30 to 40 minutes on one thread; a function of --seed
    python -m data.build_policy --card data/policy         # only measures it, and writes its model card
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.chains import MAX_STEPS, MODULUS, OPERATIONS, apply, generate_chains
from data.faults import counters
from data.verifiers import DELIMITER
from eval import evaluate, make_tasks
from localize import by_self
from rollout import HFEngine, load_policy, run_programs

HARD_SHARE, HARD, EASY = (
    0.20,
    (0.20, 0.45),
    (0.75, 0.99),
)  # share of hard facts; ranges of p: mean .76, so .76^12 = 0.04 of chains
STEPS = 12  # chains of the corpus have up to this many steps, as many as those of the default task


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each number, operation and step label; text is split at blanks."""
    words = [
        "<pad>",
        "<eos>",
        f"mod{MODULUS}",
        "start",
        ".",
        "=",
        DELIMITER,
        "\\boxed{",
        "}",
        "<locate>",
        "ok",
        "wrong",
    ]
    words += (
        [str(value) for value in range(MODULUS)]
        + [f"{i}:" for i in range(1, MAX_STEPS + 1)]
        + OPERATIONS
    )
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


class Student:
    """Writes batches of chains with planted misconceptions, as token ids."""

    def __init__(self, tokenizer, seed: int):
        self.rng = np.random.default_rng([seed, 1])
        facts = (len(OPERATIONS), MODULUS)
        self.truth = np.array([[apply(op, value) for value in range(MODULUS)] for op in OPERATIONS])
        self.wrong = (self.truth + self.rng.integers(1, MODULUS, facts)) % MODULUS
        self.p = np.where(
            self.rng.random(facts) < HARD_SHARE,
            self.rng.uniform(*HARD, facts),
            self.rng.uniform(*EASY, facts),
        )
        self.floor = -(
            self.p * np.log(self.p) + (1 - self.p) * np.log(1 - self.p)
        ).mean()  # nats: what a value costs at best
        self.id = tokenizer.get_vocab()
        self.numbers = np.array([self.id[str(value)] for value in range(MODULUS)])
        self.labels = np.array([self.id[f"{i}:"] for i in range(1, MAX_STEPS + 1)])
        self.operations = np.array([self.id[op] for op in OPERATIONS])

    def batch(self, B: int, K: int, review: bool):
        """B chains of K steps -> ids [B, L], loss mask [B, L] (response and review), kind [B, L]: 1 on results, 2 on ok/wrong, 3 on the
        reviewed step number, else 0."""
        op = self.rng.integers(len(OPERATIONS), size=(B, K))
        start = value = self.rng.integers(MODULUS, size=B)
        values, right = np.zeros((B, K), int), np.zeros((B, K), bool)
        for k in range(K):
            right[:, k] = self.rng.random(B) < self.p[op[:, k], value]
            value = values[:, k] = np.where(
                right[:, k], self.truth[op[:, k], value], self.wrong[op[:, k], value]
            )

        def columns(word, width=1):
            return np.full((B, width), self.id[word])

        labels = np.broadcast_to(self.labels[:K], (B, K))
        question = np.stack([labels, self.operations[op]], -1).reshape(B, 2 * K)
        given = [columns("start"), self.numbers[start][:, None], columns(".")]
        prompt = np.concatenate([columns(f"mod{MODULUS}"), question, *given], 1)
        steps = np.stack(
            [labels, self.operations[op], columns("=", K), self.numbers[values]], -1
        )  # [B, K, 4]
        written = np.concatenate([steps, columns(DELIMITER, K)[:, :, None]], -1).reshape(B, 5 * K)
        box = [columns("\\boxed{"), self.numbers[value][:, None], columns("}"), columns(DELIMITER)]
        response = np.concatenate([written, *box], 1)
        parts, masks = (
            [prompt, response],
            [np.zeros(prompt.shape, bool), np.ones(response.shape, bool)],
        )
        kinds = [np.zeros(prompt.shape, int), np.zeros(response.shape, int)]
        kinds[1][:, 3 : 5 * K : 5] = 1
        if review:
            first = np.where(
                right.all(1), K, right.argmin(1)
            )  # 0-based first wrong step; K: none, then no review
            judged = np.concatenate(
                [steps, np.where(right, self.id["ok"], self.id["wrong"])[:, :, None]], -1
            ).reshape(B, 5 * K)
            text = np.concatenate([columns("<locate>"), *given, judged, columns("<pad>", 4)], 1)
            mask, kind = np.zeros(text.shape, bool), np.zeros(text.shape, int)
            for b in np.flatnonzero(first < K):
                end = 4 + 5 * (first[b] + 1)  # after the first "wrong" comes the box
                text[b, end : end + 4] = (
                    self.id["\\boxed{"],
                    self.numbers[first[b] + 1],
                    self.id["}"],
                    self.id["<eos>"],
                )
                mask[b, 1 : end + 4], kind[b, 8:end:5], kind[b, end + 1] = True, 2, 3
            length = 8 + 5 * (min(first.max(where=first < K, initial=0), K - 1) + 1)
            parts, masks, kinds = (
                parts + [text[:, :length]],
                masks + [mask[:, :length]],
                kinds + [kind[:, :length]],
            )
        return [torch.from_numpy(np.concatenate(x, 1)) for x in (parts, masks, kinds)]

    def drills(self, B: int):
        """B single judgements, `<locate> start 41 . 5: +7 = 48 ok` -> ids [B, 9], loss mask, kind as in `batch`. Half of the values are
        right, a quarter are the student's error, a quarter are any other: what counts is what is true, not what the student would say."""
        op, value = self.rng.integers(len(OPERATIONS), size=B), self.rng.integers(MODULUS, size=B)
        draw = self.rng.random(B)
        any_other = (self.truth[op, value] + self.rng.integers(1, MODULUS, size=B)) % MODULUS
        right = draw < 0.5
        said = np.where(
            right, self.truth[op, value], np.where(draw < 0.75, self.wrong[op, value], any_other)
        )
        words = np.array(
            [[self.id[w] for w in ("<locate>", "start", "0", ".", "1:", "+2", "=", "0", "ok")]] * B
        )
        words[:, 2], words[:, 7], words[:, 5] = (
            self.numbers[value],
            self.numbers[said],
            self.operations[op],
        )
        words[:, 4] = self.labels[self.rng.integers(STEPS, size=B)]
        words[~right, 8] = self.id["wrong"]
        last = np.zeros(words.shape, int)
        last[:, 8] = 2
        return [torch.from_numpy(x) for x in (words, last > 0, last)]

    def quotations(self, B: int, K: int):
        """B chains with values out of nowhere, each repeated in a review -> ids [B, L], loss mask (the repeated values), kind as in `batch`.

        A reviewer that knows a fact tends to read what it expects, not what is written, and then judges its own value."""
        ids, _, kind = self.batch(B, K, review=False)
        values = self.numbers[self.rng.integers(MODULUS, size=(B, K))]
        columns = np.flatnonzero(kind[0].numpy() == 1)  # of the results, the same in every row
        ids[:, columns] = torch.from_numpy(values)
        start = 2 * K + 1
        words = np.full((B, 4 + 5 * K), self.id["ok"])
        words[:, 0], words[:, 1:4] = self.id["<locate>"], ids[:, start : start + 3]
        for k, column in enumerate(columns):
            words[:, 4 + 5 * k : 8 + 5 * k] = ids[:, column - 3 : column + 1]
        repeated = np.zeros(words.shape, bool)
        repeated[:, 7::5] = True
        mask = torch.cat([torch.zeros(ids.shape, dtype=torch.bool), torch.from_numpy(repeated)], 1)
        return torch.cat([ids, torch.from_numpy(words)], 1), mask, mask.long()


def token_losses(model, ids, mask, kind):
    """Cross-entropy of each masked token, whether it is the likeliest, its kind and itself, each [M]."""
    chosen = mask[:, 1:]
    target = ids[:, 1:][chosen]
    logits = model.lm_head(model.model(ids[:, :-1]).last_hidden_state[chosen])
    return (
        F.cross_entropy(logits, target, reduction="none"),
        logits.argmax(-1) == target,
        kind[:, 1:][chosen],
        target,
    )


def measure(model, tokenizer, n: int, steps: int, seed: int = 0) -> dict:
    """The measures of the model card, on n held-out chains of `steps` steps, 4 samples each; shares in [0, 1]."""
    engine, context = HFEngine(model, tokenizer), model.config.max_position_embeddings
    problems = generate_chains(steps, n, seed=2 * 10**6 + seed)
    tasks = make_tasks(problems, tokenizer, engine, context, seed)
    result = evaluate(tasks, engine, 4)
    greedy = evaluate(
        make_tasks(problems, tokenizer, engine, context, seed, temperature=0.0), engine, 1
    )["pass_rate"]
    wrong_chain = lucky = steps_right = steps_seen = 0
    failures = []
    for task, group in zip(tasks, result["groups"]):
        for r in group:
            h = task.problem.check_steps(r.thoughts(tokenizer))
            reached = min(h or steps + 1, steps + 1)
            steps_right += min(reached - 1, steps)
            steps_seen += min(reached, steps)
            wrong_chain += h is not None
            lucky += h is not None and r.reward == 1
            if r.reward == 0:
                failures.append((task, r, h))
    counters.clear()
    sampled = run_programs([by_self(task, [r]) for task, r, _ in failures], engine)
    found, generated = sampled.results, sampled.generated
    exact = np.array([answer[0][0] == h for answer, (_, _, h) in zip(found, failures)])
    first = np.array([h for _, _, h in failures])
    return {
        "pass_rate": result["pass_rate"],
        "greedy": greedy,
        "per_step": steps_right / steps_seen,
        "localization_exact": float(exact.mean()),
        "localization_by_first_error": {
            int(h): (round(float(exact[first == h].mean()), 2), int((first == h).sum()))
            for h in np.unique(first)
        },
        "localization_faults": {k: v for k, v in counters.items() if k.startswith("localize")},
        "random_localization": float(np.mean([1 / len(r.thought_ends) for _, r, _ in failures])),
        "always_first": float((first == 1).mean()),
        "luck": lucky / max(1, wrong_chain),
        "localization_tokens": float(np.mean([r.generated for r in generated])),
        "finish": result["finish"],
    }


CARD = """---
library_name: transformers
license: mit
---
# The embedded policy of SRPO

A Llama-architecture model of {parameters:.2f} M parameters ({megabytes:.1f} MB, float32, untied embeddings, heads of size {head}) that does
arithmetic modulo 97, one step per thought, with planted misconceptions, and reviews its own chains when it reads `<locate>`.
It exists to be trained by `srpo.py`; it is good for nothing else.

Built from nothing by `python -m data.build_policy --out data/policy` (seeded), which also measures it (`--card data/policy` alone does):
{n} held-out chains of each length, 4 samples each at T = 1 (share of all; the default task is `chain-{usual}`).

| measure | {lengths} |
|---{columns}|
{rows}

On chains of {usual} steps: self-localization by the true first wrong step (exact share, number of failures): {localization_by_first_error}.
Localization answers without a usable step: {localization_faults}. Responses ended by: {finish}.
"""
ROWS = {
    "pass_rate": "sampled pass rate", "greedy": "greedy pass rate", "per_step": "right steps, among those that follow only right steps",
    "localization_exact": "self-localization: exact first wrong step, on its own failures", "random_localization": "by a uniformly random choice",
    "always_first": "by always answering step 1", "luck": "right answers among chains with a wrong step (luck)", "localization_tokens": "tokens of a localization answer, mean",
}  # fmt: skip


def write_card(folder: Path, n: int = 512) -> None:
    """Measures the policy in `folder` and writes its README.md."""
    model, tokenizer = load_policy(folder)
    measures = {
        steps: measure(model, tokenizer, n, steps)
        for steps in tqdm((4, 6, 8, 10, 12), desc="measure")
    }
    rows = [
        f"| {text} | " + " | ".join(f"{m[key]:.3f}" for m in measures.values()) + " |"
        for key, text in ROWS.items()
    ]
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6, megabytes=sum(file.stat().st_size for file in folder.glob("*") if file.suffix != ".md") / 1e6,
        head=model.config.hidden_size // model.config.num_attention_heads, n=n, usual=STEPS, lengths=" | ".join(f"chain-{steps}" for steps in measures),
        columns="|---" * len(measures), rows="\n".join(rows), **measures[STEPS],
    )  # fmt: skip
    (folder / "README.md").write_text(card)
    print(card)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the model and its tokenizer")
    parser.add_argument(
        "--card",
        type=Path,
        help="build nothing: measure the policy in this folder and write its model card",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the misconceptions, the corpus and the initial weights",
    )
    parser.add_argument(
        "--updates",
        type=int,
        default=5000,
        help="optimizer steps; reviews begin after a quarter of them",
    )
    parser.add_argument(
        "--polish",
        type=int,
        default=1000,
        help="updates after those, with quotations of wrong values",
    )
    parser.add_argument(
        "--chains",
        type=int,
        default=24,
        help="chains of 12 steps in a batch (shorter ones: more of them)",
    )
    parser.add_argument("--drills", type=int, default=256, help="single judgements in a batch")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--layers", type=int, default=3, help="transformer layers")
    parser.add_argument("--width", type=int, default=96, help="hidden size; heads have size 32")
    args = parser.parse_args()
    if args.card or not args.out:
        return (
            write_card(args.card)
            if args.card
            else parser.error("give --out FOLDER (or --card FOLDER)")
        )
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    student = Student(tokenizer, args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32, num_key_value_heads=args.width // 32, max_position_embeddings=384,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for polish, updates in ((False, args.updates), (True, args.polish)):
        student.rng = np.random.default_rng([args.seed, 2]) if polish else student.rng
        lr = args.lr / 3 if polish else args.lr
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01
        )
        bar = tqdm(
            range(updates),
            desc=f"{'polish' if polish else 'pre-train'} {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters",
        )
        for update in bar:
            progress = update / updates
            for group in (
                optimizer.param_groups
            ):  # warm up over 100 updates, hold, then fall to zero over the last 40%
                group["lr"] = lr * min(1, (update + 1) / 100) * min(1, (1 - progress) / 0.4)
            short = progress < 0.08 and not polish  # short chains first
            K = int(student.rng.integers(2, 6 if short else STEPS + 1))
            K = STEPS if not short and update % 2 else K
            losses, right, kind, target = token_losses(
                model, *student.batch(args.chains * STEPS // K, K, review=polish or progress > 0.25)
            )
            drill_losses, drill_right, _, _ = token_losses(model, *student.drills(args.drills))
            loss = losses.mean() + 0.3 * drill_losses.mean()
            shares = {
                "drills": drill_right,
                "judgements": right[kind == 2],
                "boxed": right[kind == 3],
            }
            if polish:
                quote_losses, shares["quotations"], _, _ = token_losses(
                    model, *student.quotations(args.chains // 3, STEPS)
                )
                loss = loss + 0.3 * quote_losses.mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if update % 100 == 99:
                bar.write(f"{update + 1}: K {K} value loss {losses[kind == 1].mean():.3f} (floor {student.floor:.3f}), other {losses[kind == 0].mean():.4f}; "
                          "right: " + ", ".join(f"{name} {share.float().mean():.3f}" for name, share in shares.items() if len(share)))  # fmt: skip
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    write_card(args.out)


if __name__ == "__main__":
    main()
