"""Measuring a policy and drawing runs. Nothing here is trained on.

    python eval.py benchmark --model DIR --data chain-12 gsm8k.jsonl --n 8   # mean@n with intervals, pass@k; resumes; torchrun runs it too
    python eval.py localization --model DIR --data processbench.jsonl # first-error accuracy and F1; with problems: on the policy's own failures
    python eval.py self-correct --model DIR --data chain-12           # resets at test time, beside best-of-n at equal tokens
    python eval.py benchmark --compare A/results.json B/results.json  # paired difference of two policies
    python eval.py curves RUN_DIR [RUN_DIR...] --out curves.png       # learning curves, results, costs; runs that differ only in their seed are one
    python eval.py report RUN_DIR [RUN_DIR...] --out report.html      # one page: curves, metrics by phase, and the tree of every problem

Left out: judge models, and statistics over more than seeds or problems.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from data.curves import by_name, cost_table, draw_curves, results_table
from data.faults import UserError, counters
from data.parallel import connect, gather, processes, rank
from data.tasks import GENERATED, load_problems
from data.verifiers import last_boxed, sandbox_or_refusal
from localize import (
    UNKNOWN,
    WRONG,
    by_oracle,
    by_self,
    by_verifier,
    fallback,
    parse_localization,
    review_text as review,
    reviewed,
)
from data.policies import encode_prompt, encode_question, load_policy
from rollout import Request, Task, make_engine, run_programs

# ------------------------------------------------------------------------------------------------------------------ pass rate


def evaluate(tasks: list[Task], engine, samples: int) -> dict:
    """Samples `samples` responses of each task: {"pass_rate", "rewards" [tasks, samples], "groups", "tokens", "finish"}."""
    sampled = run_programs([all_of(task, samples) for task in tasks], engine)
    groups, generated = sampled.results, sampled.generated
    rewards = np.array([[r.reward for r in group] for group in groups])
    return SimpleNamespace(
        pass_rate=float((rewards >= tasks[0].cfg.correct).mean()),
        rewards=rewards,
        groups=groups,
        tokens=sum(r.generated for r in generated),
        finish=dict(Counter(r.finish for r in generated)),
    )


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
        Task(
            p,
            encode_question(tokenizer, p),
            slot,
            cfg,
            engine.vocabulary,
            by_self,
            np.random.default_rng([seed, slot]),
            context,
        )
        for slot, p in enumerate(problems)
    ]


def open_policy(args):
    """(tokenizer, engine, context) for measuring --model with --engine, on this process's GPU where there is one."""
    device, _ = connect()
    model, tokenizer = load_policy(args.model)
    context = model.config.get_text_config().max_position_embeddings
    return (
        tokenizer,
        make_engine(
            args.engine,
            args.model,
            model,
            tokenizer,
            context,
            args.max_rows,
            device=device if device.type == "cuda" else None,
        ),
        context,
    )


def limits(args) -> dict:
    """Settings of `make_tasks` that say how long responses and reviews may get."""
    return {
        key: getattr(args, key)
        for key in ("max_thoughts", "max_tokens_per_thought", "localize_tokens")
    }


# ----------------------------------------------------------------------------------------------------------------- benchmarks

KS = (1, 2, 4, 8, 16, 32, 64)


