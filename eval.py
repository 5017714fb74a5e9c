"""Measuring a policy, and drawing runs. Nothing here is trained on.

    python eval.py benchmark --model DIR --data gsm8k.jsonl --n 8     # mean@n, pass@k; resumes
    python eval.py benchmark --compare A/results.json B/results.json  # difference of two policies
    python eval.py localization --model DIR --data processbench.jsonl   # or on its own failures
    python eval.py self-correct --data chain-12               # resets at test time, and best-of-n
    python eval.py curves RUN_DIR [RUN_DIR...]                # learning curves, results and costs
    python eval.py report RUN_DIR [RUN_DIR...]                # one HTML page, with reset trees

Left out: judge models, and statistics beyond intervals over seeds or problems.

Try it alone:  python eval.py self-correct --problems 32      # the embedded policy, a minute
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # as in srpo.py, before torch is loaded
    os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="2000")

import numpy as np
import torch
from tqdm import tqdm

from data.curves import (
    benchmark_table,
    by_chance,
    check_settings,
    compare,
    finished_problems,
    markdown,
    mean_with_interval,
    processbench_scores,
    response_record,
    share,
    summary,
    unsolved,
    wilson,
    write_curves,
)
from data.driver import run_programs
from data.faults import UserError, counters
from data.labelled import is_labelled, load_labelled, sample_labelled
from data.lines import check_writable, read_json, write_lines, write_text
from data.parallel import connect, end_program, on_main, processes, rank, usual_dtype
from data.policies import (
    digest_of_weights,
    encode_all,
    encode_prompt,
    load_policy,
    locate_token,
    longest_sequence,
)
from data.problems import Problem, digest
from data.runs import append
from data.tasks import GENERATED, load_problems
from data.verifiers import check_machine
from localize import (
    UNKNOWN,
    WRONG,
    by_oracle,
    by_self,
    by_verifier,
    fallback,
    named_in,
    review_text,
    reviewed,
)
from rollout import Request, Rollout, Task, make_engine, make_tasks

LENGTHS = ("max_thoughts", "max_tokens_per_thought")  # settings that limit a response

# ----------------------------------------------------------------------------------- pass rate


@dataclass
class Evaluation:
    """Responses to a list of tasks, and their rewards."""

    pass_rate: float  # share of responses whose reward reaches cfg.correct
    rewards: np.ndarray  # [tasks, samples]
    groups: list[list[Rollout]]  # the responses to each task
    tokens: int  # generated, all responses together
    finish: dict[str, int]  # number of responses by the reason why they ended


def evaluate(tasks: list[Task], engine, samples: int) -> Evaluation:
    """Samples and grades `samples` responses to each task."""
    sampled = run_programs([respond(task, samples) for task in tasks], engine)
    rewards = []
    for group in sampled.results:
        rewards.append([rollout.reward for rollout in group])
    rewards = np.array(rewards)
    return Evaluation(
        pass_rate=float((rewards >= tasks[0].cfg.correct).mean()),
        rewards=rewards,
        groups=sampled.results,
        tokens=sum(r.generated for r in sampled.generated),
        finish=dict(Counter(r.finish for r in sampled.generated)),
    )


def respond(task: Task, samples: int):
    """Program: independent responses to one problem."""
    (group,) = yield [task.request("base", samples)]
    return group


@dataclass
class Policy:
    """The policy that is measured."""

    tokenizer: object
    engine: object
    context: int  # longest sequence, tokens
    dtype: str  # in which it computes: float32 or bfloat16
    digest: str | None = None  # of its weights, where it was asked for

    def tasks(self, problems, args, source: str, **settings) -> list[Task]:
        """Tasks for measuring, with the seed and the length limits of the command line.

        Raises UserError where a prompt does not fit the context; source: what the problems are of.
        """
        encode_all(self.tokenizer, problems, self.context, source)
        for key in (*LENGTHS, "localize_tokens"):
            settings[key] = getattr(args, key)
        return make_tasks(problems, self.engine, self.context, args.seed, **settings)


def open_policy(args, with_digest: bool = False) -> Policy:
    """Loads --model with --engine, on this process's GPU where there is one."""
    device, _ = connect()
    dtype = args.dtype or usual_dtype()
    model, tokenizer = load_policy(args.model, getattr(torch, dtype))
    context = longest_sequence(model, args.model)
    settings = dict(max_rows=args.max_rows, dtype=getattr(torch, dtype))
    if device.type == "cuda":
        settings["device"] = device
    engine = make_engine(args.engine, args.model, model, tokenizer, context, **settings)
    digest = digest_of_weights(model) if with_digest else None
    return Policy(tokenizer, engine, context, dtype, digest)


