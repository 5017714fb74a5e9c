"""The page of `python eval.py report RUN_DIR [RUN_DIR...]`: curves, step lines and reset trees of runs, in one HTML file.

This file reads the runs and chooses what fits; data/report.html draws it. The page needs no network and is safe to open: what a model wrote
is data in it, never markup, and its content policy lets nothing run but the template's own script.

Left out: trees of oracle continuations (only their number is shown), and editing or comparing trees of two runs side by side.

Try it alone:  python srpo.py --steps 3 --rollouts_every 1 --out_dir runs/three && python eval.py report runs/three
"""

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

from data.faults import UserError
from data.runs import name_of, read_run
from loss import token_weights

POINTS = 400  # step lines of a run that its charts show, at most


def command_report(args) -> None:
    """Writes the page of args.runs to args.out, in at most args.megabytes; what does not fit is left out, and named in it."""
    read = [(run, *read_run(run)) for run in args.runs]
    data = {"notes": [], "runs": [run_for_page(*one) for one in read]}
    room = args.megabytes * 1e6 - len(page(data)) - 2000  # the notes
    for i, ((run, config, lines), out) in enumerate(zip(read, data["runs"])):
        out["steps"], left_out = reset_trees(run, config, lines, room / (len(read) - i))
        room -= len(embedded(out["steps"]))
        if left_out:
            out["steps_missing"] = f"{run.resolve().name}: {left_out}"
            data["notes"].append(out["steps_missing"])
    text = page(data)
    try:
        args.out.write_text(text, encoding="ascii")
    except OSError as fault:
        raise UserError(f"cannot write {args.out} ({fault.strerror}); choose another --out")
    trees = sum(len(step["trees"]) for run in data["runs"] for step in run["steps"])
    print(*data["notes"], sep="\n", end="\n" * bool(data["notes"]))
    print(
        f"{args.out}: {len(read)} run{'s' * (len(read) > 1)}, {trees} reset trees, {len(text) / 1e6:.2f} MB"
    )