def command_benchmark(args) -> None:
    """Samples n responses to every problem of each file, in one process or under torchrun, and writes to --out: FILE.jsonl with every rollout
    and results.json. What is there already is kept, so the same command goes on where it stopped."""
    if args.compare:
        return compare(*args.compare)
    if not args.data:
        raise UserError(
            f"benchmark needs --data FILE [FILE...] (JSON lines, or {GENERATED}), or --compare A.json B.json"
        )
    if args.samples < 1 or args.temperature < 0 or args.samples > 1 and args.temperature == 0:
        raise UserError(
            "--n must be at least 1, and --temperature above 0 where it is more: greedy responses are all the same"
        )
    main = rank() == 0
    sources = {
        Path(data).stem: load_problems(data, seed=10**6 + args.seed)[: args.problems]
        for data in args.data
    }
    if (
        any(p.kind == "code" for problems in sources.values() for p in problems)
        and sandbox_or_refusal()
        and main
    ):
        print(sandbox_or_refusal())
    settings = {
        key: getattr(args, key)
        for key in (
            "model",
            "samples",
            "temperature",
            "seed",
            "problems",
            "max_thoughts",
            "max_tokens_per_thought",
        )
    }
    out = (
        args.out
        or Path("benchmarks")
        / f"{Path(args.model).name}-n{args.samples}-T{args.temperature}-seed{args.seed}"
    )
    if (out / "settings.json").exists() and json.loads(
        (out / "settings.json").read_text()
    ) != settings:
        raise UserError(f"{out} holds a benchmark with other settings; choose another --out")
    tokenizer, engine, context = open_policy(args)
    gather(None)  # nobody reads settings.json any more
    if main:
        out.mkdir(parents=True, exist_ok=True)
        (out / "settings.json").write_text(json.dumps(settings, indent=1))
    results = {}
    for name, problems in sources.items():
        tasks = make_tasks(
            problems,
            tokenizer,
            engine,
            context,
            args.seed,
            temperature=args.temperature,
            **limits(args),
        )
        short = [task.problem.index for task in tasks if len(task.prompt_ids) >= context]
        if short:
            raise UserError(
                f"{name}: the prompt of problem {short[0]} is longer than the model's context, {context} tokens; remove it"
            )
        done = finished_problems(out / f"{name}.jsonl", args.samples)
        gather(None)  # everybody has read what is done; from here on the first process writes
        todo = [task for task in tasks if task.problem.index not in done]
        each = max(
            processes(), args.max_rows * processes() // args.samples
        )  # problems at a time: nothing that was computed before a stop is lost
        bar = tqdm(
            range(0, len(todo), each), desc=name, unit="batch", disable=not main, dynamic_ncols=True
        )
        for at in bar:
            part = todo[at : at + each]
            counters.clear()
            start = time.perf_counter()
            groups = evaluate(part, engine, args.samples).groups
            seconds = (time.perf_counter() - start) / len(part)
            records = [{"problem": task.problem.index, "sample": i, "reward": r.reward, "finish": r.finish, "tokens": r.generated, "seconds": seconds / len(group),
                        "answered": answered(task.problem, r.text), "text": r.text} for task, group in zip(part, groups) for i, r in enumerate(group)]  # fmt: skip
            if main:
                with (out / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(record) + "\n" for record in records))
        gather(None)
        results[name] = summary(
            finished_problems(out / f"{name}.jsonl", args.samples), args.samples
        )
    if main:
        (out / "results.json").write_text(
            json.dumps({"settings": settings, "results": results}, indent=1)
        )
        print_table(results, args.samples)
        print(f"{out}/results.json, and every rollout in {out}/*.jsonl")


def answered(problem, text: str) -> bool:
    return "```" in text if problem.kind == "code" else last_boxed(text) is not None


def finished_problems(path: Path, samples: int) -> dict[int, list[dict]]:
    """{problem: its rollouts} of the problems that have all of them; a line that a kill cut in two does not count, and is dropped from the file."""
    found = defaultdict(list)
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines:
            if line.endswith("\n"):
                record = json.loads(line)
                found[record["problem"]].append(record)
        kept = [
            line
            for line in lines
            if line.endswith("\n") and len(found[json.loads(line)["problem"]]) == samples
        ]
        gather(None)
        if len(kept) < len(lines) and rank() == 0:
            path.with_suffix(".tmp").write_text("".join(kept), encoding="utf-8")
            os.replace(path.with_suffix(".tmp"), path)
    else:
        gather(None)
    return {problem: records for problem, records in found.items() if len(records) == samples}


def summary(done: dict[int, list[dict]], samples: int) -> dict:
    """Of one set: mean@n with half a 95% interval over problems, pass@k, mean reward, tokens and seconds a problem, shares truncated and
    without an answer, and every problem's share of correct responses."""
    rewards = np.array(
        [[r["reward"] for r in done[p]] for p in sorted(done)]
    )  # [problems, samples]
    right, records = rewards >= 1, [r for p in sorted(done) for r in done[p]]
    rates = right.mean(1)
    return {
        "problems": len(rates), "mean": float(rates.mean()), "half": half_interval(rates), "reward": float(rewards.mean()),
        "pass_at": {k: float(np.mean([pass_at_k(samples, int(c), k) for c in right.sum(1)])) for k in KS if k <= samples},
        "tokens": sum(r["tokens"] for r in records) / len(rates), "seconds": sum(r["seconds"] for r in records) / len(rates),
        "truncated": float(np.mean([r["finish"] in ("length", "thoughts") for r in records])),
        "unparsable": float(np.mean([not r["answered"] for r in records])), "by_problem": {str(p): float(rate) for p, rate in zip(sorted(done), rates)},
    }  # fmt: skip