def held_out(data: str, args, at_most: int | None = None) -> list[Problem]:
    """The first --problems problems of a file, or of another draw of a generated task.

    Raises UserError where this machine cannot grade them. at_most: where --problems is not given.
    """
    problems = load_problems(data, seed=10**6 + args.seed)[: args.problems or at_most]
    isolation = check_machine(problems)
    if isolation and rank() == 0:
        print(isolation)
    return problems


# ---------------------------------------------------------------------------------- benchmarks

# Responses depend on these, on the weights, their type and the engine, and on the problems, by
# whose content files are named: a folder holds the responses of one choice
SETTINGS = ("model", "samples", "temperature", "seed", *LENGTHS)


def command_benchmark(args) -> None:
    """mean@n and pass@k of a policy on data sets, or the difference of two such results.

    Samples n responses to every problem, in one process or under torchrun. Writes to --out: every
    response (SET.jsonl), results.json, and the problems without a right response, as a data file
    (unsolved-SET.jsonl). The same command goes on where it stopped. Generated problems are those
    on which a run with this --seed is evaluated: to train on unsolved ones, take another --seed.
    """
    if args.compare:
        return compare(*args.compare)
    check_benchmark(args)
    sets = {}
    for data in args.data:
        problems = held_out(data, args)
        sets[f"{Path(data).stem[:50]}-{digest(problems)}"] = problems
    settings = {key: getattr(args, key) for key in SETTINGS}
    folder = f"{Path(args.model).name}-n{args.samples}-T{args.temperature}-seed{args.seed}"
    out = args.out or Path("benchmarks") / folder
    connect()  # on_main needs the connection to the other processes
    on_main(check_writable, out)
    policy = open_policy(args, with_digest=True)
    settings["weights"] = policy.digest  # the folder of a model may get others
    settings["dtype"] = policy.dtype
    settings["engine"] = policy.engine.name  # auto takes vLLM only where it works
    on_main(check_settings, out, settings)
    tasks = {}
    for name, problems in sets.items():
        tasks[name] = policy.tasks(problems, args, name, temperature=args.temperature)
    on_main(write_text, out / "settings.json", json.dumps(settings, indent=1))
    results = {}
    for name, problems in sets.items():
        path = out / f"{name}.jsonl"
        # Only the first process touches the file: the others are told what it holds
        done = on_main(finished_problems, path, args.samples)
        todo = [task for task in tasks[name] if task.problem.index not in done]
        sample_into(path, todo, policy.engine, args)
        if rank() == 0:
            done = finished_problems(path, args.samples)
            if done.keys() != {problem.index for problem in problems}:
                raise UserError(
                    f"{path}: something else wrote there, too; remove it, and start again"
                )
            results[name] = summary(done, args.samples)
            write_unsolved(out / f"unsolved-{name}.jsonl", problems, done)
    if rank() == 0:
        write_results(out / "results.json", settings, results)
        print(benchmark_table(results, args.samples))
        print("± is half a 95% interval over problems (0: unknown); tokens, seconds: per problem")
        print(f"{out}/results.json, and every response in {out}/SET.jsonl")


