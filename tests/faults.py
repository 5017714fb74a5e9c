"""Faults by the hundred: kills at random moments, and bad command lines, files and models.

    python -m tests.faults --out faults                          # 100 kills and 500 bad inputs
    python -m tests.faults --out faults --kills 0 --inputs 50    # some bad inputs alone

Kills: small runs of srpo.py, one process or torchrun of two, get kill -9 at random moments and are
resumed, until every one of them ends. Each must end in the bytes of a run that was left alone: its
step lines (without seconds), its rollouts and its parameters.

Inputs: flags, problem files, model folders, run directories and results are damaged at random. Each
must be refused in one line, or be good enough to be used: no traceback, no hang. The parsers are
called in this process; a case in thirty is a real start.

What is done is in OUT/kills.jsonl and OUT/inputs.jsonl. The same command goes on from there, and
case i is the same in every run. Exit code 1: something failed; see `outcome` in these files.

Left out: faults of GPUs and of networks, and hostile responses (tests/test_sandbox.py).

Try it alone:  python -m tests.faults --out /tmp/faults --kills 2 --inputs 20    # minutes
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python tests/faults.py`

import eval as evaluation  # noqa: E402
import srpo  # noqa: E402
from data import policies, runs  # noqa: E402
from data.faults import UserError  # noqa: E402
from data.tasks import load_problems  # noqa: E402

SRPO = [sys.executable, str(ROOT / "srpo.py")]
TORCHRUN = [
    str(Path(sys.executable).parent / "torchrun"),
    "--standalone",
    "--nproc_per_node=2",
    str(ROOT / "srpo.py"),
]
SMALL = (
    "--engine hf --steps 5 --prompts_per_step 3 --train_data chain-4 --eval_data chain-4 "
    "--eval_problems 4 --eval_samples 1 --eval_every 2 --save_every 1 --rollouts_every 1"
).split()
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
KILLS_OF_A_RUN = 5  # then it may end


def note(path: Path, record: dict) -> None:
    """Adds a line to a record of what is done."""
    runs.append(path, [record])


def noted(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


# -------------------------------------------------------------------------------------------- kills


def all_kills(out: Path, n: int, seed: int) -> bool:
    """n kills at random moments. True if every run ends in the right bytes."""
    path = out / "kills.jsonl"
    for processes in (1, 2):
        make_reference(out, processes)
    while len([line for line in noted(path) if "killed" in line]) < n or unfinished(path):
        number = len([line for line in noted(path) if "same" in line])
        finish_one(out, path, number, n, seed)
    return all(line.get("same", True) for line in noted(path))


def unfinished(path: Path) -> bool:
    """Whether the last run was killed and has not ended since."""
    lines = noted(path)
    return bool(lines) and "killed" in lines[-1]


def command(folder: Path, processes: int) -> list[str]:
    """What starts the run of a folder, or goes on with it."""
    start = SRPO if processes == 1 else TORCHRUN
    if (folder / "config.json").exists():
        return [*start, "--resume", str(folder)]
    return [*start, *SMALL, "--out_dir", str(folder)]


def make_reference(out: Path, processes: int) -> None:
    """The run that is left alone, and the seconds that it takes."""
    folder = out / f"reference-{processes}"
    if (folder / "seconds").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    subprocess.run(command(folder, processes), env=ENVIRONMENT, check=True, capture_output=True)
    (folder / "seconds").write_text(str(time.monotonic() - began))


def finish_one(out: Path, path: Path, number: int, n: int, seed: int) -> None:
    """Kills one run up to KILLS_OF_A_RUN times, lets it end, and compares it."""
    processes = 2 if number % 3 == 2 else 1
    folder = out / f"run-{number}"
    lines = noted(path)
    kills = len([line for line in lines if line.get("run") == number])
    total = len([line for line in lines if "killed" in line])
    if kills < KILLS_OF_A_RUN and total < n:
        rng = random.Random(f"{seed} {number} {kills}")
        seconds = out / f"reference-{processes}" / "seconds"
        moment = rng.uniform(0, float(seconds.read_text()))
        began = time.monotonic()
        started = subprocess.Popen(
            command(folder, processes),
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            started.wait(moment)
            if kills == 0:  # a whole run: the machine is less busy than it was
                seconds.write_text(str(time.monotonic() - began))
        except subprocess.TimeoutExpired:
            note(path, {"run": number, "killed": kill(started, rng), "moment": round(moment, 2)})
            print(f"run {number}: killed after {moment:.1f} s", flush=True)
            return
        finally:
            started.kill()  # it has ended, unless Ctrl-C came to this program
    done = subprocess.run(
        command(folder, processes), env=ENVIRONMENT, capture_output=True, text=True, timeout=3600
    )
    differs = differences(folder, out / f"reference-{processes}")
    if done.returncode != 0:
        differs.append(f"exit code {done.returncode}: {done.stderr[-300:]}")
    note(path, {"run": number, "processes": processes, "same": not differs, "outcome": differs})
    print(
        f"run {number}: {kills} kills, {'the same bytes' if not differs else differs}", flush=True
    )


def kill(started: subprocess.Popen, rng: random.Random) -> str:
    """kill -9 for the program, or for one of torchrun's processes; all must be gone after that."""
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    victim = rng.choice([started.pid, *map(int, children)])
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        victim = started.pid  # the child had ended
        started.kill()
    started.wait(60)
    deadline = time.monotonic() + 300  # a process that still imports torch notices a minute later
    while any(is_running(pid) for pid in children):
        if time.monotonic() > deadline:
            raise SystemExit(f"processes {children} go on without {started.pid}, which was killed")
        time.sleep(0.05)
    return "program" if victim == started.pid else "child"


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def differences(folder: Path, reference: Path) -> list[str]:
    """What a run has other than the run that was left alone."""
    found = []
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        if lines_without_times(folder / name) != lines_without_times(reference / name):
            found.append(name)
    for checkpoint in runs.checkpoints(reference):
        name = f"checkpoints/{checkpoint.name}/model.safetensors"
        weights = folder / name
        if not weights.exists() or weights.read_bytes() != (reference / name).read_bytes():
            found.append(name)
    return found


