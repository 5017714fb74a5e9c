"""Public problem sets as JSON lines of problems: the paper's training and evaluation sets, and the usual ones.

    python -m data.prepare gsm8k math500 --out problems          # downloads through the `datasets` library (pip install datasets)
    python -m data.prepare gsm8k --from test.jsonl               # converts a local copy in the set's own record layout (.json, .jsonl, .gz)
    python -m data.prepare --list                                # names, sizes, kinds, licences, sources

Each set becomes NAME.jsonl (or NAME_train.jsonl and NAME_test.jsonl), whole or not at all: it is written beside its place and renamed. Then every
reference answer is graded against itself by its own verifier, and the share that passes is printed with the first that does not.

Sets that are sampled use `random.Random(42)`: the paper names the seed, not the generator, so its 400 + 100 problems may be others.
Left out: answers that are proofs, pictures (TheoremQA's are dropped), and judged open answers (SciKnowEval's are graded by containment).
"""

import argparse
import ast
import base64
import gzip
import io
import json
import os
import pickle
import random
import re
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from tqdm import tqdm

from data.faults import UserError
from data.problems import Problem
from data.tasks import load_problems
from data.verifiers import GRADERS, last_boxed

# ------------------------------------------------------------------------------------------- one record -> one problem, or None


def problem(question, answer, kind, **more) -> dict:
    return {"question": str(question).strip(), "answer": str(answer).strip(), "kind": kind, **more}


def gsm8k(r):
    return problem(r["question"], r["answer"].rsplit("####", 1)[1].strip().replace(",", ""), "math")


def math_answer(r):
    """Problem and answer under their usual names; the answer is the last box of the solution where it has no field of its own."""
    answer = (
        r["answer"] if r.get("answer") not in (None, "") else last_boxed(r.get("solution") or "")
    )
    return (
        problem(r.get("problem") or r["question"], answer, "math")
        if answer not in (None, "")
        else None
    )


def level5(r):
    return math_answer(r | {"answer": None}) if r["level"] == "Level 5" else None


def olympiads(r):
    """NuminaMath-CoT's olympiads whose answer can be verified, by the paper's rule."""
    answer = last_boxed(r["solution"]) if r["source"] == "olympiads" else None
    return (
        problem(r["problem"], answer, "math") if answer is not None and verifiable(answer) else None
    )


UNITS = r"cm|mm|km|kg|mph|hours?|minutes?|seconds?|degrees?|dollars?|meters?|\\circ"


def verifiable(answer: str) -> bool:
    """At most 60 characters, balanced braces, no \\text, no word of three letters (LaTeX commands aside), a digit or one of A-E, no units or %.

    >>> [verifiable(a) for a in (r"\\\\frac{3}{4}", "B", "x + y", "12 cm", "all even n", r"\\\\frac{3}{4")]
    [True, True, False, False, False, False]
    """
    bare = re.sub(r"\\[a-zA-Z]+", "", answer)
    return (
        0 < len(answer) <= 60 and answer.count("{") == answer.count("}") and "\\text" not in answer and "%" not in answer
        and not re.search(rf"(?<![a-zA-Z])({UNITS})(?![a-zA-Z])", answer) and not re.search(r"[a-zA-Z]{3,}", bare)
        and bool(re.search(r"\d", bare) or re.fullmatch(r"\(?[A-E]\)?", answer.strip()))
    )  # fmt: skip


def olympiadbench(r):
    """The text-only mathematics part; a set of several answers is one comma-separated list."""
    answer = ", ".join(part.strip(" $.") for part in re.split(r"\$\s*,\s*\$", r["final_answer"][0]))
    unit = f" Answer in {r['unit']}." if r.get("unit") else ""
    return problem(f"{r.get('context') or ''} {r['question']}{unit}", answer, "math")


