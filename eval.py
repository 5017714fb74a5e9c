"""Measuring a policy and drawing runs. Nothing here is trained on.

    python eval.py pass --model DIR --data chain-12 --samples 8       # pass@1 with a 95% interval over problems, and pass@k
    python eval.py curves RUN_DIR [RUN_DIR...] --out curves.png       # learning curves; runs that differ only in their seed become mean and spread
    python eval.py card --model data/policy --write                   # the model card of the embedded policy, measured
    python eval.py throughput --model data/policy                     # tokens per second of the engines, beside transformers' own generate
    python eval.py phases RUN_DIR [RUN_DIR...]                        # seconds per step by phase

Left out: public benchmarks and the HTML report.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

from data.problems import DELIMITER, UserError, counters, generate_chains, load_problems
from localize import by_self
from rollout import HFEngine, Task, encode_question, load_policy, make_engine, resets, run_programs

# ------------------------------------------------------------------------------------------------------------------ pass rate


def evaluate(tasks: list[Task], engine, samples: int) -> dict:
    """Samples `samples` responses of each task: {"pass_rate", "rewards" [tasks, samples], "groups", "tokens", "finish"}."""
    groups, generated, _ = run_programs([all_of(task, samples) for task in tasks], engine)
    rewards = np.array([[r.reward for r in group] for group in groups])
    return {
        "pass_rate": float((rewards >= tasks[0].cfg.correct).mean()),
        "rewards": rewards,
        "groups": groups,
        "tokens": sum(r.generated for r in generated),
        "finish": dict(Counter(r.finish for r in generated)),
    }


def all_of(task: Task, samples: int):
    (group,) = yield [task.request("base", samples)]
    return group


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from c right ones of n: 1 - C(n-c, k) / C(n, k).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def make_tasks(problems, tokenizer, engine, context: int, seed: int = 0, **settings) -> list[Task]:
    """Tasks for measuring, with the training run's usual sampling settings unless told otherwise."""
    usual = dict(temperature=1.0, top_p=1.0, max_thoughts=20, max_tokens_per_thought=256, correct=1.0, localize_temperature=0.3, localize_tokens=4096,
                 localize_fallback="skip")  # fmt: skip
    cfg = SimpleNamespace(**(usual | settings))
    return [
        Task(p, encode_question(tokenizer, p), slot, cfg, engine.vocabulary, by_self, np.random.default_rng([seed, slot]), context)
        for slot, p in enumerate(problems)
    ]


def load(args):
    model, tokenizer = load_policy(args.model)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer, HFEngine(model, tokenizer), model.config.max_position_embeddings


def command_pass(args) -> None:
    model, tokenizer, engine, context = load(args)
    problems = load_problems(args.data, seed=10**6 + args.seed)[: args.problems]
    result = evaluate(make_tasks(problems, tokenizer, engine, context, args.seed, temperature=args.temperature), engine, args.samples)
    rates = result["rewards"].mean(1)
    half = 1.96 * rates.std(ddof=1) / math.sqrt(len(rates)) if len(rates) > 1 else float("nan")
    print(f"{args.data}: {len(problems)} problems x {args.samples} samples, T = {args.temperature}")
    print(f"pass@1 {rates.mean():.3f} +- {half:.3f} (95%, over problems)")
    for k in (k for k in (2, 4, 8, 16, 32, 64) if k <= args.samples):
        print(f"pass@{k} {np.mean([pass_at_k(args.samples, int(c), k) for c in result['rewards'].sum(1)]):.3f}")
    print(f"{result['tokens'] / result['rewards'].size:.1f} tokens per response; ended by {result['finish']}; grading faults {dict(counters)}")


# --------------------------------------------------------------------------------------------------------------------- curves


