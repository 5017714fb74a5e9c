"""Public problem sets as JSON lines: the paper's training and evaluation sets, and the usual ones.

    python -m data.prepare gsm8k math500 --out problems   # downloads (pip install datasets)
    python -m data.prepare gsm8k --from test.jsonl        # converts a local copy in the set's own
                                                          # record layout: .json, .jsonl, also .gz
    python -m data.prepare --list                         # names, sources, licences

Each set becomes NAME.jsonl, or NAME_train.jsonl and NAME_test.jsonl. A file appears whole or not at
all: it is written under another name and renamed. Then every reference answer is graded by its own
verifier, as a model would write it; the share that passes is printed, with the first that do not.

Sets, with sizes, kinds, and licences as the source states them:

    numinamath_olympiads     400 train, 100 test             math                   Apache-2.0
    livecodebench_medium     383, tests halved               code                   CC
    math500                  500                             math                   MIT
    math_level5              500 of 1324                     math                   MIT
    gsm8k, gsm8k_train       1319, 7473                      math                   MIT
    aime24                   30                              math                   not stated
    aime25, hmmt_nov_2025    30 each                         math                   CC BY-NC-SA 4.0
    olympiadbench            675                             math                   Apache-2.0
    acereason_math           as published                    math                   CC BY 4.0
    theoremqa                747 without pictures            math, yes_no, choice   MIT
    csqa                     1221                            choice                 MIT
    strategyqa               500                             yes_no                 MIT
    sciknoweval_chemistry, _physics, _biology, _materials
                             500 each, at most               choice, yes_no, text   MIT
    humaneval                164                             code                   MIT
    processbench             3400                            labelled solutions     Apache-2.0

Checked on local copies of the public files; no download has been tried. tests/README.md, "Graders
on public sets", has the counts.

Departures: sets that are sampled use `random.Random(42)`. The paper names the seed but not the
generator, so its 400 + 100 problems may be others.

Left out: answers that are proofs, questions with pictures (TheoremQA's are dropped), and open
answers that need a judge (SciKnowEval's are graded by containment).

Try it alone:  python -m data.prepare --list
"""

import argparse
import ast
import base64
import gzip
import io
import json
import pickle
import random
import re
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.faults import UserError
from data.lines import check_writable, parse, parse_lines, write_lines
from data.problems import Problem, check_record
from data.verifiers import KINDS, check_machine, last_boxed

# ------------------------------- converters: one record of a set -> one problem, or None to drop it


def problem(question, answer, kind: str) -> dict:
    """Returns one line of a data file."""
    return {"question": str(question).strip(), "answer": str(answer).strip(), "kind": kind}


def gsm8k(record: dict) -> dict:
    """The answer follows #### at the end of the solution."""
    answer = record["answer"].rsplit("####", 1)[1].strip().replace(",", "")
    return problem(record["question"], answer, "math")


def math_answer(record: dict) -> dict | None:
    """Problem and answer under their usual names, else the answer in the solution's last box."""
    answer = record.get("answer")
    if answer in (None, ""):
        answer = last_boxed(record.get("solution") or "")
    if answer in (None, ""):
        return None
    question = record.get("problem") or record["question"]
    return problem(question, answer, "math")


def math_level5(record: dict) -> dict | None:
    if record["level"] != "Level 5":
        return None
    return math_answer(record | {"answer": None})


def olympiads(record: dict) -> dict | None:
    """NuminaMath-CoT's olympiads with an answer that can be verified, by the paper's rule."""
    if record["source"] != "olympiads":
        return None
    answer = last_boxed(record["solution"])
    if answer is None or not verifiable(answer):
        return None
    return problem(record["problem"], answer, "math")


def verifiable(answer: str) -> bool:
    r"""Returns whether an answer can be verified, by the paper's rule.

    It has at most 60 characters and balanced braces; a digit, or it is one of A to E; no \text, no
    unit or %, and no word of three letters (LaTeX commands aside).

    >>> [verifiable(answer) for answer in (r"\frac{3}{4}", "B", "x + y", "12 cm", "all even n")]
    [True, True, False, False, False]
    """
    if not 0 < len(answer) <= 60 or answer.count("{") != answer.count("}"):
        return False
    units = r"cm|mm|km|kg|mph|hours?|minutes?|seconds?|degrees?|dollars?|meters?|\\circ"
    if re.search(rf"(?<![a-zA-Z])({units})(?![a-zA-Z])", answer) or "%" in answer:
        return False
    without_commands = re.sub(r"\\[a-zA-Z]+", "", answer)
    if "\\text" in answer or re.search(r"[a-zA-Z]{3,}", without_commands):
        return False
    is_letter = re.fullmatch(r"\(?[A-E]\)?", answer.strip())
    return bool(is_letter or re.search(r"\d", without_commands))