def theoremqa(r):
    if r.get("Picture") not in (None, "", "NONE"):
        return None
    answer, kind = r["Answer"], r["Answer_type"]
    if isinstance(answer, str) and kind != "option":
        answer = ast.literal_eval(answer)
    if kind == "option":
        return problem(r["Question"], answer.strip("()").upper(), "choice")
    if kind == "bool":
        return problem(r["Question"], "yes" if answer else "no", "yes_no")
    return problem(
        r["Question"], ", ".join(map(str, answer)) if isinstance(answer, list) else answer, "math"
    )


def with_choices(question: str, labels: list[str], texts: list[str]) -> str:
    return (
        question.strip()
        + "\n"
        + "\n".join(f"({label}) {str(text).strip()}" for label, text in zip(labels, texts))
    )


def csqa(r):
    question = r["question"]
    if isinstance(
        question, dict
    ):  # the layout of the original files; the hub's has the same parts side by side
        r = r | {
            "question": question["stem"],
            "choices": {k: [c[k] for c in question["choices"]] for k in ("label", "text")},
        }
    return problem(
        with_choices(r["question"], r["choices"]["label"], r["choices"]["text"]),
        r["answerKey"],
        "choice",
    )


def strategyqa(r):
    return problem(
        r["question"], "yes" if r["answer"] in (True, "true", "True", "yes") else "no", "yes_no"
    )


def sciknoweval(domain):
    def convert(r):
        if r["domain"] != domain or not (r["details"]["level"] == "L3"):
            return None
        if r["choices"]["text"]:
            return problem(
                with_choices(r["question"], r["choices"]["label"], r["choices"]["text"]),
                r["answerKey"],
                "choice",
            )
        if r["type"] == "true_or_false":
            return problem(r["question"], r["answer"].lower(), "yes_no")
        return (
            problem(r["question"], r["answer"], "text") if len(r["answer"]) <= 200 else None
        )  # longer: a derivation, not an answer

    return convert


def humaneval(r):
    question = f"Complete this Python function. Give the whole function, with its imports.\n```python\n{r['prompt']}```"
    tests = {"call": r["entry_point"], "setup": r["prompt"] + "\n    pass\n", "check": r["test"]}
    return {
        "question": question,
        "kind": "code",
        "tests": tests,
        "reference": r["prompt"] + r["canonical_solution"],
    }


def livecodebench(r):
    """Public tests are shown in the problem's text; the private ones are what is graded."""
    if r["difficulty"] != "medium":
        return None
    try:
        cases = json.loads(r["private_test_cases"])
    except json.JSONDecodeError:
        cases = json.loads(
            StringsOnly(
                io.BytesIO(zlib.decompress(base64.b64decode(r["private_test_cases"])))
            ).load()
        )
    question, name = r["question_content"], json.loads(r.get("metadata") or "{}").get("func_name")
    if name:
        tests = {
            "call": name,
            "cases": [
                [[json.loads(line) for line in c["input"].splitlines()], json.loads(c["output"])]
                for c in cases
            ],
        }
        question += f"\n\nStart from:\n```python\n{r['starter_code']}\n```"
    else:
        tests = {"stdin": [[c["input"], c["output"]] for c in cases]}
        question += "\n\nRead from standard input and write to standard output."
    return {"question": question, "kind": "code", "tests": tests}


class StringsOnly(pickle.Unpickler):
    """The set keeps its tests as a pickled string: nothing else is unpickled."""

    def find_class(self, module, name):
        raise UserError(
            f"livecodebench: its private tests hold {module}.{name}, not text; do not use this copy"
        )


def processbench(r):
    """Solutions with the 0-based index of their first wrong step (-1: none), for `eval.py localization`; not to be trained on."""
    return {
        "question": r["problem"],
        "answer": "",
        "kind": "steps",
        "steps": r["steps"],
        "label": int(r["label"]),
    }


# ------------------------------------------------------------------------------------------------------------------- the sets