def page(data: dict) -> str:
    """data/report.html with the data in it. Its content policy names the template's own script and style by their hashes: nothing else runs or loads."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    parts = {
        tag: re.search(f"<{tag}>(.*?)</{tag}>", template, re.S)[1].encode()
        for tag in ("style", "script")
    }
    allowed = " ".join(
        f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}';"
        for tag, part in parts.items()
    )
    before, after = template.replace(
        "CONTENT_POLICY", f"default-src 'none'; {allowed} base-uri 'none'; form-action 'none'"
    ).split("REPORT_DATA")
    return before + embedded(data) + after


def embedded(data) -> str:
    """JSON that can stand in an HTML script element: ASCII, and no character that could end the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rounded(x):
    """A number in 6 digits, None for what JSON cannot hold."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.6g}")


def run_for_page(run: Path, config: dict, lines: list[dict]) -> dict:
    """What the charts need: evaluations, and every number of the step lines as a column {"pass_base": [...], "tokens.base": [...]}."""
    steps = [line for line in lines if line["step"] > 0]
    steps = steps[:: -(-len(steps) // POINTS) or 1]
    flat = [
        {f"{key}.{name}" if name else key: x for key, value in line.items() for name, x in (value.items() if isinstance(value, dict) else [("", value)])
         if x is None or isinstance(x, (int, float))}
        for line in steps
    ]  # fmt: skip
    missing = {
        key: 0
        if key.split(".")[0] in ("tokens", "seconds", "counters", "localized", "finish")
        else None
        for line in flat
        for key in line
    }
    return {
        "name": name_of(config), "seed": config["seed"], "folder": run.resolve().name, "clip": config["clip"], "length": config.get("length", "trained"),
        "about": f"{config['model'].rstrip('/').split('/')[-1]} on {config['train_data'].split('/')[-1]}; {config['prompts_per_step']} prompts a step, {config['base']} base "
                 f"rollouts and {config['prefixes']} x {config['suffixes']} suffixes each; learning rate {config['lr']}",
        "evals": [[x["step"], x["total_tokens"], rounded(x["eval_pass_rate"])] for x in lines if "eval_pass_rate" in x],
        "columns": {key: [rounded(line.get(key, other)) for line in flat] for key, other in missing.items()},
        "steps": [], "steps_missing": "",
    }  # fmt: skip


def reset_trees(run: Path, config: dict, lines: list[dict], room: float) -> tuple[list[dict], str]:
    """([{"step", "n", "trees"}], what was left out in words), in at most `room` bytes. Where not all fit: evenly spaced steps, the
    first problems of each. Reads one step at a time: rollouts.jsonl may be larger than the memory."""
    path = run / "rollouts.jsonl"
    places = step_places(path) if path.exists() else {}
    logged = {line["step"] for line in lines}
    steps = sorted(
        step for step in places if step in logged
    )  # one without its step line was cut off by a kill
    if not steps:
        return (
            [],
            "no rollouts were saved (--rollouts_every 0, or stopped too early), so there are no reset trees",
        )
    per_step = config["prompts_per_step"]
    part = room / sum(
        places[step][1] for step in steps
    )  # that fits, about; steps are thinned out only as far as each keeps 8 problems
    stride = math.ceil(1 / min(1, max(part * max(1, per_step / 8), 1 / len(steps))))
    chosen = steps[::-1][::stride][::-1]  # with the last
    kept, whole = [], stride == 1
    for i, step in enumerate(chosen):
        one = trees_of_step(path, places[step], config)
        share, trees, one["trees"] = (room - 60) / (len(chosen) - i), one["trees"], []
        for tree in trees:
            size = len(embedded(tree)) + 1
            if size <= share:
                one["trees"].append(tree)
                share, room = share - size, room - size
        whole = whole and len(one["trees"]) == len(trees)
        if one["trees"]:
            kept.append(one)
            room -= 60  # the rest of its JSON
    if whole:
        return kept, ""
    most = max((len(one["trees"]) for one in kept), default=0)
    return kept, (f"not all reset trees fit into the file: it has {len(kept)} of {len(steps)} steps, with up to {most} of {per_step} problems; "
                  "--megabytes makes room for more")  # fmt: skip


def step_places(path: Path) -> dict[int, list[int]]:
    """{step: [first byte, number of bytes]} of rollouts.jsonl, without a last line that a kill cut in two."""
    places, at = {}, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    place = places.setdefault(json.loads(line)["step"], [at, 0])
                except json.JSONDecodeError as fault:
                    raise UserError(f"{path}: line {number} is damaged ({fault}); remove it")
                place[1] += len(line)
            at += len(line)
    return places


def trees_of_step(path: Path, place: list[int], config: dict) -> dict:
    """{"step", "n": trained rollouts, "trees": one for each problem of the step, in the order of their slots}."""
    with path.open("rb") as file:
        file.seek(place[0])
        records = [
            json.loads(line, parse_constant=lambda _: None)
            for line in file.read(place[1]).splitlines()
        ]
    n = sum(r["group"] is not None for r in records)
    slot_of = {
        i: r["group"][0] for r in records if r["group"] for i in (r["id"], r["seed"])
    }  # a seed is where its suffixes are
    slot_of |= {r["localization"]: slot_of[r["id"]] for r in records if r["id"] in slot_of}
    home = {
        r["problem"]: r["group"][0] for r in reversed(records) if r["group"]
    }  # of what no trained rollout names: the first slot with its problem
    trees = {}
    for r in records:
        slot = slot_of.get(r["id"], home.get(r["problem"], len(records) + r["problem"]))
        tree = trees.setdefault(
            slot,
            {
                "slot": slot,
                "problem": r["problem"],
                "question": r["question"],
                "answer": str(r["answer"]),
                "oracle": 0,
                "rollouts": [],
            },
        )
        if r["purpose"] == "oracle":
            tree["oracle"] += 1
        else:
            tree["rollouts"].append(rollout_for_page(r, n, config))
    return {"step": records[0]["step"], "n": n, "trees": [trees[slot] for slot in sorted(trees)]}


def rollout_for_page(r: dict, n: int, config: dict) -> dict:
    """A record of rollouts.jsonl, with the weights of loss.py: of each thought (the sum over its tokens) and of one trained token. A
    suffix leaves out the texts of the shared prefix, which its seed has."""
    ends, mask_prefix = r["thought_ends"], config["mask_prefix"]
    starts = [0, *ends[:-1]]
    weights = [0.0] * (ends[-1] if ends else 0)
    if r["group"] and r["advantage"]:
        weights = token_weights(
            SimpleNamespace(
                prefix_len=r["prefix_len"], token_ids=range(ends[-1]), advantage=r["advantage"]
            ),
            n,
            mask_prefix,
            config.get("length", "trained"),
        )
    first = r["reset"] if r["seed"] is not None and r["reset"] else 1
    return {
        "id": r["id"], "purpose": r["purpose"], "k": r["group"][1] if r["group"] else None, "reward": rounded(r["reward"]), "advantage": rounded(r["advantage"]),
        "finish": r["finish"], "seed": r["seed"], "reset": r["reset"], "localized": r["localized"], "localization": r["localization"],
        "first_wrong": r.get("first_wrong"), "from": first, "thoughts": r["thoughts"][first - 1 :], "tokens": [b - a for a, b in zip(starts, ends)],
        "masked": sum(end <= r["prefix_len"] for end in ends) if mask_prefix else 0,
        "weights": [rounded(sum(weights[a:b])) for a, b in zip(starts, ends)], "token_weight": rounded(weights[-1] if weights else 0.0),
    }  # fmt: skip