def half_interval(values: np.ndarray) -> float:
    return (
        float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))
        if len(values) > 1
        else float("nan")
    )


def print_table(results: dict, samples: int) -> None:
    ks = [k for k in KS if 1 < k <= samples]
    print(
        f"| | problems | mean@{samples} |"
        + "".join(f" pass@{k} |" for k in ks)
        + " reward | tokens | seconds | truncated | unparsable |"
    )
    print("|---" * (8 + len(ks)) + "|")
    for name, r in results.items():
        print(f"| {name} | {r['problems']} | {r['mean']:.3f} ± {r['half']:.3f} |" + "".join(f" {r['pass_at'][k]:.3f} |" for k in ks)
              + f" {r['reward']:.3f} | {r['tokens']:.0f} | {r['seconds']:.2f} | {r['truncated']:.3f} | {r['unparsable']:.3f} |")  # fmt: skip
    print("± is half a 95% interval over problems; tokens and seconds per problem")


def compare(a: Path, b: Path, resamples: int = 10_000) -> None:
    """Paired difference of two results.json, problem by problem, with a bootstrap interval over problems."""
    try:
        first, second = (json.loads(path.read_text())["results"] for path in (a, b))
    except (OSError, json.JSONDecodeError, KeyError) as fault:
        raise UserError(
            f"--compare needs two results.json of this command ({type(fault).__name__}: {fault})"
        )
    shared = [name for name in first if name in second]
    if not shared:
        raise UserError(
            f"{a} and {b} share no data set: {', '.join(first)} against {', '.join(second)}"
        )
    print(
        f"| | problems | {a.parent.name} | {b.parent.name} | difference, 95% interval |\n|---|---|---|---|---|"
    )
    for name in shared:
        x, y = first[name]["by_problem"], second[name]["by_problem"]
        if x.keys() != y.keys():
            raise UserError(
                f"{name}: the two were measured on different problems; use the same --data, --problems and --seed"
            )
        differences = np.array([y[p] - x[p] for p in x])
        picks = np.random.default_rng(0).integers(
            len(differences), size=(resamples, len(differences))
        )
        low, high = np.percentile(differences[picks].mean(1), (2.5, 97.5))
        print(
            f"| {name} | {len(x)} | {np.mean(list(x.values())):.3f} | {np.mean(list(y.values())):.3f} | {differences.mean():+.3f} ({low:+.3f} to {high:+.3f}) |"
        )


# --------------------------------------------------------------------------------------------------------------- localization


def command_localization(args) -> None:
    """How well a policy finds the first wrong thought: on labelled solutions (ProcessBench, `data.prepare`), or on failures of its own."""
    tokenizer, engine, context = open_policy(args)
    if is_labelled(args.data):
        result = on_labelled(
            load_labelled(args.data)[: args.problems], tokenizer, engine, context, args
        )
    else:
        problems = load_problems(args.data, seed=10**6 + args.seed)[: args.problems]
        reference = by_verifier if all(p.check_steps for p in problems) else by_oracle
        tasks = make_tasks(
            problems,
            tokenizer,
            engine,
            context,
            args.seed,
            localize_temperature=args.temperature,
            oracle_samples=8,
            oracle_tau=0.1,
            **limits(args),
        )
        result = on_own_failures(tasks, engine, reference)
    print(f"{args.model} on {args.data}; counters {dict(counters)}")
    for name, value in result.items():
        print(f"{name}: {value}")


def is_labelled(source: str) -> bool:
    return Path(source).is_file() and '"label"' in Path(source).open(encoding="utf-8").readline()


def load_labelled(source: str) -> list[dict]:
    """Records with question, steps (H texts), and label: 0-based index of the first wrong step, -1 for none."""
    records = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    for number, r in enumerate(records, 1):
        if not (
            isinstance(r.get("steps"), list)
            and r["steps"]
            and isinstance(r.get("label"), int)
            and -1 <= r["label"] < len(r["steps"])
        ):
            raise UserError(
                f"{source}, line {number}: needs steps (a list of texts) and label (-1, or a 0-based index into them)"
            )
    return records