def lines_without_times(path: Path) -> list[dict]:
    lines = noted(path)
    for line in lines:
        line.pop("seconds", None)
    return lines


# -------------------------------------------------------------------------------- what is damaged

NUMBERS = [
    "-1",
    "0",
    "1e30",
    "nan",
    "inf",
    "-inf",
    "10" * 20,
    "0x10",
    "",
    " ",
    "1e-300",
    "9" * 5000,
]
TEXTS = [
    "",
    " ",
    "\udcff",
    "a\nb",
    "a/b",
    "/dev/null",
    "/proc/self/mem",
    "x" * 5000,
    "chain-",
    "-",
    "chain-" + "9" * 5000,
]
VALUES = [None, True, -1, 0, 10**30, -0.5, 1e308, "x", "", [], {}, [[1]], {"a": None}, "\ud800"]
LINES = [
    "{",
    "[]",
    "7",
    "null",
    '"x"',
    "[" * 100_000,
    "\ufeff{}",
    "9" * 5000,
    '{"step": ' + "9" * 5000 + "}",
    '{"question": "\\ud800", "answer": "1", "kind": "integer"}',
    "\x00",
]


def bad_flags(rng: random.Random, names: list[str]) -> list[str]:
    """One to three flags with values that most of them do not take."""
    flags = []
    for name in rng.sample(names, rng.randint(1, 3)):
        flags.append(f"--{name}={rng.choice(NUMBERS + TEXTS)}")
    return flags


def damage_json(rng: random.Random, path: Path) -> str:
    """Changes, drops or replaces something in a JSON file. Returns what."""
    content = json.loads(path.read_text())
    how = rng.choice(["key", "key", "key", "drop", "file", "cut", "bytes"])
    key = rng.choice(list(content)) if isinstance(content, dict) and content else "x"
    text = json.dumps(content)
    if how == "key":
        value = rng.choice(VALUES)
        text = json.dumps(content | {key: value})
    elif how == "drop":
        text = json.dumps({name: content[name] for name in content if name != key})
    elif how == "file":
        text = rng.choice(LINES)
    elif how == "cut":
        text = text[: rng.randrange(len(text))]
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    if how == "bytes":
        damage_bytes(rng, path)
    return f"{path.name}: {how} {key}"