def read_run(run: Path) -> tuple[dict, list[dict]]:
    """(config, step lines) of a run directory. Raises UserError if it is none."""
    try:
        config = json.loads((run / "config.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as fault:
        raise UserError(f"{run}: not a run directory of srpo.py ({fault})")
    return config, lines


def name_of(config: dict) -> str:
    """What tells a run apart from others of one study, without its seed."""
    if config["method"] == "grpo":
        return "grpo"
    parts = [config["method"], f"{config['prefixes']}x{config['suffixes']}"]
    parts += [config["localizer"]] if config["localizer"] not in ("self", "random") else []
    parts += [config["seed_choice"]] if config["seed_choice"] != "first" else []
    parts += ["fresh seeds"] if config["seed_source"] != "base" else []
    return " ".join(parts)


def by_name(runs: list[Path]) -> dict[str, list[tuple[dict, list[dict]]]]:
    named = defaultdict(list)
    for run in runs:
        config, lines = read_run(Path(run))
        named[name_of(config)].append((config, lines))
    return named


def draw_curves(runs: list[Path], out: Path) -> None:
    """Held-out pass rate against steps and against generated tokens; with several seeds of a name, their mean and range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    named = by_name(runs)
    for color, (name, members) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"] * 9, named.items()):
        points = [[(x["step"], x["total_tokens"] / 1e6, x["eval_pass_rate"]) for x in lines if "eval_pass_rate" in x] for _, lines in members]
        shared = min(map(len, points))
        steps, tokens, rates = np.array([p[:shared] for p in points]).transpose(2, 0, 1)  # each [seeds, evaluations]
        for axis, x in zip(axes, (steps.mean(0), tokens.mean(0))):
            label = name if len(members) == 1 else f"{name} ({len(members)} seeds)"
            axis.plot(x, rates.mean(0), color=color, label=label, marker="o", markersize=3)
            if len(members) > 1:
                axis.fill_between(x, rates.min(0), rates.max(0), color=color, alpha=0.15, linewidth=0)
    if len(named) == 1 and len(members) == 1:  # one run: its training rates too, which have a point at every step
        lines = [x for x in members[0][1] if x["step"] > 0]
        for key, label in (("pass_base", "base groups"), ("pass_suffix", "suffix groups")):
            seen = [(x["step"], x["total_tokens"] / 1e6, x[key]) for x in lines if x[key] is not None]
            for axis, column in zip(axes, (0, 1)):
                axis.plot([s[column] for s in seen], [s[2] for s in seen], label=f"{label} (training)", linewidth=0.8, alpha=0.6)
    axes[0].set(xlabel="step", ylabel="pass rate", ylim=(0, 1))
    axes[1].set(xlabel="million generated tokens (all purposes)")
    axes[0].set_title("held-out pass rate by step", fontsize=10)
    axes[1].set_title("at equal cost", fontsize=10)
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="upper left")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def first_reach(lines: list[dict], target: float, key: str) -> float:
    """Value of `key` at which the held-out pass rate first reaches target, linear between evaluations; nan if it never does."""
    points = [(x[key], x["eval_pass_rate"]) for x in lines if "eval_pass_rate" in x]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y0 < target <= y1:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return float("nan")


def command_curves(args) -> None:
    draw_curves(args.runs, args.out)
    print("| method | seeds | steps | M tokens | final pass rate | steps to 0.5 | M tokens to 0.5 | exact h*, first and last 10 steps |")
    print("|---|---|---|---|---|---|---|---|")

    def spread(values, form):
        values = np.array(values, float)
        reached = values[~np.isnan(values)]
        if not len(reached):
            return "not reached"
        missing = f" ({len(values) - len(reached)} not)" if len(reached) < len(values) else ""
        return f"{reached.mean():{form}} ± {reached.std(ddof=1) if len(reached) > 1 else 0:{form}}{missing}"

    def exactness(members):  # share of reset indices that were the true first error, where the task knows it
        ends = [
            [x["localized_exact"] for _, lines in members for x in lines[part] if x.get("localized_exact") is not None]
            for part in (slice(1, 11), slice(-10, None))
        ]
        return ", ".join(f"{np.mean(end):.2f}" for end in ends) if all(ends) else "-"

    for name, members in by_name(args.runs).items():
        finals = [[x for x in lines if "eval_pass_rate" in x][-1] for _, lines in members]
        print(f"| {name} | {len(members)} | {np.mean([f['step'] for f in finals]):.0f} | {spread([f['total_tokens'] / 1e6 for f in finals], '.2f')} "
              f"| {spread([f['eval_pass_rate'] for f in finals], '.3f')} | {spread([first_reach(x, 0.5, 'step') for _, x in members], '.0f')} "
              f"| {spread([first_reach(x, 0.5, 'total_tokens') / 1e6 for _, x in members], '.2f')} | {exactness(members)} |")  # fmt: skip
    print(f"mean ± standard deviation over seeds; drawn in {args.out} (band: range over seeds)")


def command_phases(args) -> None:
    for name, members in by_name(args.runs).items():
        steps = [x["seconds"] for _, lines in members for x in lines if "seconds" in x]
        total = sum(sum(s.values()) for s in steps)
        shares = {phase: sum(s.get(phase, 0) for s in steps) for phase in ("base", "seed", "localization", "suffix", "oracle", "grade", "wait", "train", "sync")}
        print(f"{name}: {total / len(steps):.2f} s per step over {len(steps)} steps: "
              + ", ".join(f"{phase} {s / len(steps):.2f} s ({s / total:.0%})" for phase, s in shares.items() if s))  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the embedded policy


def measure_policy(model, tokenizer, engine, context: int, n: int, steps: int, seed: int = 0) -> dict:
    """The measures of the model card, on n held-out chains of `steps` steps, 4 samples each; shares in [0, 1]."""
    problems = generate_chains(steps, n, seed=2 * 10**6 + seed)
    tasks = make_tasks(problems, tokenizer, engine, context, seed)
    result = evaluate(tasks, engine, 4)
    greedy = evaluate(make_tasks(problems, tokenizer, engine, context, seed, temperature=0.0), engine, 1)["pass_rate"]
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
    found, generated, _ = run_programs([by_self(task, [r]) for task, r, _ in failures], engine)
    exact = np.array([answer[0][0] == h for answer, (_, _, h) in zip(found, failures)])
    first = np.array([h for _, _, h in failures])
    return {
        "pass_rate": result["pass_rate"],
        "greedy": greedy,
        "per_step": steps_right / steps_seen,
        "localization_exact": float(exact.mean()),
        "localization_by_first_error": {int(h): (round(float(exact[first == h].mean()), 2), int((first == h).sum())) for h in np.unique(first)},
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

Built from nothing by `python -m data.build_policy --out data/policy` (seeded). Measured by `python eval.py card --model data/policy --write`:
{n} held-out chains of 12 steps, 4 samples each at T = 1 (share of all; the task is `chain-12`).

| measure | value |
|---|---|
| sampled pass rate | {pass_rate:.3f} |
| greedy pass rate | {greedy:.3f} |
| right steps, among those that follow only right steps | {per_step:.3f} |
| self-localization: exact first wrong step, on its own failures | {localization_exact:.3f} |
| the same on chains of 8 steps (it learned to quote itself at 12) | {shorter:.3f} |
| by a uniformly random choice | {random_localization:.3f} |
| by always answering step 1 | {always_first:.3f} |
| right answers among chains with a wrong step (luck) | {luck:.4f} |
| tokens of a localization answer, mean | {localization_tokens:.1f} |

Self-localization by the true first wrong step (exact share, number of failures): {localization_by_first_error}.
Localization answers without a usable step: {localization_faults}. Responses ended by: {finish}.
"""


def command_card(args) -> None:
    model, tokenizer, engine, context = load(args)
    measures = measure_policy(model, tokenizer, engine, context, args.problems, steps=12)
    shorter = measure_policy(model, tokenizer, engine, context, max(1, args.problems // 4), steps=8)["localization_exact"]
    size = sum(file.stat().st_size for file in Path(args.model).glob("*") if file.suffix != ".md")
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6, megabytes=size / 1e6, n=args.problems, shorter=shorter,
        head=model.config.hidden_size // model.config.num_attention_heads, **measures,
    )  # fmt: skip
    print(card)
    if args.write:
        (Path(args.model) / "README.md").write_text(card)


def command_throughput(args) -> None:
    """Generated tokens per second of the engines and of transformers' generate: same prompts, same stops (of the embedded policy), in turns.
    With vLLM also: a step of SRPO with and without a barrier between its phases, and the time of a weight sync."""
    with tempfile.TemporaryDirectory() as folder:
        if args.layers:
            save_random_policy(folder, args.model, args.layers, args.width)
        model, tokenizer = load_policy(folder if args.layers else args.model)
        context = model.config.max_position_embeddings
        engine = make_engine(args.engine, folder if args.layers else args.model, model, tokenizer, context, max_rows=256)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tasks = make_tasks(load_problems(args.data, seed=1)[: args.problems], tokenizer, engine, context, base=4, prefixes=1, suffixes=4, seed_source="base",
                       seed_choice="first", max_seed_draws=8, localize_tokens=256, max_tokens_per_thought=16)  # fmt: skip
    prompts = [t.prompt_ids for t in tasks for _ in range(args.samples)]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = (ids != tokenizer.pad_token_id).long()
    end = torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in ("}", DELIMITER)], device=model.device)
    sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, stopping_criteria=StoppingCriteriaList([lambda ids, _, **kw: (ids[:, -2:] == end).all(1)]))
    longest = 0

    def sample(engine):
        nonlocal longest
        rollouts = [r for group in engine.sample([t.request("base", args.samples) for t in tasks]) for r in group]
        longest = max(r.generated for r in rollouts)
        return sum(r.generated for r in rollouts)

    def generate():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=longest, **sampling)
        return int((out[:, width:] != tokenizer.pad_token_id).sum())

    def step(engine):
        for i, task in enumerate(tasks):
            task.rng = np.random.default_rng(i)  # the same step each time
        if engine.name == "vllm":
            engine.llm.reset_prefix_cache()
        return sum(r.generated for r in run_programs([resets(t) for t in tasks], engine)[1])

    contenders = {"hf engine": lambda: sample(HFEngine(model, tokenizer)), "generate": generate}
    if engine.name == "vllm":
        barrier = copy.copy(engine)
        barrier.finished = lambda: [answer for _ in iter(lambda: bool(engine.under_way), False) for answer in engine.finished()]
        contenders |= {"vllm engine": lambda: sample(engine), "srpo step": lambda: step(engine), "srpo step, with barriers": lambda: step(barrier)}
    speeds, syncs = {name: [] for name in contenders}, []
    model.eval()
    for repeat in range(args.repeats + 1):  # the first is a warm-up
        for name, contender in contenders.items():
            start = time.perf_counter()
            tokens = contender()
            speeds[name] += [tokens / (time.perf_counter() - start)] if repeat else []
        start = time.perf_counter()
        engine.sync(model.named_parameters())
        syncs += [time.perf_counter() - start] if repeat else []

    def ratio(a, b):
        ratios = np.array(speeds[a]) / np.array(speeds[b])
        return f"{a} / {b}: {np.median(ratios):.2f} (range {ratios.min():.2f}-{ratios.max():.2f})"

    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(prompts)} rows, {model.device}, {torch.get_num_threads()} threads, "
          f"medians of {args.repeats} in turns")  # fmt: skip
    for name in contenders:
        print(f"{name}: {np.median(speeds[name]):.0f} tokens/s")
    print(ratio("hf engine", "generate"))
    if engine.name == "vllm":
        print(f"{ratio('vllm engine', 'hf engine')}\n{ratio('srpo step', 'srpo step, with barriers')}\nweight sync: {1000 * np.median(syncs):.0f} ms")