def ask(texts: list[str], tokenizer, engine, context: int, args) -> list[str | None]:
    """What the policy answers to each text; None where a text does not fit its context."""
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    fits = [k for k, prompt in enumerate(prompts) if len(prompt) < context]
    requests = [
        Request(
            k,
            "localization",
            prompts[k],
            1,
            args.seed * 10**6 + k,
            min(args.localize_tokens, context - len(prompts[k])),
            args.temperature,
            1.0,
        )
        for k in fits
    ]
    answers = dict(zip(fits, engine.sample(requests)))
    return [answers[k][0].text if k in answers else None for k in range(len(prompts))]


def on_labelled(records: list[dict], tokenizer, engine, context: int, args) -> dict:
    """ProcessBench's accuracies and F1 with the prompt that may answer "no error", and SRPO's setting: told that the answer is wrong."""
    named = [
        named_step(text, len(r["steps"]))
        for r, text in zip(
            records,
            ask(
                [review(r["question"], r["steps"], UNKNOWN) for r in records],
                tokenizer,
                engine,
                context,
                args,
            ),
        )
    ]
    wrong = [r for r in records if r["label"] >= 0]
    told = [
        named_step(text, len(r["steps"]))
        for r, text in zip(
            wrong,
            ask(
                [review(r["question"], r["steps"]) for r in wrong], tokenizer, engine, context, args
            ),
        )
    ]
    scores = processbench_scores([r["label"] for r in records], named)
    exact = [h == r["label"] + 1 for h, r in zip(told, wrong)]
    return scores | {
        "told that it is wrong, exact": share(sum(exact), len(exact)),
        "a step chosen at random": f"{np.mean([1 / len(r['steps']) for r in wrong]) if wrong else float('nan'):.3f}",
        "no step named": f"{named.count(None)} of {len(named)}; told that it is wrong, {sum(h in (None, 0) for h in told)} of {len(told)}",
    }


def named_step(text: str | None, H: int) -> int | None:
    """1-based step that an answer names, 0 for "no error", None for neither."""
    h, how = parse_localization(text, H) if text is not None else (None, "too_long")
    if h is None and how != "no_error":
        counters[f"localize_{how}"] += 1
    return 0 if how == "no_error" else h


