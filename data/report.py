"""The page of `python eval.py report RUN_DIR [RUN_DIR...]`: curves, step metrics, resets and walks.

This file reads the runs and chooses what fits into the page; data/report.html draws it. The page
needs no network and is safe to open: what a model wrote is data in it, never markup, and its
content policy lets nothing run but the template's own script.

Left out: continuations that only measure a prefix, such as the oracle's (only their number is
shown), and comparing the trees of two runs side by side.

Try it alone:
    python srpo.py --steps 3 --rollouts_every 1 --out_dir runs/three
    python eval.py report runs/three
"""

import base64
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from data.curves import HUGE, check_run, evaluations, has_types, names_of, without_twins
from data.faults import UserError
from data.lines import parse
from data.runs import Run, read_run
from loss import token_weights
from rollout import Rollout

POINTS = 400  # step lines of a run that its charts show, at most
PROBLEMS_KEPT = 8  # whole steps are dropped before a step shows fewer problems than this
NOTE_BYTES = 2000  # room for the notes on what was left out
STEP_BYTES = 60  # JSON of a step around its trees
# Parts of a step line that count something: a name that is absent there is a zero
COUNTED = ("tokens", "seconds", "counters", "localized", "finish")


def write_report(folders: list[Path], out: Path, megabytes: float) -> None:
    """Writes the page of the runs in `folders` to `out`, in at most `megabytes`.

    What does not fit is left out, and named in the page and on the terminal. Raises UserError for
    a folder that is no run, a damaged rollouts.jsonl, and an `out` that cannot be written."""
    runs = [readable_run(folder) for folder in without_twins(folders)]
    pages = [run_for_page(run, name) for run, name in zip(runs, names_of(runs))]
    data = {"notes": [], "runs": pages}
    room = megabytes * 1e6 - len(page(data)) - NOTE_BYTES
    if room < 0:
        raise UserError(
            f"--megabytes {megabytes:g} is too little: without any tree the page has "
            f"{megabytes - room / 1e6:.3f}; allow more"
        )
    n_trees = 0
    for i, (run, shown) in enumerate(zip(runs, data["runs"])):
        trees = reset_trees(run, room / (len(runs) - i))
        shown["steps"] = trees.steps
        room -= len(embedded(trees.steps))
        n_trees += sum(len(step["trees"]) for step in trees.steps)
        if trees.left_out:
            shown["steps_missing"] = f"{shown['folder']}: {trees.left_out}"
            data["notes"].append(shown["steps_missing"])
    text = page(data)
    try:
        out.write_text(text, encoding="ascii")
    except OSError as fault:
        raise UserError(f"cannot write {out} ({fault.strerror}); choose another --out")
    for note in data["notes"]:
        print(note)
    plural = "s" if len(runs) > 1 else ""
    print(f"{out}: {len(runs)} run{plural}, {n_trees} reset trees, {len(text) / 1e6:.2f} MB")


# ------------------------------------------------------------------------------------- reading

# What the page reads of config.json, and of each line of rollouts.jsonl
CONFIG = {
    "method": str,
    "model": str,
    "train_data": str,
    "seed": int,
    "prompts_per_step": int,
    "lr": int | float,
    "clip": int | float,
    "off_policy_shape": int | float,
    "length": str,
    "mask_prefix": bool,
}
ROLLOUT = {
    "id": int,
    "step": int,
    "problem": int,
    "question": str,
    "answer": str,
    "purpose": str,
    "finish": str,
    "prefix_len": int,
    "thoughts": list,
    "thought_ends": list,
    "reward": int | float | None,
    "group": list | None,
    "advantages": list | None,
    "seed": int | None,
    "reset": int | None,
    "localized": str | None,
    "localization": int | None,
}
MOST_TOKENS = 10**7  # of a response; a damaged length is no reason to fill the memory


def readable_run(folder: Path) -> Run:
    """Reads a run. Raises UserError where the page cannot show it."""
    run = read_run(folder)
    check_run(run)
    lengths = ("trained", "response", "step")
    if not has_types(run.config, CONFIG) or run.config["length"] not in lengths:
        raise UserError(f"{folder}/config.json: not as srpo.py writes it; restore it")
    return run


