"""The run directory: what a run writes, how it is resumed, and how it is read.

    config.json      every setting, the run's name, git commit and torch version
    metrics.jsonl    one step line for each step; step 0 is the evaluation before training
    rollouts.jsonl   every rollout of every --rollouts_every'th step
    curve.png        pass rates so far
    lock             empty; locked by the process that writes the run, as long as it lives
    checkpoints/step_N/
        *              the policy in Hugging Face layout: bf16 on a GPU; adapters are merged, and
                       what they adapt is float32
        state/         what training goes on from: trained parameters and optimizer
                       (torch.distributed.checkpoint: any number of processes can read it)
        trainer.json   where the run was (Progress)
        origin.json    what the run is a function of (Origin): resuming compares it
        manifest.json  SHA-256 of every other file

Checkpoints and settings are written beside, then renamed: a kill or a full disk never damages a
finished one. Lines are appended; a last one that was cut in two is passed over. The last two
checkpoints are kept; other entries of checkpoints/ are not ours and stay. Resuming drops later
lines; those steps are done again, with equal results.

Left out: copies on other machines, and checkpoints by time.

Try it alone:  python -m data.runs runs/RUN    # the last step line of a run
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from errno import EACCES, ENOTDIR
from pathlib import Path
from typing import IO, Iterator

import torch
from safetensors import SafetensorError

from data.faults import UserError
from data.parallel import kept_buffers, on_main, processes, rank, whole_weights

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------- starting a run


CONTENTS = ("config.json", "metrics.jsonl", "rollouts.jsonl", "curve.png", "checkpoints")


def check_new(out_dir: Path) -> None:
    """Raises UserError if no new run can be written there. Leaves at most empty parent folders."""
    other = "choose another --out_dir"
    if os.path.exists(out_dir / "config.json"):  # False where a name is too long, not an error
        raise UserError(f"{out_dir} already holds a run; go on with --resume {out_dir}, or {other}")
    found = [name for name in CONTENTS if os.path.exists(out_dir / name)]
    if found:  # pruning would take its checkpoints for ours
        raise UserError(
            f"{out_dir} holds {', '.join(found)} of a run without its config.json; "
            f"move them away, or {other}"
        )
    try:  # now, before the model is loaded
        if not os.path.exists(out_dir):
            out_dir.mkdir(parents=True)
            out_dir.rmdir()
        elif not out_dir.is_dir():
            raise NotADirectoryError(ENOTDIR, "not a directory")
        elif not os.access(out_dir, os.W_OK):
            raise PermissionError(EACCES, "no permission")
    except OSError as fault:
        raise UserError(f"cannot write to {out_dir} ({fault.strerror}); {other}")


def start(out_dir: Path, settings: dict) -> None:
    """Takes the directory and writes config.json of a new run. settings: every one, and `name`."""
    commit = ""
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip()
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    take(out_dir)
    check_new(out_dir)  # again: another run may have started there while this one loaded its model
    about = {"git_commit": commit, "torch": torch.__version__}
    write_json(out_dir / "config.json", settings | about)


# ------------------------------------------------------------------------------------ one at a time

locks: dict[Path, IO] = {}  # by run directory: the open lock files of this process


def take(out_dir: Path) -> None:
    """Locks a run directory for this process. Raises UserError if another process writes there.

    The system drops the lock when the process ends, however it ends.
    """
    path = out_dir.resolve() / "lock"
    with writing(path):
        file = locks.get(path) or path.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"{out_dir}: another process writes this run; wait for its end, or stop it first"
        )
    except OSError as fault:  # some network disks
        print(f"warning: {out_dir} cannot be locked ({fault.strerror}); do not run it twice")
    locks[path] = file  # closing it, or any other handle of this file, would drop the lock


def leave(out_dir: Path) -> None:
    """Ends `take`."""
    locks.pop(out_dir.resolve() / "lock").close()


# ------------------------------------------------------------------------------------------ writing

# What a full disk or a lost directory raises. torch.distributed.checkpoint has its own exception.
WRITE_FAULTS = (OSError, SafetensorError)


@contextmanager
def writing(path: Path, faults: tuple = WRITE_FAULTS) -> Iterator[None]:
    """Turns a write that failed into a UserError."""
    try:
        yield
    except faults as fault:
        reason = getattr(fault, "strerror", None) or first_line(fault)
        raise UserError(
            f"cannot write {path} ({reason}); what was saved before is whole: mend this and go on"
        )


def first_line(fault: BaseException) -> str:
    return str(fault).strip().partition("\n")[0][:200] or type(fault).__name__


def append(path: Path, records: list[dict]) -> None:
    """Adds records to a JSON-lines file, one object per line."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def write_json(path: Path, content) -> None:
    write_whole(path, json.dumps(content, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside, and renames it: there is the old one or the new one, never a part."""
    beside = path.with_suffix(".tmp")
    with writing(path):
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)


# -------------------------------------------------------------------------------------- checkpoints


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0  # steps done
    total_tokens: int = 0  # generated so far, for all purposes
    before: float | None = None  # held-out pass rate before training; None: not measured yet


@dataclass
class Origin:
    """What a run is a function of."""

    settings: dict  # those that --resume may not change
    inputs: dict[str, str]  # name of an input -> SHA-256 of it


def save_checkpoint(
    out_dir: Path, progress: Progress, origin: Origin, model, tokenizer, optimizer
) -> None:
    """Writes checkpoints/step_N. Every process must call it."""
    # Here, not above: a start need not wait for it.
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    folder = out_dir / "checkpoints"
    temporary = folder / f"tmp-step_{progress.step}"
    on_main(make_empty, temporary)
    state = training_state(model, optimizer)
    with writing(temporary, (*WRITE_FAULTS, CheckpointException)):
        dcp.save(state, checkpoint_id=temporary / "state", no_dist=processes() == 1)
    adapted = any(".lora_" in name for name, _ in model.named_parameters())
    buffers = dict(kept_buffers(model))
    weights = {}
    for name, weight in whole_weights(model):
        if rank() == 0:
            dtype = weight.dtype
            # bf16 could hold no small change by an adapter
            if weight.is_cuda and name not in buffers and not adapted:
                dtype = torch.bfloat16
            weights[name] = weight.to("cpu", dtype)

    def finish():
        with writing(temporary):
            model.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / "trainer.json", asdict(progress))
            write_json(temporary / "origin.json", asdict(origin))
            write_manifest(temporary)
            place = folder / f"step_{progress.step}"
            shutil.rmtree(place, ignore_errors=True)
            os.replace(temporary, place)
            for old in checkpoints(out_dir)[:-2]:
                shutil.rmtree(old)

    on_main(finish)


def make_empty(folder: Path) -> None:
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def write_manifest(folder: Path) -> None:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    manifest = {str(file.relative_to(folder)): digest(file) for file in files}
    write_json(folder / "manifest.json", manifest)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(content) -> str:
    """SHA-256 of anything that is JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def training_state(model, optimizer) -> dict:
    """Trained parameters and optimizer state, by name; sharded where the model is sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def load_checkpoint(checkpoint: Path, model, optimizer) -> Progress:
    """Puts model and optimizer where they were. Every process must call it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    state = training_state(model, optimizer)
    try:
        dcp.load(state, checkpoint_id=checkpoint / "state", no_dist=processes() == 1)
    except (CheckpointException, RuntimeError) as fault:
        reason = first_line(fault)
        raise UserError(f"{checkpoint} does not fit the model and these settings ({reason})")
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
    return sorted(ours(out_dir, ""), key=step_of)


def ours(out_dir: Path, prefix: str) -> list[Path]:
    """Folders in checkpoints/ called prefix + step_N. Others, say step_2_best, are not ours."""
    named = re.compile(prefix + "step_(0|[1-9][0-9]{0,9})")
    found = (out_dir / "checkpoints").glob(f"{prefix}step_*")
    return [path for path in found if named.fullmatch(path.name) and path.is_dir()]


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
        manifest = read_json(newest / "manifest.json")
        damaged = [name for name, sha in manifest.items() if digest(newest / name) != sha]
    except READ_FAULTS as fault:
        raise UserError(f"{newest} is damaged ({first_line(fault)}); {advice}")
    if "trainer.json" not in manifest:
        damaged.append("trainer.json")
    if damaged:
        raise UserError(
            f"{newest} is damaged ({', '.join(damaged)} is not what was saved); {advice}"
        )
    return newest


# ----------------------------------------------------------------------------------------- resuming


def reopen(out_dir: Path, steps: int) -> Path | None:
    """Takes the directory of a run to bring to a step. Returns its newest checkpoint, if any."""
    take(out_dir)
    newest = newest_checkpoint(out_dir)
    if newest and step_of(newest) > steps:
        raise UserError(f"--steps {steps}: {newest} is beyond; ask for {step_of(newest)} or more")
    return newest


def read_settings(out_dir: Path) -> dict:
    """config.json of a run to resume. Raises UserError if there is none."""
    try:
        settings = read_json(out_dir / "config.json")
        if "method" in settings:
            return settings
        reason = "no method in config.json"
    except READ_FAULTS as fault:
        reason = f"{type(fault).__name__}: {first_line(fault)}"
    raise UserError(f"--resume {out_dir}: no run of this program is there ({reason})")


def check_origin(checkpoint: Path, now: Origin, allow_changes: bool) -> None:
    """Raises UserError if the run of a checkpoint had another origin. allow_changes: prints it."""
    if not (checkpoint / "origin.json").exists():
        print(f"{checkpoint}: of an older version; nothing tells whether data or model changed")
        return
    then = Origin(**read_json(checkpoint / "origin.json"))
    changes = []
    for name, value in now.settings.items():
        not_recorded = name == "dtype" and then.settings.get(name) is None  # by an older version
        if name in then.settings and then.settings[name] != value and not not_recorded:
            changes.append(f"{name} was {then.settings[name]!r} and is {value!r}")
    for name, sha in now.inputs.items():
        if name not in then.inputs:
            print(f"{checkpoint}: of an older version; nothing tells whether the {name} changed")
        elif then.inputs[name] != sha:
            changes.append(f"the {name} changed")
    if changes and not allow_changes:
        raise UserError(
            f"{checkpoint}: since it was saved, {'; '.join(changes)}; "
            "put that back, or add --allow_changes true"
        )
    if changes:
        print(f"going on with changes: {'; '.join(changes)}")


def remember(out_dir: Path, settings: dict) -> None:
    """Brings config.json up to date: settings that this resume changed hold for the next.

    The last checkpoint still names the old values: until the next one is saved, a resume needs
    --allow_changes again.
    """
    saved = read_settings(out_dir)
    if saved | settings != saved:
        write_json(out_dir / "config.json", saved | settings)


def rewind(out_dir: Path, checkpoint: Path | None) -> float | None:
    """Drops later lines and unfinished checkpoints. Returns the last held-out pass rate, if any."""
    last_step = step_of(checkpoint) if checkpoint else -1  # -1: drops every line, step 0 too
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        drop_later_lines(out_dir / name, last_step)
    with writing(out_dir):
        for unfinished in ours(out_dir, "tmp-"):
            shutil.rmtree(unfinished)
    if checkpoint is None:
        return None
    measured = [line for line in read_run(out_dir).lines if "eval_pass_rate" in line]
    if not measured:
        raise UserError(f"{out_dir}/metrics.jsonl lacks its first lines; restore the file")
    return measured[-1]["eval_pass_rate"]


def drop_later_lines(path: Path, last_step: int) -> None:
    """Drops the lines of later steps, and a last line that a kill cut in two."""
    if not path.exists():
        return
    kept = 0  # bytes
    with writing(path), path.open("rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            if step_line(line, f"{path}, line {number}")["step"] > last_step:
                break
            kept += len(line)
        file.truncate(kept)


# ------------------------------------------------------------------------------------------ reading


@dataclass
class Run:
    """A run as read from its folder. config: its settings; lines: its step lines."""

    folder: Path
    config: dict
    lines: list[dict]


# What reading a damaged JSON file raises: RecursionError if it is deep, ValueError if it is none or
# holds a number of 5,000 digits, the others if it holds something else.
READ_FAULTS = (OSError, ValueError, RecursionError, AttributeError, TypeError)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises one of READ_FAULTS."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError("not a JSON object")
    return content


def step_line(text: str | bytes, where: str) -> dict:
    """The object of one line of metrics.jsonl or rollouts.jsonl. Raises UserError if it is none."""
    try:
        line = json.loads(text)
        numbers = [line["step"], line.get("trained_tokens", 0), line.get("eval_pass_rate", 0)]
        numbers += line.get("seconds", {}).values()
    except (*READ_FAULTS, KeyError):
        numbers = [None]
    if not all(type(number) in (int, float) for number in numbers):
        raise UserError(f"{where}: not a line of srpo.py; restore the file, or remove this line")
    return line


def read_run(folder: Path) -> Run:
    """Reads a run. Adds running totals: trained_total (tokens), seconds_total (no evaluations).

    Raises UserError if the folder is no run directory.
    """
    try:
        config = read_json(folder / "config.json")
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except READ_FAULTS as fault:
        raise UserError(f"{folder}: not a run directory of srpo.py ({first_line(fault)})")
    whole, _, _ = text.rpartition("\n")  # a kill may have cut the last line in two
    lines = []
    for number, one in enumerate(whole.splitlines(), 1):
        lines.append(step_line(one, f"{folder}/metrics.jsonl, line {number}"))
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
    try:
        run = read_run(Path(sys.argv[1]))
    except UserError as fault:
        sys.exit(f"runs.py: {fault}")
    last = run.lines[-1] if run.lines else "no step line"
    print(name_of(run), json.dumps(last, indent=1))