def olympiadbench(record: dict) -> dict:
    """The text-only mathematics part; several answers are one comma-separated list."""
    parts = re.split(r"\$\s*,\s*\$", record["final_answer"][0])
    answer = ", ".join(part.strip(" $.") for part in parts)
    question = f"{record.get('context') or ''} {record['question']}"
    if record.get("unit"):
        question += f" Answer in {record['unit']}."
    return problem(question, answer, "math")


def theoremqa(record: dict) -> dict | None:
    if record.get("Picture") not in (None, "", "NONE"):
        return None
    question = record["Question"]
    answer = record["Answer"]
    if record["Answer_type"] == "option":
        return problem(question, answer.strip("()").upper(), "choice")
    if isinstance(answer, str):
        answer = ast.literal_eval(answer)
    if record["Answer_type"] == "bool":
        return problem(question, "yes" if answer else "no", "yes_no")
    if isinstance(answer, list):
        parts = ", ".join(str(part) for part in answer)
        answer = f"({parts})"  # in brackets, as its order counts
    return problem(question, answer, "math")


def with_choices(question: str, labels: list[str], texts: list[str]) -> str:
    """Writes the choices under the question, one `(A) text` a line."""
    lines = [question.strip()]
    for label, text in zip(labels, texts):
        lines.append(f"({label}) {str(text).strip()}")
    return "\n".join(lines)


def csqa(record: dict) -> dict:
    """Reads the hub's layout, and that of the original files, which nest the choices otherwise."""
    question = record["question"]
    if isinstance(question, dict):
        labels = [choice["label"] for choice in question["choices"]]
        texts = [choice["text"] for choice in question["choices"]]
        question = question["stem"]
    else:
        labels = record["choices"]["label"]
        texts = record["choices"]["text"]
    return problem(with_choices(question, labels, texts), record["answerKey"], "choice")


def strategyqa(record: dict) -> dict:
    is_true = record["answer"] in (True, "true", "True", "yes")
    return problem(record["question"], "yes" if is_true else "no", "yes_no")


def sciknoweval(domain: str) -> Callable[[dict], dict | None]:
    """Returns the converter for one domain of SciKnowEval's level L3."""

    def convert_record(record: dict) -> dict | None:
        if record["domain"] != domain or record["details"]["level"] != "L3":
            return None
        question = record["question"]
        choices = record["choices"]
        if choices["text"]:
            question = with_choices(question, choices["label"], choices["text"])
            return problem(question, record["answerKey"], "choice")
        if record["type"] == "true_or_false":
            return problem(question, record["answer"].lower(), "yes_no")
        if len(record["answer"]) > 200:
            return None  # a derivation, not an answer
        return problem(question, record["answer"], "text")

    return convert_record


def humaneval(record: dict) -> dict:
    """`reference` is the reference program, for the check of the verifier."""
    prompt = record["prompt"]
    tests = {
        "call": record["entry_point"],
        "setup": prompt + "\n    pass\n",
        "check": record["test"],
    }
    return {
        "question": "Complete this Python function. Give the whole function, with its imports.\n"
        f"```python\n{prompt}```",
        "kind": "code",
        "tests": tests,
        "reference": prompt + record["canonical_solution"],
    }


def livecodebench(record: dict) -> dict | None:
    """The problem's text shows the public tests; the private ones are graded."""
    if record["difficulty"] != "medium":
        return None
    cases = private_cases(record["private_test_cases"])
    question = record["question_content"]
    name = json.loads(record.get("metadata") or "{}").get("func_name")
    if name:
        question += f"\n\nStart from:\n```python\n{record['starter_code']}\n```"
        calls = []
        for case in cases:
            lines = case["input"].split("\n")
            args = [json.loads(line) for line in lines if line.strip()]
            calls.append([args, json.loads(case["output"])])
        tests = {"call": name, "cases": calls}
    else:
        question += "\n\nRead from standard input and write to standard output."
        tests = {"stdin": [[case["input"], case["output"]] for case in cases]}
    return {"question": question, "kind": "code", "tests": tests}


