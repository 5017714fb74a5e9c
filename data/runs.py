"""The run directory: what a run writes, how it is resumed, and how it is read.

    config.json      every setting, the run's name, git commit and torch version
    metrics.jsonl    one step line for each step; step 0 is the evaluation before training
    rollouts.jsonl   every rollout of every --rollouts_every'th step
    curve.png        pass rates so far
    checkpoints/step_N/
        *              the policy in Hugging Face layout: adapters merged, bf16 on a GPU
        state/         what training goes on from: trained parameters and optimizer
                       (torch.distributed.checkpoint: any number of processes can read it)
        trainer.json   where the run was (Progress)
        manifest.json  SHA-256 of every other file

A checkpoint is written to a temporary folder, then renamed: a kill never damages a finished one.
The last two are kept. Resuming drops later lines; those steps are done again, with equal results.

Left out: trackers such as wandb or tensorboard. metrics.jsonl has one JSON object per line.

Try it alone:  python -m data.runs runs/RUN    # the last step line of a run
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data.faults import UserError
from data.parallel import on_main, processes, rank, whole_weights

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------- starting a run


def check_new(out_dir: Path) -> None:
    """Raises UserError if no new run can be written there. Leaves at most empty parent folders."""
    if (out_dir / "config.json").exists():
        raise UserError(
            f"{out_dir} already holds a run; go on with --resume {out_dir}, "
            "or choose another --out_dir"
        )
    if out_dir.exists():
        return
    try:  # now, before the model is loaded
        out_dir.mkdir(parents=True)
        out_dir.rmdir()
    except OSError as fault:
        raise UserError(f"cannot write to {out_dir} ({fault.strerror}); choose another --out_dir")


def start(out_dir: Path, settings: dict) -> None:
    """Writes config.json of a new run. settings: every setting, and the run's name."""
    commit = ""
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip()
    about = {"git_commit": commit, "torch": torch.__version__}
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").write_text(json.dumps(settings | about, indent=1))


def append(path: Path, records: list[dict]) -> None:
    """Adds records to a JSON-lines file, one object per line."""
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


# -------------------------------------------------------------------------------------- checkpoints


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0  # steps done
    total_tokens: int = 0  # generated so far, for all purposes
    before: float | None = None  # held-out pass rate before training; None: not measured yet


def save_checkpoint(out_dir: Path, progress: Progress, model, tokenizer, optimizer) -> None:
    """Writes checkpoints/step_N. Every process must call it."""
    import torch.distributed.checkpoint as dcp  # here, not above: a start need not wait for it

    folder = out_dir / "checkpoints"
    temporary = folder / f"tmp-step_{progress.step}"
    on_main(make_empty, temporary)
    state = training_state(model, optimizer)
    dcp.save(state, checkpoint_id=temporary / "state", no_dist=processes() == 1)
    weights = {}
    for name, weight in whole_weights(model):
        if rank() == 0:
            dtype = torch.bfloat16 if weight.is_cuda else weight.dtype
            weights[name] = weight.to("cpu", dtype)

    def finish():
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        (temporary / "trainer.json").write_text(json.dumps(asdict(progress)))
        write_manifest(temporary)
        place = folder / f"step_{progress.step}"
        shutil.rmtree(place, ignore_errors=True)
        os.replace(temporary, place)
        for old in checkpoints(out_dir)[:-2]:
            shutil.rmtree(old)

    on_main(finish)


def make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def write_manifest(folder: Path) -> None:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    manifest = {str(file.relative_to(folder)): digest(file) for file in files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def training_state(model, optimizer) -> dict:
    """Trained parameters and optimizer state, by name; sharded where the model is sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def load_checkpoint(checkpoint: Path, model, optimizer) -> Progress:
    """Puts model and optimizer where they were. Every process must call it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    state = training_state(model, optimizer)
    dcp.load(state, checkpoint_id=checkpoint / "state", no_dist=processes() == 1)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),  # frozen: not saved
    )
    return Progress(**json.loads((checkpoint / "trainer.json").read_text()))


def checkpoints(out_dir: Path) -> list[Path]:
    """Its checkpoints, the newest last."""
    return sorted((out_dir / "checkpoints").glob("step_*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def newest_checkpoint(out_dir: Path) -> Path | None:
    """The newest checkpoint, or None. Raises UserError if a file of it is damaged."""
    found = checkpoints(out_dir)
    if not found:
        return None
    newest = found[-1]
    advice = f"remove {newest} to go on from the one before"
    try:
        manifest = json.loads((newest / "manifest.json").read_text())
        damaged = [name for name, sha in manifest.items() if digest(newest / name) != sha]
    except (OSError, json.JSONDecodeError) as fault:
        raise UserError(f"{newest} is damaged ({fault}); {advice}")
    if "trainer.json" not in manifest:
        damaged.append("trainer.json")
    if damaged:
        raise UserError(
            f"{newest} is damaged ({', '.join(damaged)} is not what was saved); {advice}"
        )
    return newest


# ----------------------------------------------------------------------------------------- resuming


def read_settings(out_dir: Path) -> dict:
    """config.json of a run to resume. Raises UserError if there is none."""
    try:
        return json.loads((out_dir / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as fault:
        raise UserError(
            f"--resume {out_dir}: no run of this program is there ({type(fault).__name__}: {fault})"
        )


def rewind(out_dir: Path, checkpoint: Path | None) -> float | None:
    """Drops later lines and unfinished checkpoints. Returns the last held-out pass rate, if any."""
    last_step = step_of(checkpoint) if checkpoint else -1  # -1: drops every line, step 0 too
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        drop_later_lines(out_dir / name, last_step)
    for unfinished in (out_dir / "checkpoints").glob("tmp-*"):
        shutil.rmtree(unfinished)
    if checkpoint is None:
        return None
    measured = [line for line in read_run(out_dir).lines if "eval_pass_rate" in line]
    return measured[-1]["eval_pass_rate"] if measured else None


def drop_later_lines(path: Path, last_step: int) -> None:
    """Drops the lines of later steps, and a last line that a kill cut in two."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > last_step:
            break
        kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------ reading


@dataclass
class Run:
    """A run as read from its folder. config: its settings; lines: its step lines."""

    folder: Path
    config: dict
    lines: list[dict]


def read_run(folder: Path) -> Run:
    """Reads a run. Adds running totals: trained_total (tokens), seconds_total (no evaluations).

    Raises UserError if the folder is no run directory.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as fault:
        raise UserError(f"{folder}: not a run directory of srpo.py ({fault})")
    trained = seconds = 0.0
    for line in lines:
        trained += line.get("trained_tokens", 0)
        seconds += sum(line.get("seconds", {}).values())
        line["trained_total"] = trained
        line["seconds_total"] = seconds
    return Run(folder, config, lines)


def name_of(run: Run) -> str:
    """What tells a run apart from others, without its seed: `srpo 1x4 localizer=verifier`.

    Written by srpo.py. An older run has none, and shares its curve with no other run.
    """
    return run.config.get("name") or f"{run.config['method']} in {run.folder.resolve()}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data.runs RUN_DIR")
    run = read_run(Path(sys.argv[1]))
    print(name_of(run), json.dumps(run.lines[-1], indent=1))