def write_results(path: Path, settings: dict, results: dict[str, dict]) -> None:
    """Adds the results of some sets to those of others with the same settings."""
    others = {}
    if path.exists():
        try:
            others = dict(read_json(path)["results"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: not as this command writes it; remove it and start again")
    content = {"settings": settings, "results": others | results}
    write_text(path, json.dumps(content, indent=1))


def check_benchmark(args) -> None:
    """Raises UserError for flags that cannot work."""
    if not args.data:
        raise UserError(
            f"benchmark needs --data FILE [FILE...] (JSON lines, or {GENERATED}), "
            "or --compare A.json B.json"
        )
    if args.samples > 1 and args.temperature == 0:
        raise UserError(
            "--n above 1 needs --temperature above 0: greedy responses are all the same"
        )


def sample_into(path: Path, todo: list[Task], engine, args) -> None:
    """Appends n responses to each task to `path`, a few problems at a time: a kill loses few."""
    at_once = max(processes(), args.max_rows * processes() // args.samples)
    starts = range(0, len(todo), at_once)
    bar = tqdm(starts, desc=path.stem, unit="batch", disable=rank() != 0, dynamic_ncols=True)
    for start in bar:
        part = todo[start : start + at_once]
        began = time.perf_counter()
        groups = evaluate(part, engine, args.samples).groups
        seconds = (time.perf_counter() - began) / len(part)  # of one problem
        records = []
        for task, group in zip(part, groups):
            for i, rollout in enumerate(group):
                records.append(response_record(task.problem, i, rollout, seconds / len(group)))
        if rank() == 0:
            append(path, records)


def write_unsolved(path: Path, problems: list[Problem], done: dict[int, list[dict]]) -> None:
    """Writes the problems that no response solved as a data file, and says how many there are."""
    kept = unsolved(problems, done)
    if not kept:
        print(f"{path.stem}: none of {len(problems)} problems")
        return
    write_lines(path, [problem.to_json() for problem in kept])
    print(
        f"{path}: the {len(kept)} of {len(problems)} problems without a right response, as a data "
        "file; chance selects too: measure it with another --seed before you believe a pass rate"
    )


# -------------------------------------------------------------------------------- localization


def command_localization(args) -> None:
    """Measures how well a policy finds the first wrong thought.

    On labelled solutions (ProcessBench, see data/prepare.py), or on failures of its own.
    """
    if is_labelled(args.data):
        records = load_labelled(args.data)
        chosen = sample_labelled(records, args.problems, args.seed)
        drawn = "drawn by --seed, with the file's share of erroneous ones"
        result = {"solutions": f"{len(chosen)} of {len(records)}; fewer than all are {drawn}"}
        result |= on_labelled(chosen, open_policy(args), args)
    else:
        problems = held_out(args.data, args, at_most=512)
        policy = open_policy(args)
        reference = by_verifier if all(p.check_steps for p in problems) else by_oracle
        oracle = dict(oracle_samples=8, oracle_tau=0.1)  # srpo.py's defaults
        tasks = policy.tasks(
            problems, args, args.data, localize_temperature=args.temperature, **oracle
        )
        result = on_own_failures(tasks, policy.engine, reference)
    if rank() > 0:
        return
    print(f"{args.model} on {args.data}; counters {dict(counters)}")
    for name, value in result.items():
        print(f"{name}: {value}")


def on_labelled(records: list[dict], policy: Policy, args) -> dict[str, str]:
    """Scores on labelled solutions, in two settings: ProcessBench's (UNKNOWN) and SRPO's (WRONG).

    In SRPO's the policy sees only wrong solutions, and is told that they are wrong.
    """
    wrong = [record for record in records if record["label"] >= 0]
    named = name_steps(records, UNKNOWN, policy, args)
    told = name_steps(wrong, WRONG, policy, args)
    scores = processbench_scores([record["label"] for record in records], named)
    exact = sum(h == record["label"] + 1 for h, record in zip(told, wrong))
    unnamed = sum(h in (None, 0) for h in told)
    return scores | {
        "told that it is wrong, exact": share(exact, len(wrong)),
        "a step chosen at random": by_chance([len(record["steps"]) for record in wrong]),
        "no step named": f"{named.count(None)} of {len(named)}; "
        f"told that it is wrong, {unnamed} of {len(told)}",
    }


def name_steps(records: list[dict], setting: dict, policy: Policy, args) -> list[int | None]:
    """The 1-based step that the policy names in each solution; 0 for "no error", None for neither.

    Counted by name: prompts that do not fit the context, and answers that name no step.
    """
    requests = {}  # by number of the record
    for k, record in enumerate(records):
        text = review_text(record["question"], record["steps"], setting)
        prompt_ids = encode_prompt(policy.tokenizer, text)
        if len(prompt_ids) < policy.context:
            requests[k] = Request(
                problem=k,
                purpose="localization",
                prompt_ids=prompt_ids,
                n=1,
                rng_key=args.seed * 10**6 + k,
                max_tokens=min(args.localize_tokens, policy.context - len(prompt_ids)),
                temperature=args.temperature,
                top_p=1.0,
            )
    groups = policy.engine.sample(list(requests.values()))
    answers = {k: answer for k, (answer,) in zip(requests, groups)}
    named = []
    for k, record in enumerate(records):
        h, how = None, "too_long"
        if k in answers:
            h, how = named_in(answers[k], len(record["steps"]))
        if how == "no_error":
            h = 0
        elif h is None:
            counters[f"localize_{how}"] += 1
        named.append(h)
    return named


@dataclass
class LocatedFailure:
    """A failure with its first wrong thought, according to the policy and to the reference."""

    named: int | None  # h* of the policy, 1-based; None where it names none
    truth: int  # h* of the reference
    H: int  # thoughts in the failure
    right: list[bool]  # for each of four suffixes from the policy's reset state

    @property
    def late_by(self) -> int:
        """h* - truth. At most 0: the prefix is clean; above: the error is still in it."""
        return self.named - self.truth


def on_own_failures(tasks: list[Task], engine, reference) -> dict:
    """Localizes one failure per problem by the policy and by `reference`, another localizer.

    Says how often the two agree, and how often suffixes from the policy's reset state are right.
    """
    programs = [locate_failure(task, reference) for task in tasks]
    failures = [found for found in run_programs(programs, engine).results if found is not None]
    if not failures:
        raise UserError(f"no failure among {len(tasks)} problems: give harder ones, or more")
    located = [failure for failure in failures if failure.named is not None]
    clean = [failure for failure in located if failure.late_by <= 0]
    erroneous = [failure for failure in located if failure.late_by > 0]
    reference_name = reference.__name__.removeprefix("by_")
    result = {
        "failures": f"{len(failures)} of {len(tasks)} problems; reference: {reference_name}",
        "exact": share(sum(failure.late_by == 0 for failure in located), len(failures)),
        "a step chosen at random": by_chance([failure.H for failure in failures]),
        "deviations": dict(sorted(Counter(failure.late_by for failure in located).items())),
        "corrected, from a clean prefix": corrected(clean),
        "corrected, from an erroneous prefix": corrected(erroneous),
        "pass@4, from a prefix that is clean": corrected_once(clean),
        "pass@4, from a prefix that is erroneous": corrected_once(erroneous),
    }
    bands = {
        "2 or more early": (-np.inf, -2),
        "1 early": (-1, -1),
        "exact": (0, 0),
        "1 late": (1, 1),
        "2 or more late": (2, np.inf),
    }
    for band, (low, high) in bands.items():
        part = [failure for failure in located if low <= failure.late_by <= high]
        result[f"corrected, {band}"] = corrected(part)
    return result


def locate_failure(task: Task, reference):
    """Program: a LocatedFailure from the first failure of two draws; None where both are right."""
    (group,) = yield [task.request("base", 2)]
    failures = [rollout for rollout in group if task.failed(rollout)]
    if not failures:
        return None
    seed = failures[0]
    (named,) = yield from by_self(task, [seed])
    (found,) = yield from reference(task, [seed])
    h, truth = named[0], found[0]
    suffixes = []
    if h is not None:
        (suffixes,) = yield [task.request("suffix", 4, seed, h)]
    right = [not task.failed(rollout) for rollout in suffixes]
    return LocatedFailure(h, truth, len(seed.thought_ends), right)


def corrected(failures: list[LocatedFailure]) -> str:
    """Share of suffixes that are right.

    Its interval counts the suffixes of a failure as one observation, as they may be alike: it is
    too wide rather than too narrow.
    """
    if not failures:
        return "none"
    right = list(chain(*[failure.right for failure in failures]))
    rate = sum(right) / len(right)
    low, high = wilson(rate * len(failures), len(failures))
    return f"{rate:.3f} ({low:.3f} to {high:.3f}, {sum(right)} of {len(right)})"


def corrected_once(failures: list[LocatedFailure]) -> str:
    """Share of failures with a right suffix."""
    return share(sum(any(failure.right) for failure in failures), len(failures))


# ----------------------------------------------------------------------------- self-correction


@dataclass
class Round:
    """Where self-correction stands after some corrections."""

    reward: float  # of the response that it would give now
    tokens: int  # generated so far, reviews included


def command_self_correct(args) -> None:
    """Resets at test time: localize, reset, sample again, until the judge is satisfied.

    For comparison it also restarts from the prompt; with the verifier as judge this is best-of-n,
    n = rounds + 1. It prints both by round, and the restarts at the tokens of the resets.
    """
    if args.temperature == 0:
        raise UserError("self-correct needs --temperature above 0: greedy restarts repeat")
    problems = held_out(args.data, args)
    policy = open_policy(args)
    if args.judge == "self" and locate_token(policy.tokenizer) is not None:
        raise UserError(
            "--judge self needs a policy that can find no error; the embedded one always names a "
            "thought: give --model, or use --judge verifier"
        )
    resets = correction_curve(problems, policy, args, reset=True)
    restarts = correction_curve(problems, policy, args, reset=False)
    rows = []
    for k in range(args.rounds + 1):
        equal = "beyond"  # the tokens of resets buy more restarts than were sampled
        if resets.tokens[k] <= restarts.tokens[-1]:
            equal = f"{np.interp(resets.tokens[k], restarts.tokens, restarts.right.mean(0)):.3f}"
        row = {
            "rounds": k,
            "resets: accuracy": mean_with_interval(resets.right[:, k]),
            "resets: tokens": f"{resets.tokens[k]:.0f}",
            "restarts: accuracy": mean_with_interval(restarts.right[:, k]),
            "restarts: tokens": f"{restarts.tokens[k]:.0f}",
            "restarts at the tokens of resets": equal,
        }
        rows.append(row)
    print(
        f"{args.model} on {args.data}: {len(problems)} problems, T = {args.temperature}, "
        f"judge: {args.judge}; counters {dict(counters)}"
    )
    print(markdown(rows))
    print("± is half a 95% interval over problems; tokens are generated ones per problem")


@dataclass
class CorrectionCurve:
    """Self-correction on many problems, by round."""

    right: np.ndarray  # [problems, rounds + 1] bool
    tokens: np.ndarray  # [rounds + 1] generated so far, mean over problems


def correction_curve(problems, policy: Policy, args, reset: bool) -> CorrectionCurve:
    """Runs self_correct on every problem."""
    settings = dict(temperature=args.temperature, localize_fallback="random")
    tasks = policy.tasks(problems, args, args.data, **settings)
    programs = [self_correct(task, args.rounds, args.judge, reset) for task in tasks]
    traces = run_programs(programs, policy.engine).results
    right, tokens = [], []
    for task, trace in zip(tasks, traces):
        right.append([now.reward >= task.cfg.correct for now in trace])
        tokens.append([now.tokens for now in trace])
    return CorrectionCurve(np.array(right), np.mean(tokens, axis=0))


def self_correct(task: Task, rounds: int, judge: str, reset: bool):
    """Program: [Round] after each of 0..rounds corrections.

    judge: `verifier` stops at a right answer; `self` where the policy, shown its response, finds
    no error. reset: samples again from before the thought that the policy names as its first wrong
    one; otherwise from the prompt, so that rounds + 1 responses are best-of-n.
    """
    (group,) = yield [task.request("base", 1)]
    response = group[0]
    tokens = response.generated
    trace = [Round(response.reward, tokens)]
    while len(trace) <= rounds:
        if judge == "verifier" and not task.failed(response):
            break
        h = 1
        if judge == "self" or reset:
            setting = UNKNOWN if judge == "self" else WRONG
            (review,) = yield from reviewed(task, [response], setting)
            if review.answer is not None:
                tokens += review.answer.generated
            if judge == "self" and review.how == "no_error":
                break
            if reset:
                h = fallback(task, response) if review.h is None else review.h
        (group,) = yield [task.request("suffix", 1, response, h)]
        response = group[0]
        tokens += response.generated
        trace.append(Round(response.reward, tokens))
    while len(trace) <= rounds:  # it stopped: later rounds change nothing
        trace.append(Round(response.reward, tokens))
    return trace


# --------------------------------------------------------------------- runs and the command line


def command_curves(args) -> None:
    """Draws the learning curves of runs, and prints what they reached and cost."""
    write_curves(args.runs, args.out or args.runs[0] / "curves.png", args.target)


def command_report(args) -> None:
    """One HTML page of runs: curves, step metrics, and the reset tree of every problem."""
    from data.report import write_report  # here: training does not load the report

    write_report(args.runs, args.out or args.runs[0] / "report.html", args.megabytes)


class Parser(argparse.ArgumentParser):
    """Reports a command line that is wrong in one line, like any other fault."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; {self.prog} --help lists what there is")


def number(kind: type, low: float, high: float = 10**9):
    """A type of flags: a number of this kind from low to high."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")  # is in no range
        if not low <= value <= high:
            wanted = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {wanted} from {low} to {high}")
        return value

    return read


POSITIVE = number(int, 1)
NOT_NEGATIVE = number(int, 0)
SHARE = number(float, 0, 1)


def temperature_of(text: str) -> float:
    """A type of flags. Logits overflow below 0.01, and vLLM rounds up to it."""
    value = number(float, 0, 100)(text)
    if 0 < value < 0.01:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is too small; use 0, or at least 0.01")
    return value


def main(argv: list[str]) -> None:
    parser = Parser(description="Measures policies and draws runs of srpo.py.")
    add_commands(parser.add_subparsers(required=True, metavar="COMMAND"))
    args = parser.parse_args(argv)
    args.function(args)
    end_program()


def add_command(commands, function):
    """command_NAME as the command NAME; its help is the first line of its docstring."""
    name = function.__name__.removeprefix("command_").replace("_", "-")
    command = commands.add_parser(name, help=function.__doc__.splitlines()[0])
    command.set_defaults(function=function)
    return command


def add_commands(commands) -> None:
    command = add_command(commands, command_benchmark)
    add_sampling(command, problems=None, temperature=0.0)
    add = command.add_argument
    add("--data", nargs="+", help=f"JSON-lines files, or {GENERATED}")
    help = "responses per problem (under torchrun write --samples: it takes --n for its own)"
    add("--n", "--samples", dest="samples", type=number(int, 1, 10**4), default=1, help=help)
    add("--out", type=Path, help="folder of the results (default: under benchmarks/)")
    add("--compare", nargs=2, type=Path, metavar="RESULTS", help="two results.json")

    command = add_command(commands, command_localization)
    add_sampling(command, problems=None, temperature=0.3)
    command.add_argument("--data", default="chain-12", help="processbench.jsonl, or any problems")

    command = add_command(commands, command_self_correct)
    add_sampling(command, problems=256, temperature=1.0)
    add = command.add_argument
    add("--data", default="chain-12", help=f"JSON-lines file, or {GENERATED}")
    add("--rounds", type=number(int, 0, 200), default=8, help="corrections, at most")
    add("--judge", choices=["verifier", "self"], default="verifier", help="says when to stop")

    add = add_command(commands, command_curves).add_argument
    add("runs", nargs="+", type=Path, help="run directories")
    add("--target", type=SHARE, default=0.5, help="pass rate of the time-to-target columns")
    add("--out", type=Path, help="picture to write (default: curves.png in the first run)")

    add = add_command(commands, command_report).add_argument
    add("runs", nargs="+", type=Path, help="run directories")
    add("--out", type=Path, help="page to write (default: report.html in the first run)")
    help = "size of the page, at most; names what is cut"
    add("--megabytes", type=number(float, 0.01, 10**4), default=20, help=help)


def add_sampling(command, problems: int | None, temperature: float) -> None:
    """The options of commands that sample from a policy, with their own two defaults."""
    add = command.add_argument
    add("--model", default="embedded", help="folder or hub id; embedded: data/policy")
    help = (
        "problems of each file, at most (unset: all; self-correct 256; localization 512 unlabelled)"
    )
    add("--problems", type=POSITIVE, default=problems, help=help)
    help = "of the responses, or of the reviews in localization; 0 is greedy"
    add("--temperature", type=temperature_of, default=temperature, help=help)
    add("--seed", type=NOT_NEGATIVE, default=0, help="of the sampling, and of generated problems")
    add("--engine", choices=["auto", "hf", "vllm"], default="auto", help="as in srpo.py")
    help = "that the policy computes in (default: bfloat16 on GPUs, else float32)"
    add("--dtype", choices=["float32", "bfloat16"], help=help)
    add("--max_rows", type=POSITIVE, default=512, help="rows that a process samples at once")
    add("--max_thoughts", type=POSITIVE, default=20, help="thoughts in a response, at most")
    add("--max_tokens_per_thought", type=POSITIVE, default=256, help="tokens in a thought, at most")
    add("--localize_tokens", type=POSITIVE, default=4096, help="longest review, tokens")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"eval.py: {fault}", file=sys.stderr)
        sys.exit(2)