def is_rollout(record) -> bool:
    """Whether a JSON value is a line of rollouts.jsonl."""
    if not has_types(record, ROLLOUT):
        return False
    H, ends, group = len(record["thoughts"]), record["thought_ends"], record["group"]
    if not is_list_of(record["thoughts"], str, H):
        return False
    if not isinstance(record.get("prompt", ""), str):
        return False
    if group is not None and not is_list_of(group, int, 2):
        return False
    if not is_list_of(ends, int, H) or [0, *ends] != sorted({0, *ends}):
        return False
    n = sum(ends[-1:])  # response tokens
    if not (n <= MOST_TOKENS and 0 <= record["prefix_len"] <= n):
        return False
    for name, most in (("trained_from", n), ("first_wrong", H)):
        value = record.get(name)
        if value is not None and not (isinstance(value, int) and 0 <= value <= most):
            return False
    advantages = record["advantages"]
    return advantages is None or is_list_of(advantages, int | float, H)


def is_list_of(value, wanted, n: int) -> bool:
    """Whether a JSON value is a list of n items of the wanted type."""
    return isinstance(value, list) and len(value) == n and all(isinstance(x, wanted) for x in value)


# ---------------------------------------------------------------------------------------- page


def page(data: dict) -> str:
    """The template with the data in it.

    The content policy names the template's own style and script by their hashes: nothing else runs
    or loads."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src {hash_of('style', template)}; "
        f"script-src {hash_of('script', template)}; base-uri 'none'; form-action 'none'"
    )
    # Split before the data goes in: a model may have written REPORT_DATA or CONTENT_POLICY
    before, after = template.replace("CONTENT_POLICY", policy).split("REPORT_DATA")
    return before + embedded(data) + after


def hash_of(tag: str, template: str) -> str:
    """The content-policy source of the template's one plain <tag> element."""
    content = re.search(f"<{tag}>(.*?)</{tag}>", template, re.S)[1]
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def embedded(data) -> str:
    """JSON that can stand in an HTML script element: ASCII, and nothing that could end it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rounded(x: float | None) -> float | None:
    """A number in 6 digits; None for what JSON cannot hold."""
    if x is None or not abs(x) < HUGE:
        return None
    return float(f"{x:.6g}")


# -------------------------------------------------------------------------------------- curves


def run_for_page(run: Run, name: str) -> dict:
    """What the charts of one run need; its trees are added later, as far as there is room."""
    config = run.config
    steps = [line for line in run.lines if line["step"] > 0]
    stride = max(1, math.ceil(len(steps) / POINTS))
    evals = []
    for line in evaluations(run.lines):
        evals.append([line["step"], line["total_tokens"], rounded(line["eval_pass_rate"])])
    return {
        "name": name,
        "seed": config["seed"],
        "folder": run.folder.resolve().name,
        "clip": config["clip"],
        "length": config["length"],
        "shape": config["off_policy_shape"],
        "about": about(config),
        "evals": evals,
        "columns": columns_of(steps[::stride]),
        "steps": [],
        "steps_missing": "",
    }


def about(config: dict) -> str:
    """The run in one line: method, model and data. The trees show the groups of the method."""
    model = config["model"].rstrip("/").split("/")[-1]
    data = config["train_data"].split("/")[-1]
    return (
        f"{config['method']}: {model} on {data}; {config['prompts_per_step']} prompts a step; "
        f"learning rate {config['lr']}"
    )


def columns_of(lines: list[dict]) -> dict[str, list]:
    """Every number of the step lines as a column: {"pass_base": [...], "tokens.base": [...]}."""
    rows = [numbers_of(line) for line in lines]
    columns = {}
    for row in rows:
        for key in row:
            if key not in columns:
                absent = 0 if key.split(".")[0] in COUNTED else None
                columns[key] = [rounded(other.get(key, absent)) for other in rows]
    return columns


def numbers_of(line: dict) -> dict[str, float | None]:
    """The numbers of one step line, those of a dict in it as `key.name`."""
    flat = {}
    for key, value in line.items():
        if isinstance(value, dict):
            for name, part in value.items():
                flat[f"{key}.{name}"] = part
        else:
            flat[key] = value
    return {key: x for key, x in flat.items() if x is None or isinstance(x, (int, float))}


# --------------------------------------------------------------------------------------- trees


@dataclass
class Trees:
    """The reset trees of a run that fit into the page."""

    steps: list[dict]  # as trees_of_step gives them
    left_out: str  # what is missing, in words; empty where nothing is


@dataclass
class Place:
    """Where the rollouts of one step stand in rollouts.jsonl, in bytes."""

    start: int
    size: int


def reset_trees(run: Run, room: float) -> Trees:
    """Trees of a run in at most `room` bytes of JSON.

    Where not all fit: evenly spaced steps, and the first problems of each. Reads one step at a
    time, since rollouts.jsonl may be larger than the memory."""
    path = run.folder / "rollouts.jsonl"
    places = step_places(path) if path.exists() else {}
    # A step that has rollouts but no step line was cut off by a kill
    logged = {line["step"] for line in run.lines}
    steps = sorted(step for step in places if step in logged)
    if not steps:
        reason = "no rollouts were saved (--rollouts_every 0, or stopped too early)"
        return Trees([], f"{reason}, so there are no reset trees")
    per_step = run.config["prompts_per_step"]
    chosen = spaced_steps({step: places[step] for step in steps}, room, per_step)
    kept = []
    complete = len(chosen) == len(steps)
    for i, step in enumerate(chosen):
        one = trees_of_step(path, places[step], run.config)
        wanted = one["trees"]
        one["trees"] = fitting(wanted, (room - STEP_BYTES) / (len(chosen) - i))
        room -= sum(size_of(tree) for tree in one["trees"])
        complete = complete and len(one["trees"]) == len(wanted)
        if one["trees"]:
            kept.append(one)
            room -= STEP_BYTES
    if complete:
        return Trees(kept, "")
    most = max((len(one["trees"]) for one in kept), default=0)
    left_out = (
        f"not all reset trees fit into the file: it has {len(kept)} of {len(steps)} steps, "
        f"with up to {most} of {per_step} problems; --megabytes makes room for more"
    )
    return Trees(kept, left_out)


def spaced_steps(places: dict[int, Place], room: float, per_step: int) -> list[int]:
    """Evenly spaced steps, the last among them, whose first problems fit into `room` bytes.

    Steps are dropped only as far as each that is left can show PROBLEMS_KEPT of its problems."""
    steps = list(places)
    fits = room / sum(place.size for place in places.values())  # share of all problems
    wanted = fits * max(1, per_step / PROBLEMS_KEPT)  # share of the steps
    wanted = min(1, max(wanted, 1 / len(steps)))
    newest_first = steps[::-1]
    return sorted(newest_first[:: math.ceil(1 / wanted)])


def fitting(trees: list[dict], room: float) -> list[dict]:
    """The trees that fit into `room` bytes of JSON, taken in their order."""
    kept = []
    for tree in trees:
        if size_of(tree) <= room:
            kept.append(tree)
            room -= size_of(tree)
    return kept


def size_of(tree: dict) -> int:
    """Bytes of a tree in the page, with its comma."""
    return len(embedded(tree)) + 1


def step_places(path: Path) -> dict[int, Place]:
    """Where each step stands in rollouts.jsonl, without a last line that a kill cut in two."""
    places = {}
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                record = parse(line, f"{path}, line {number}", halves=True)
                if not is_rollout(record):
                    raise UserError(f"{path}, line {number}: no rollout of srpo.py; remove it")
                step = record["step"]
                place = places.setdefault(step, Place(start, 0))
                if place.start + place.size != start:
                    raise UserError(f"{path}, line {number}: apart from its step; remove it")
                place.size += len(line)
            start += len(line)
    return places


def trees_of_step(path: Path, place: Place, config: dict) -> dict:
    """One step for the page: {"step", "n": trained rollouts, "n_tokens": trained tokens, "trees":
    one per slot, in order}."""
    with path.open("rb") as file:
        file.seek(place.start)
        lines = file.read(place.size).splitlines()
    records = [json.loads(line, parse_constant=lambda name: None) for line in lines]
    sums = step_sums(records, config)
    slots = slots_of(records)
    walks = walks_of(records)
    named = {record["seed"] for record in records} | {record["localization"] for record in records}
    trees = {}
    for record in records:
        slot = slots[record["id"]]
        if slot not in trees:
            trees[slot] = {
                "slot": slot,
                "problem": record["problem"],
                "question": record["question"],
                "answer": record["answer"],
                "unshown": {},  # by purpose: how many continuations only measure a prefix
                "walks": [ids for ids in walks if slots[ids[-1]] == slot],
                "rollouts": [],
            }
        if is_probe(record, named):
            unshown = trees[slot]["unshown"]
            unshown[record["purpose"]] = unshown.get(record["purpose"], 0) + 1
        else:
            trees[slot]["rollouts"].append(rollout_for_page(record, sums, config))
    in_order = [trees[slot] for slot in sorted(trees)]
    step = records[0]["step"]
    return {"step": step, "n": sums.rollouts, "n_tokens": sums.tokens, "trees": in_order}


@dataclass
class StepSums:
    """What token weights read of the whole step."""

    rollouts: int  # trained ones, N
    tokens: int  # trained ones


def step_sums(records: list[dict], config: dict) -> StepSums:
    trained = [record for record in records if is_trained(record)]
    tokens = 0
    for record in trained:
        rollout = stand_in(record)
        tokens += len(rollout.token_ids) - rollout.masked(config["mask_prefix"])
    return StepSums(len(trained), tokens)


def is_trained(record: dict) -> bool:
    """Whether the program returned it: the others have no group."""
    return record["group"] is not None


def is_probe(record: dict, named: set) -> bool:
    """Whether it only measures a prefix: a continuation that is not trained, and no seed or review.

    named: the ids that other records refer to. The last round of a walk is shown in any case."""
    continues = record["seed"] is not None or record["purpose"] == "oracle"
    shown = is_trained(record) or record["purpose"] == "walk"
    return continues and not shown and record["id"] not in named


def walks_of(records: list[dict]) -> list[list[int]]:
    """The ids of each walk: of the response that it starts from, then of its rounds, in order."""
    walks = {}  # by the id of the response in hand
    for record in records:
        if record["purpose"] == "walk" and record["seed"] is not None:
            walk = walks.pop(record["seed"], [record["seed"]])
            walks[record["id"]] = [*walk, record["id"]]
    return list(walks.values())


def slots_of(records: list[dict]) -> dict[int, int]:
    """The slot in the step of every record, by record id.

    Trained rollouts know theirs. A seed belongs where its suffixes are, other continuations and a
    localization answer where their seed is. Anything else goes to the first slot with its problem;
    a problem without trained rollouts comes after all slots."""
    slots, first_slot = {}, {}
    for record in records:
        if record["group"]:
            slot = record["group"][0]
            slots[record["id"]] = slot
            if record["seed"] is not None:
                slots[record["seed"]] = slot
            first_slot.setdefault(record["problem"], slot)
    for record in records:
        if record["seed"] in slots:  # a continuation that is not trained
            slots.setdefault(record["id"], slots[record["seed"]])
        if record["localization"] is not None and record["id"] in slots:
            slots[record["localization"]] = slots[record["id"]]
    for record in records:
        after_all = len(records) + record["problem"]
        slots.setdefault(record["id"], first_slot.get(record["problem"], after_all))
    return slots


def rollout_for_page(record: dict, sums: StepSums, config: dict) -> dict:
    """A record of rollouts.jsonl for the page, with the weights that loss.py gives its tokens.

    A suffix leaves out the texts of the shared prefix: its seed has them. So does a round of a walk
    that nobody trains on. One that is trained from its beginning has all of its texts."""
    ends = record["thought_ends"]
    spans = list(zip([0, *ends], ends))  # of each thought, in tokens
    trained = is_trained(record)
    weights = weights_of(record, sums, config) if trained else [0.0] * sum(ends[-1:])
    masked = stand_in(record).masked(config["mask_prefix"])
    shared = sum(end <= record["prefix_len"] for end in ends)  # thoughts that its seed has, too
    reset = trained and record["seed"] is not None and record.get("trained_from") is None
    on_the_way = record["purpose"] == "walk" and record["seed"] is not None and not trained
    first = shared + 1 if reset or on_the_way else 1  # the first thought that is shown
    return {
        "id": record["id"],
        "purpose": record["purpose"],
        "k": record["group"][1] if trained else None,
        "reward": rounded(record["reward"]),
        "advantages": [rounded(a) for a in record["advantages"] or [0.0] * len(ends)],
        "finish": record["finish"],
        "seed": record["seed"],
        "reset": record["reset"],
        "localized": record["localized"],
        "localization": record["localization"],
        "first_wrong": record.get("first_wrong"),
        "from": first,
        "is_reset": reset,
        "shared": shared,
        "off_policy": record.get("off_policy", False),
        "searched": trained and stand_in(record).searched,
        "prompt": record.get("prompt"),
        "thoughts": record["thoughts"][first - 1 :],
        "tokens": [end - start for start, end in spans],
        "masked": sum(end <= masked for end in ends),
        "weights": [rounded(sum(weights[start:end])) for start, end in spans],
        "token_weights": [rounded(weights[end - 1]) for end in ends],
    }


def stand_in(record: dict) -> Rollout:
    """A Rollout with what the loss reads of one: lengths, masks and advantages, no tokens."""
    ends = record["thought_ends"]
    n = ends[-1] if ends else 0
    return Rollout(
        problem=record["problem"],
        purpose=record["purpose"],
        prompt_ids=[],
        token_ids=[0] * n,
        logps=[0.0] * n,
        thought_ends=ends,
        finish=record["finish"],
        prefix_len=record["prefix_len"],
        trained_from=record.get("trained_from"),
        advantages=record["advantages"],
    )


def weights_of(record: dict, sums: StepSums, config: dict) -> list[float]:
    """Weight of each response token in the loss."""
    length = config["length"]
    rollout = stand_in(record)
    return token_weights(rollout, sums.rollouts, config["mask_prefix"], length, sums.tokens)