def save_random_policy(folder: str, tokenizer: str, layers: int, width: int) -> None:
    """A Llama with random weights and the tokenizer of another policy: of a size to measure, and with nothing to say."""
    words = load_policy(tokenizer)[1]
    ends = dict(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id)
    config = LlamaConfig(vocab_size=len(words), hidden_size=width, intermediate_size=int(2.75 * width), num_hidden_layers=layers, num_attention_heads=width // 64,
                         head_dim=64, max_position_embeddings=1024, tie_word_embeddings=False, **ends)  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


# --------------------------------------------------------------------------------------------------------------- command line


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measures policies and draws runs of srpo.py.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    policy = str(Path(__file__).resolve().parent / "data" / "policy")

    def command(function, help):
        sub = commands.add_parser(function.__name__.removeprefix("command_"), help=help)
        sub.set_defaults(function=function)
        return sub

    sub = command(command_pass, "pass@k of a policy on a data set")
    sub.add_argument("--model", default=policy, help="folder or hub id")
    sub.add_argument("--data", default="chain-12", help="JSON-lines file or chain-K")
    sub.add_argument("--problems", type=int, default=256, help="problems, at most")
    sub.add_argument("--samples", type=int, default=8, help="samples per problem")
    sub.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling, and of generated problems")
    sub = command(command_curves, "learning curves and a table of runs")
    sub.add_argument("runs", nargs="+", type=Path, help="run directories")
    sub.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write")
    sub = command(command_phases, "seconds per step by phase")
    sub.add_argument("runs", nargs="+", type=Path, help="run directories")
    sub = command(command_card, "measures the embedded policy")
    sub.add_argument("--model", default=policy, help="folder")
    sub.add_argument("--problems", type=int, default=1024, help="held-out problems")
    sub.add_argument("--write", action="store_true", help="write the model card into the folder")
    sub = command(command_throughput, "speed of the engines beside transformers' generate")
    sub.add_argument("--model", default=policy, help="folder or hub id")
    sub.add_argument("--engine", choices=["auto", "hf", "vllm"], default="auto", help="vllm or auto: measure it too")
    sub.add_argument("--layers", type=int, default=0, help="measure a random policy of so many layers instead (0: --model itself)")
    sub.add_argument("--width", type=int, default=512, help="its width, a multiple of 64")
    sub.add_argument("--data", default="chain-12", help="JSON-lines file or chain-K")
    sub.add_argument("--problems", type=int, default=32, help="prompts in the batch")
    sub.add_argument("--samples", type=int, default=8, help="responses of each")
    sub.add_argument("--repeats", type=int, default=5, help="timed repeats of both, in turns")
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"eval.py: {fault}", file=sys.stderr)
        sys.exit(2)