@dataclass
class Set:
    hub: str  # dataset on the hub
    split: str
    convert: Callable[[dict], dict | None]
    licence: str
    config: str | tuple[str, ...] | None = None
    sample: int | None = None  # so many, shuffled with seed 42
    parts: dict[str, int] | None = None  # shuffled with seed 42, and cut into named parts
    halve: bool = False  # of every problem's tests, one half for training and one for evaluation


SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
SETS = {
    "numinamath_olympiads": Set(
        "AI-MO/NuminaMath-CoT", "train", olympiads, "Apache-2.0", parts={"train": 400, "test": 100}
    ),
    "livecodebench_medium": Set(
        "livecodebench/code_generation_lite",
        "test",
        livecodebench,
        "CC",
        config="release_v6",
        halve=True,
    ),
    "math500": Set("HuggingFaceH4/MATH-500", "test", math_answer, "MIT"),
    "math_level5": Set(
        "EleutherAI/hendrycks_math", "test", level5, "MIT", config=SUBJECTS, sample=500
    ),
    "gsm8k": Set("openai/gsm8k", "test", gsm8k, "MIT", config="main"),
    "gsm8k_train": Set("openai/gsm8k", "train", gsm8k, "MIT", config="main"),
    "aime24": Set("HuggingFaceH4/aime_2024", "train", math_answer, "not stated"),
    "aime25": Set("MathArena/aime_2025", "train", math_answer, "CC BY-NC-SA 4.0"),
    "hmmt_nov_2025": Set("MathArena/hmmt_nov_2025", "train", math_answer, "CC BY-NC-SA 4.0"),
    "olympiadbench": Set(
        "Hothan/OlympiadBench", "train", olympiadbench, "Apache-2.0", config="OE_TO_maths_en_COMP"
    ),
    "acereason_math": Set("nvidia/AceReason-Math", "train", math_answer, "CC BY 4.0"),
    "theoremqa": Set("TIGER-Lab/TheoremQA", "test", theoremqa, "MIT"),
    "csqa": Set("tau/commonsense_qa", "validation", csqa, "MIT"),
    "strategyqa": Set("ChilleD/StrategyQA", "test", strategyqa, "MIT", sample=500),
    "sciknoweval_chemistry": Set(
        "hicai-zju/SciKnowEval", "test", sciknoweval("Chemistry"), "MIT", sample=500
    ),
    "sciknoweval_physics": Set(
        "hicai-zju/SciKnowEval", "test", sciknoweval("Physics"), "MIT", sample=500
    ),
    "sciknoweval_biology": Set(
        "hicai-zju/SciKnowEval", "test", sciknoweval("Biology"), "MIT", sample=500
    ),
    "sciknoweval_materials": Set(
        "hicai-zju/SciKnowEval", "test", sciknoweval("Material"), "MIT", sample=500
    ),
    "humaneval": Set("openai/openai_humaneval", "test", humaneval, "MIT"),
    "processbench": Set(
        "Qwen/ProcessBench", "gsm8k+math+olympiadbench+omnimath", processbench, "Apache-2.0"
    ),
}