def processbench_scores(labels: list[int], named: list[int | None]) -> dict:
    """Accuracy on erroneous solutions (exact step), on correct ones (0 named), and F1, their harmonic mean, as ProcessBench defines them.

    labels: 0-based first wrong step, -1 for none; named: 1-based, 0 for no error, None for no answer (which is wrong)."""
    hits = [n is not None and n == label + 1 for n, label in zip(named, labels)]
    erroneous, correct = (
        [hit for hit, label in zip(hits, labels) if (label >= 0) == bad] for bad in (True, False)
    )
    a, b = (sum(part) / len(part) if part else float("nan") for part in (erroneous, correct))
    return {"accuracy on erroneous": share(sum(erroneous), len(erroneous)), "accuracy on correct": share(sum(correct), len(correct)),
            "F1": f"{2 * a * b / (a + b) if a + b else 0.0:.3f}"}  # fmt: skip


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% interval of a share, Wilson's.

    >>> [round(x, 3) for x in wilson(5, 10)]
    [0.237, 0.763]
    """
    z, p = 1.96, right / n
    middle, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)),
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def share(right: int, n: int) -> str:
    if not n:
        return "none"
    low, high = wilson(right, n)
    return f"{right / n:.3f} ({low:.3f} to {high:.3f}, {right} of {n})"


def on_own_failures(tasks: list[Task], engine, reference) -> dict:
    """One failure of each problem, localized by the policy and by the reference; four suffixes from where the policy resets.

    Deviation d = named - true first wrong step. d <= 0: a clean prefix; d > 0: the error is still in it."""
    reviews = [
        r
        for r in run_programs([review_failure(task, reference) for task in tasks], engine).results
        if r
    ]
    named = [(h - truth, rewards) for h, truth, _, rewards in reviews if h is not None]
    rate = lambda part: share(
        sum(r >= 1 for _, rewards in part for r in rewards),
        sum(len(rewards) for _, rewards in part),
    )  # noqa: E731
    clean, erroneous = (
        [item for item in named if (item[0] <= 0) == good] for good in (True, False)
    )
    result = {
        "failures": f"{len(reviews)} of {len(tasks)} problems; reference: {reference.__name__.removeprefix('by_')}",
        "exact": share(sum(d == 0 for d, _ in named), len(reviews)),
        "a step chosen at random": f"{np.mean([1 / H for _, _, H, _ in reviews]) if reviews else float('nan'):.3f}",
        "deviations": dict(sorted(Counter(d for d, _ in named).items())),
        "corrected, from a clean prefix": rate(clean), "corrected, from an erroneous prefix": rate(erroneous),
    }  # fmt: skip
    for name, part in (("clean", clean), ("erroneous", erroneous)):
        result[f"pass@4, from a prefix that is {name}"] = share(
            sum(any(r >= 1 for r in rewards) for _, rewards in part), len(part)
        )
    for low, high, name in (
        (-99, -2, "2 or more early"),
        (-1, -1, "1 early"),
        (0, 0, "exact"),
        (1, 1, "1 late"),
        (2, 99, "2 or more late"),
    ):
        result[f"corrected, {name}"] = rate([item for item in named if low <= item[0] <= high])
    return result


def review_failure(task: Task, reference):
    """Program: (the policy's h* or None, the reference's, H, rewards of four suffixes) of the first failure of two draws; None without one."""
    (base,) = yield [task.request("base", 2)]
    seed = next((r for r in base if r.reward < task.cfg.correct), None)
    if seed is None:
        return None
    ((h, _),) = yield from by_self(task, [seed])
    ((truth, _),) = yield from reference(task, [seed])
    suffixes = (yield [task.request("suffix", 4, seed, h)])[0] if h else []
    return h, truth, len(seed.thought_ends), [r.reward for r in suffixes]


# ----------------------------------------------------------------------------------------------------------- self-correction


def command_self_correct(args) -> None:
    """Resets at test time: localize, reset, sample again, until the judge is satisfied. Beside it the same with restarts from the prompt,
    which is best-of-n; both by round and at equal generated tokens, reviews included."""
    tokenizer, engine, context = open_policy(args)
    problems = load_problems(args.data, seed=10**6 + args.seed)[: args.problems]
    curves = {}
    for reset in (True, False):
        tasks = make_tasks(
            problems,
            tokenizer,
            engine,
            context,
            args.seed,
            temperature=args.temperature,
            localize_fallback="random",
            **limits(args),
        )
        traces = np.array(
            run_programs(
                [self_correct(task, args.rounds, args.judge, reset) for task in tasks], engine
            ).results,
            float,
        )  # [problems, rounds + 1, 2]
        curves[reset] = traces[..., 0] >= 1, traces[..., 1].mean(0)
    print(
        f"{args.model} on {args.data}: {len(problems)} problems, T = {args.temperature}, judge: {args.judge}; counters {dict(counters)}"
    )
    print(
        "| rounds | resets: accuracy | tokens | best of rounds + 1: accuracy | tokens | best of n at the tokens of resets |\n|---|---|---|---|---|---|"
    )
    for k in range(args.rounds + 1):
        (right, tokens), (restarted, costs) = curves[True], curves[False]
        at_equal = (
            f"{np.interp(tokens[k], costs, restarted.mean(0)):.3f}"
            if tokens[k] <= costs[-1] + 1e-9
            else "beyond"
        )
        print(f"| {k} | {right[:, k].mean():.3f} ± {half_interval(right[:, k]):.3f} | {tokens[k]:.0f} | {restarted[:, k].mean():.3f} ± {half_interval(restarted[:, k]):.3f} "
              f"| {costs[k]:.0f} | {at_equal} |")  # fmt: skip
    print("± is half a 95% interval over problems; tokens are generated ones per problem")


def self_correct(task: Task, rounds: int, judge: str, reset: bool):
    """Program: [(reward of the response it would give, tokens generated so far)] after each of 0..rounds corrections.

    judge: `verifier` stops at a right answer; `self` where the policy, shown its response, finds no error. reset: sample again from before the
    thought that the policy names as its first wrong one (else from the prompt: then rounds + 1 responses are best-of-n)."""
    ((now,),) = yield [task.request("base", 1)]
    tokens, trace = now.generated, []
    for k in range(rounds + 1):
        trace.append((now.reward, tokens))
        if k == rounds or judge == "verifier" and now.reward >= task.cfg.correct:
            break
        h = 1
        if judge == "self" or reset:
            setting = UNKNOWN if judge == "self" else WRONG
            ((h, how, answer),) = yield from reviewed(task, [now], setting)
            tokens += answer.generated if answer else 0
            if how == "no_error" and judge == "self":
                break
            h = h if reset and h else 1 if not reset else fallback(task, now)
        ((now,),) = yield [task.request("suffix", 1, now, h)]
        tokens += now.generated
    return trace + [trace[-1][:1] + (tokens,)] * (rounds + 1 - len(trace))


# ---------------------------------------------------------------------------------------------------------------------- runs


def command_curves(args) -> None:
    named = by_name(args.runs)
    draw_curves(named, args.out)
    print(results_table(named, args.target), cost_table(named), sep="\n\n")
    print(
        f"\nmean ± standard deviation over seeds; drawn in {args.out} (band: 95% bootstrap interval of the mean over seeds)"
    )


# --------------------------------------------------------------------------------------------------------------- command line


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measures policies and draws runs of srpo.py.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    policy = str(Path(__file__).resolve().parent / "data" / "policy")

    def command(function, help):
        sub = commands.add_parser(
            function.__name__.removeprefix("command_").replace("_", "-"), help=help
        )
        sub.set_defaults(function=function)
        return sub

    def measures(function, help, problems, temperature):  # a command that samples from a policy
        sub = command(function, help)
        sub.add_argument("--model", default=policy, help="folder or hub id")
        sub.add_argument(
            "--problems",
            type=int,
            default=problems,
            help="records or problems of each file, at most",
        )
        sub.add_argument("--temperature", type=float, default=temperature[0], help=temperature[1])
        sub.add_argument(
            "--seed", type=int, default=0, help="of the sampling, and of generated problems"
        )
        sub.add_argument(
            "--engine", choices=["auto", "hf", "vllm"], default="auto", help="as in srpo.py"
        )
        sub.add_argument(
            "--max_rows", type=int, default=512, help="rows that a process samples at once"
        )
        sub.add_argument(
            "--max_thoughts", type=int, default=20, help="thoughts in a response, at most"
        )
        sub.add_argument(
            "--max_tokens_per_thought", type=int, default=256, help="tokens in a thought, at most"
        )
        sub.add_argument("--localize_tokens", type=int, default=4096, help="longest review, tokens")
        return sub

    sub = measures(
        command_benchmark,
        "mean@n and pass@k of a policy on data sets, or the difference of two such results",
        None,
        (0.0, "0 is greedy"),
    )
    sub.add_argument("--data", nargs="+", help=f"JSON-lines files, or {GENERATED}")
    sub.add_argument(
        "--n",
        "--samples",
        dest="samples",
        type=int,
        default=1,
        help="responses per problem (under torchrun write --samples: it takes --n for its own)",
    )
    sub.add_argument("--out", type=Path, help="folder of the results (default: under benchmarks/)")
    sub.add_argument("--compare", nargs=2, type=Path, metavar="RESULTS", help="two results.json")
    sub = measures(
        command_localization,
        "how well a policy finds the first wrong thought",
        512,
        (0.3, "of localization"),
    )
    sub.add_argument(
        "--data",
        default="chain-12",
        help="processbench.jsonl of data.prepare; or any problems, for failures of the policy itself",
    )
    sub = measures(
        command_self_correct,
        "localize, reset and sample again at test time, beside best-of-n",
        256,
        (1.0, "of the responses"),
    )
    sub.add_argument("--data", default="chain-12", help=f"JSON-lines file, or {GENERATED}")
    sub.add_argument("--rounds", type=int, default=8, help="corrections, at most")
    sub.add_argument(
        "--judge", choices=["verifier", "self"], default="verifier", help="who says when to stop"
    )
    sub = command(command_curves, "learning curves, a table of results and a table of costs")
    sub.add_argument("runs", nargs="+", type=Path, help="run directories")
    sub.add_argument(
        "--target",
        type=float,
        default=0.5,
        help="pass rate whose steps and tokens are in the table",
    )
    sub.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write")
    from data.report import command_report  # here: training does not load the report

    sub = command(
        command_report, "one HTML page: curves, step metrics, and the reset tree of every problem"
    )
    sub.add_argument("runs", nargs="+", type=Path, help="run directories")
    sub.add_argument("--out", type=Path, default=Path("report.html"), help="page to write")
    sub.add_argument(
        "--megabytes",
        type=float,
        default=20,
        help="size of the page, at most; what does not fit is left out, and named",
    )
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"eval.py: {fault}", file=sys.stderr)
        sys.exit(2)