def damage_bytes(rng: random.Random, path: Path) -> None:
    """Changes some bytes near the start, where headers are, or cuts the file."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 5)):
        content[rng.randrange(min(len(content), 4000))] = rng.randrange(256)
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    path.write_bytes(content)


def damage_lines(rng: random.Random, path: Path) -> str:
    """Replaces, drops or cuts a line of a JSON-lines file, or changes one value in it."""
    lines = path.read_text().splitlines()
    place = rng.randrange(len(lines))
    how = rng.choice(["value", "value", "line", "cut", "drop"])
    if how == "value":
        record = json.loads(lines[place])
        record[rng.choice(list(record))] = rng.choice(VALUES)
        lines[place] = json.dumps(record)
    elif how == "line":
        lines[place] = rng.choice(LINES)
    elif how == "cut":
        lines[place] = lines[place][: rng.randrange(len(lines[place]))]
    else:
        del lines[place]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return f"{path.name}, line {place + 1}: {how}"


# -------------------------------------------------------------------------------------------- cases


@dataclass
class Case:
    """One bad input: what it is, and what is called with it."""

    what: str
    use: Callable[[], object]
    flags: list[str] | None = None  # of srpo.py, for a real start


def srpo_flags(rng: random.Random, folder: Path) -> Case:
    names = sorted(set(srpo.Config.__dataclass_fields__) - {"steps", "prompts_per_step"})
    bad = bad_flags(rng, names)
    flags = [*SMALL, "--steps", "1", "--prompts_per_step", "1", *bad]
    if not any(flag.startswith("--out_dir") for flag in bad):
        flags += ["--out_dir", "run"]

    def use():
        cfg = srpo.parse(flags)
        srpo.load_data(cfg)
        runs.check_new(Path(cfg.out_dir))

    return Case(f"srpo.py {bad}", use, flags)


COMMANDS = {
    "benchmark": "--data chain-1 --problems 2 --max_rows 4",
    "localization": "--problems 2 --max_rows 4",
    "self-correct": "--problems 2 --rounds 1",
}
EVAL_FLAGS = (
    "data problems n temperature seed max_rows max_thoughts max_tokens_per_thought localize_tokens "
    "model engine out rounds judge"
).split()


def eval_flags(rng: random.Random, folder: Path) -> Case:
    name = rng.choice(list(COMMANDS))
    flags = [*COMMANDS[name].split(), *bad_flags(rng, EVAL_FLAGS)]
    if name == "benchmark" and not any(flag.startswith("--out") for flag in flags):
        flags += ["--out", str(folder / "out")]
    return Case(f"eval.py {name} {flags}", lambda: evaluation.main([name, *flags]))


def results(rng: random.Random, folder: Path) -> Case:
    """Two results of a benchmark, one of them damaged."""
    made = folder.parent / "benchmark"
    if not (made / "results.json").exists():
        flags = "benchmark --data chain-1 chain-2 --problems 2 --n 2 --temperature 1 --out"
        evaluation.main([*flags.split(), str(made)])
    shutil.copytree(made, folder / "other")
    what = damage_json(rng, folder / "other" / "results.json")
    compared = [str(made / "results.json"), str(folder / "other" / "results.json")]
    return Case(what, lambda: evaluation.main(["benchmark", "--compare", *compared]))


PROBLEMS = [
    {"question": "What is 6 * 7?", "answer": "42", "kind": "integer"},
    {"question": "Half of 1?", "answer": "\\frac{1}{2}", "kind": "math"},
    {"question": "List 1 and 2.", "answer": "1 2", "kind": "integers"},
    {"question": "A or B?", "answer": "B", "kind": "choice"},
    {"question": "Double it.", "kind": "code", "tests": {"stdin": [["2", "4"]]}},
    {"question": "Add.", "kind": "code", "tests": {"call": "add", "cases": [[[1, 2], 3]]}},
]


def problem_file(rng: random.Random, folder: Path) -> Case:
    """A file of problems is loaded, encoded, and graded once."""
    path = folder / "problems.jsonl"
    runs.append(path, PROBLEMS)
    what = damage_lines(rng, path)

    def use():
        _, tokenizer = policies.load_policy("embedded")
        problems = load_problems(str(path), seed=0)
        policies.encode_all(tokenizer, problems, 384, str(path))
        for problem in problems:
            problem.grade("```python\nprint(4)\n``` \\boxed{42}")

    return Case(what, use)


def model_folder(rng: random.Random, folder: Path) -> Case:
    model = folder / "model"
    shutil.copytree(policies.EMBEDDED, model)
    name = rng.choice(
        "config.json tokenizer.json tokenizer_config.json generation_config.json weights".split()
    )
    if name == "weights":
        damage_bytes(rng, model / "model.safetensors")
        what = "bytes of model.safetensors"
    else:
        what = damage_json(rng, model / name)

    def use():
        loaded, tokenizer = policies.load_policy(str(model))
        policies.check_head(loaded, str(model))
        policies.check_saving(loaded, tokenizer, str(model))
        context = policies.longest_sequence(loaded, str(model))
        problems = load_problems("chain-2", seed=0, n=2)
        policies.encode_all(tokenizer, problems, context, "chain-2")

    return Case(what, use)


def run_directory(rng: random.Random, folder: Path) -> Case:
    """A run whose files are damaged is resumed, up to its first step, and drawn."""
    made = folder.parent / "run"
    if not (made / "checkpoints" / "step_2").exists():
        shutil.rmtree(made, ignore_errors=True)
        srpo.main([*SMALL, "--steps", "2", "--out_dir", str(made)])
    shutil.copytree(made, folder / "run")
    newest = folder / "run" / "checkpoints" / "step_2"
    path = rng.choice(
        [
            folder / "run" / "config.json",
            folder / "run" / "metrics.jsonl",
            folder / "run" / "rollouts.jsonl",
            newest / "manifest.json",
            newest / "trainer.json",
            newest / "origin.json",
        ]
    )
    what = damage_lines(rng, path) if path.suffix == ".jsonl" else damage_json(rng, path)

    def use():
        srpo.main(["--resume", str(folder / "run"), "--steps", "2"])
        srpo.by_name([folder / "run"])

    return Case(what, use)


KINDS = (srpo_flags, eval_flags, results, problem_file, model_folder, run_directory)
LIMIT = 120  # seconds; above is a hang


def all_inputs(out: Path, n: int, seed: int) -> bool:
    """n bad inputs. True if none of them ends in a traceback or hangs."""
    path = out / "inputs.jsonl"
    done = {line["case"] for line in noted(path)}
    for case in sorted(set(range(n)) - done):
        rng = random.Random(f"{seed} {case}")
        kind = KINDS[case % len(KINDS)]
        folder = out / "inputs" / str(case)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.chdir(folder)  # what is written to a relative path goes with the folder
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            made = kind(rng, folder)
        real = made.flags and case % 10 == 0
        outcome = outcome_of_start(made.flags) if real else outcome_of(made.use)
        record = {"case": case, "kind": kind.__name__, "what": made.what[:500], "outcome": outcome}
        note(path, record)
        if bad(outcome):
            print(record, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    os.chdir(ROOT)
    outcomes = Counter(line["outcome"].partition(":")[0] for line in noted(path))
    print(f"bad inputs: {dict(outcomes)}", flush=True)
    return not any(bad(line["outcome"]) for line in noted(path))


def bad(outcome: str) -> bool:
    return outcome.startswith(("traceback", "hang"))


class Hang(BaseException):
    """The time is over."""


def outcome_of(use: Callable[[], object]) -> str:
    """How a call ends: used, refused: LINE, traceback: ERROR, hang."""

    def alarm(*_):
        raise Hang

    signal.signal(signal.SIGALRM, alarm)
    signal.alarm(LIMIT)
    said = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            use()
        return "used"
    except UserError as fault:
        return f"refused: {fault}"[:300] if "\n" not in str(fault) else f"traceback: lines {fault}"
    except SystemExit as end:
        line = (said.getvalue().strip().splitlines() or [""])[-1]
        return f"refused: {line}"[:300] if end.code == 2 else f"used: exit code {end.code}"
    except Hang:
        return "hang"
    except BaseException as fault:  # the point of this file is to see every one
        return f"traceback: {type(fault).__name__}: {fault}"[:300]
    finally:
        signal.alarm(0)


def outcome_of_start(flags: list[str]) -> str:
    """How srpo.py ends, with these flags."""
    start = [*SRPO, *flags]
    try:
        done = subprocess.run(start, env=ENVIRONMENT, capture_output=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "hang"
    said = done.stderr.decode(errors="replace").strip()
    if "Traceback" in said:
        return f"traceback: {said[-300:]}"
    return "used" if done.returncode == 0 else f"refused: {said.splitlines()[-1]}"[:300]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the records and runs")
    parser.add_argument("--kills", type=int, default=100, help="kill -9, of all runs together")
    parser.add_argument("--inputs", type=int, default=500, help="bad inputs")
    parser.add_argument("--seed", type=int, default=0, help="of moments and damages")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    # A damaged config.json may ask for a model that is larger than this machine.
    resource.setrlimit(resource.RLIMIT_AS, (2**34, resource.RLIM_INFINITY))
    good = all_inputs(args.out, args.inputs, args.seed) if args.inputs else True
    good &= all_kills(args.out, args.kills, args.seed) if args.kills else True
    sys.exit(not good)


if __name__ == "__main__":
    main(sys.argv[1:])