def download(name: str) -> list[dict]:
    """The set's raw records. `datasets` shows progress, and goes on with an interrupted download."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "downloading needs the datasets library: pip install datasets; or convert a local copy with --from FILE"
        )
    s = SETS[name]
    configs = s.config if isinstance(s.config, tuple) else (s.config,)
    try:
        return [
            record
            for config in configs
            for record in datasets.load_dataset(s.hub, config, split=s.split)
        ]
    except (OSError, ValueError) as fault:
        raise UserError(
            f"{name}: {s.hub} could not be downloaded ({(str(fault).splitlines() or [''])[0]}); try again, or use --from FILE with a local copy"
        )


def read_local(path: Path) -> list[dict]:
    """Records of a .json list or a .jsonl file, either of them .gz too."""
    try:
        text = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8").read()
        records = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise UserError(f"{path}: cannot be read as JSON or JSON lines ({fault})")
    return records


def convert(name: str, records: list[dict]) -> dict[str, list[dict]]:
    """{"" or part: problems} of one set. Raises UserError where records do not have the set's layout."""
    s, found = SETS[name], []
    for number, record in enumerate(
        tqdm(records, desc=name, unit="record", leave=False, dynamic_ncols=True), 1
    ):
        try:
            found.append(s.convert(record))
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as fault:
            raise UserError(
                f"{name}, record {number}: not in the layout of {s.hub} ({type(fault).__name__}: {fault})"
            )
    problems = [p for p in found if p]
    if not problems:
        raise UserError(
            f"{name}: none of {len(records)} records is a problem of this set; is it the right file?"
        )
    if s.sample or s.parts:
        random.Random(42).shuffle(problems)
    if s.parts:
        ends = [sum(list(s.parts.values())[: i + 1]) for i in range(len(s.parts))]
        return {part: problems[end - n : end] for (part, n), end in zip(s.parts.items(), ends)}
    if s.halve:
        return {
            part: [p | {"tests": half(p["tests"], i)} for p in problems]
            for i, part in enumerate(("train", "test"))
        }
    return {"": problems[: s.sample]}


def half(tests: dict, which: int) -> dict:
    """Every other test of a problem, after shuffling with seed 42; a problem with a single test has it in both halves."""
    key = "stdin" if "stdin" in tests else "cases"
    cases = list(tests[key])
    random.Random(42).shuffle(cases)
    return tests | {key: cases[which::2] or cases}


def write(path: Path, problems: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(
        "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in problems), encoding="utf-8"
    )
    os.replace(part, path)


def check(problems: list[dict]) -> tuple[int, list[dict]]:
    """(how many have a reference answer, those whose own verifier rejects it): boxed as a model would write it, or the reference program."""
    checkable, rejected = [p for p in problems if p["kind"] in GRADERS or "reference" in p], []
    for p in tqdm(checkable, desc="grading references", leave=False, dynamic_ncols=True):
        response = (
            f"```python\n{p['reference']}\n```"
            if p["kind"] == "code"
            else f"so it is \\boxed{{{p['answer']}}}"
        )
        if (
            Problem(0, p["question"], p.get("answer", ""), p["kind"], tests=p.get("tests")).grade(
                response
            )
            != 1
        ):
            rejected.append(p)
    return len(checkable), rejected


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Public problem sets as JSON lines.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SETS))
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="convert this local copy of the (one) set instead of downloading",
    )
    parser.add_argument("--out", type=Path, default=Path("problems"), help="folder to write to")
    parser.add_argument("--list", action="store_true", help="print the sets and end")
    args = parser.parse_args(argv)
    if args.list:
        for name, s in SETS.items():
            print(f"{name:22} {s.hub} ({s.split}), licence {s.licence}")
        return
    unknown = [name for name in args.names if name not in SETS]
    if unknown or not args.names:
        raise UserError(
            f"{unknown[0] if unknown else 'no set'}: not a set that is known here; choose from {', '.join(SETS)}"
        )
    if args.source and len(args.names) > 1:
        raise UserError("--from converts one set; name one")
    for name in args.names:
        records = read_local(args.source) if args.source else download(name)
        for part, problems in convert(name, records).items():
            path = args.out / f"{name}{'_' + part if part else ''}.jsonl"
            write(path, problems)
            if name != "processbench":
                load_problems(str(path), seed=0)
            start = time.perf_counter()
            graded, rejected = check(problems)
            speed = f", {graded / (time.perf_counter() - start):.1f} a second" if graded else ""
            verdict = (
                f"; {graded - len(rejected)} of {graded} reference answers pass their own verifier ({1 - len(rejected) / graded:.2%}){speed}"
                if graded
                else ""
            )
            print(f"{path}: {len(problems)} problems of {len(records)} records{verdict}")
            for p in rejected[:3]:
                print(f"  rejected: {p['kind']} {p.get('answer', '')[:100]!r}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"prepare.py: {fault}", file=sys.stderr)
        sys.exit(2)