def private_cases(text: str) -> list[dict]:
    """Reads LiveCodeBench's private tests: JSON, or JSON pickled, compressed and in base 64."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pickled = zlib.decompress(base64.b64decode(text))
        return json.loads(StringsOnly(io.BytesIO(pickled)).load())


class StringsOnly(pickle.Unpickler):
    """Unpickles text and nothing else: a pickle can name any function to be called."""

    def find_class(self, module, name):
        raise UserError(
            f"livecodebench: its private tests hold {module}.{name}, not text; do not use this copy"
        )


def processbench(record: dict) -> dict:
    """A solution with the 0-based index of its first wrong step, -1 for none.

    For `eval.py localization` only: kind "steps" has no verifier, so nothing trains on it.
    """
    return {
        "question": record["problem"],
        "answer": "",
        "kind": "steps",
        "steps": record["steps"],
        "label": int(record["label"]),
    }


# --------------------------------------------------------------------------------------- the sets


@dataclass
class Set:
    """One public set: where it comes from, and how its records become problems."""

    hub: str
    """name on the Hugging Face hub"""

    split: str

    convert: Callable[[dict], dict | None]
    """record -> problem, or None to drop it"""

    licence: str
    """as the source states it"""

    config: str | tuple[str, ...] | None = None
    """configuration on the hub; of several, all"""

    sample: int | None = None
    """number of problems to keep, after shuffling with seed 42"""

    parts: dict[str, int] | None = None
    """name -> size of the parts that the set is cut into, after shuffling with seed 42"""

    halve: bool = False
    """True: half of every problem's tests is for training, the other half for evaluation"""


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
        "EleutherAI/hendrycks_math", "test", math_level5, "MIT", config=SUBJECTS, sample=500
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


# ------------------------------------------------------------------------------ reading a set


def download(name: str) -> list[dict]:
    """Downloads a set's records. `datasets` shows progress and resumes interrupted downloads."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "downloading needs the datasets library: pip install datasets; "
            "or convert a local copy with --from FILE"
        )
    chosen = SETS[name]
    configs = chosen.config if isinstance(chosen.config, tuple) else (chosen.config,)
    records = []
    try:
        for config in configs:
            records += datasets.load_dataset(chosen.hub, config, split=chosen.split)
    except (OSError, ValueError, RuntimeError) as fault:  # RuntimeError: a set with a script
        lines = str(fault).splitlines() or [""]
        raise UserError(
            f"{name}: {chosen.hub} could not be downloaded ({lines[0]}); "
            "try again, or use --from FILE with a local copy; "
            "a set with a script needs datasets<4"
        )
    return records


def read_local(path: Path) -> list[dict]:
    """Reads the records of a .json list or a .jsonl file, also .gz."""
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as fault:
        raise UserError(f"{path}: cannot be read as JSON or JSON lines ({fault})")
    if text.lstrip().startswith("["):
        return parse(text, path)
    return [record for _, record in parse_lines(text, path)]


# ------------------------------------------------------------------ from records to files


def convert(name: str, records: list[dict]) -> dict[str, list[dict]]:
    """Returns {part: problems} of a set; a set without parts has one, named "".

    Raises UserError where records do not have the set's layout.
    """
    chosen = SETS[name]
    problems = convert_records(name, records)
    if not problems:
        raise UserError(
            f"{name}: none of {len(records)} records is a problem of this set; "
            "is it the right file?"
        )
    if chosen.sample or chosen.parts:
        random.Random(42).shuffle(problems)
    if chosen.parts:
        return cut(problems, chosen.parts)
    if chosen.halve:
        return {"train": with_half(problems, 0), "test": with_half(problems, 1)}
    return {"": problems[: chosen.sample]}


FOREIGN = (  # what a converter raises for a record of another layout
    AttributeError,
    EOFError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zlib.error,
)


def convert_records(name: str, records: list[dict]) -> list[dict]:
    """Converts all records of a set; those that are no problem of it are dropped."""
    chosen = SETS[name]
    problems = []
    progress = tqdm(records, desc=name, unit="record", leave=False, dynamic_ncols=True)
    for number, record in enumerate(progress, 1):
        try:
            converted = chosen.convert(record)
        except FOREIGN as fault:
            raise UserError(
                f"{name}, record {number}: "
                f"not in the layout of {chosen.hub} ({type(fault).__name__}: {fault})"
            )
        if not converted:
            continue
        is_labelled = converted["kind"] == "steps"  # a labelled solution is no problem
        complaint = None if is_labelled else check_record(converted)
        if complaint:
            raise UserError(f"{name}, record {number}: {complaint}")
        problems.append(converted)
    return problems


def cut(problems: list[dict], sizes: dict[str, int]) -> dict[str, list[dict]]:
    """Cuts a list into named parts of given sizes, from its start; the rest is dropped."""
    parts = {}
    start = 0
    for part, size in sizes.items():
        parts[part] = problems[start : start + size]
        start += size
    return parts


def with_half(problems: list[dict], which: int) -> list[dict]:
    return [p | {"tests": half(p["tests"], which)} for p in problems]


def half(tests: dict, which: int) -> dict:
    """Keeps every other test of a problem, after shuffling with seed 42.

    A problem with a single test has it in both halves.
    """
    key = "stdin" if "stdin" in tests else "cases"
    cases = list(tests[key])
    random.Random(42).shuffle(cases)
    return tests | {key: cases[which::2] or cases}


# -------------------------------------------------------------------- checking the verifiers


def reference_response(p: dict) -> str | None:
    """Writes a problem's reference as a model would; None where it has none to grade."""
    if "reference" in p:
        return f"```python\n{p['reference']}\n```"
    if p["kind"] in KINDS and "answer" in p:
        return f"so it is \\boxed{{{p['answer']}}}"
    return None


def check(problems: list[dict]) -> tuple[int, list[dict]]:
    """Grades every reference by its own verifier: (number graded, problems that fail)."""
    checkable = [p for p in problems if reference_response(p) is not None]
    rejected = []
    for p in tqdm(checkable, desc="grading references", leave=False, dynamic_ncols=True):
        answer = p.get("answer", "")
        graded = Problem(0, p["question"], answer, p["kind"], tests=p.get("tests"))
        if graded.grade(reference_response(p)) != 1:
            rejected.append(p)
    return len(checkable), rejected


def report(path: Path, problems: list[dict], n_records: int) -> None:
    """Grades the references of a file and prints its line, with the first that are rejected."""
    start = time.perf_counter()
    graded, rejected = check(problems)
    line = f"{path}: {len(problems)} problems of {n_records} records"
    if graded:
        passed = graded - len(rejected)
        speed = graded / (time.perf_counter() - start)
        line += (
            f"; {passed} of {graded} reference answers pass their own verifier "
            f"({1 - len(rejected) / graded:.2%}), {speed:.1f} a second"
        )
    print(line)
    for p in rejected[:3]:
        print(f"  rejected: {p['kind']} {p.get('answer', '')[:100]!r}")


# -------------------------------------------------------------------------------- the command


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
        for name, chosen in SETS.items():
            print(f"{name:22} {chosen.hub} ({chosen.split}), licence {chosen.licence}")
        return
    unknown = [name for name in args.names if name not in SETS]
    if unknown or not args.names:
        wrong = unknown[0] if unknown else "no set"
        raise UserError(f"{wrong}: not a set that is known here; choose from {', '.join(SETS)}")
    if args.source and len(args.names) > 1:
        raise UserError("--from converts one set; name one")
    check_writable(args.out)
    for name in args.names:
        prepare(name, args.source, args.out)


def prepare(name: str, source: Path | None, out: Path) -> None:
    """Writes the files of one set, from a local copy if there is one, and checks them."""
    records = read_local(source) if source else download(name)
    parts = convert(name, records)
    for problems in parts.values():
        check_machine([Problem(0, p["question"], "", p["kind"]) for p in problems if "kind" in p])
    for part, problems in parts.items():
        suffix = f"_{part}" if part else ""
        path = out / f"{name}{suffix}.jsonl"
        write_lines(path, problems)
        report(path, problems, len(records))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"prepare.py: {fault}", file=sys.stderr)
        sys.exit(2)
