"""The run directory."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from data.faults import UserError
from data.parallel import on_main, processes, rank, whole_weights

HERE = Path(__file__).resolve().parent.parent


def append(path: Path, record: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def find_run(cfg) -> tuple[Path, Path | None]:
    """(run directory, checkpoint to resume from or None). Changes nothing; raises UserError if the directory cannot be used."""
    if cfg.resume:
        return Path(cfg.resume), newest_checkpoint(Path(cfg.resume))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    out_dir = Path(
        cfg.out_dir
        or HERE
        / "runs"
        / f"{cfg.method}-{cfg.base}-{cfg.prefixes}x{cfg.suffixes}-seed{cfg.seed}-{stamp}"
    )
    if (out_dir / "config.json").exists():
        raise UserError(
            f"{out_dir} already holds a run; go on with --resume {out_dir}, or choose another --out_dir"
        )
    try:
        if not out_dir.exists():  # can it be made? better known now than after loading a model
            out_dir.mkdir(parents=True)
            out_dir.rmdir()
    except OSError as fault:
        raise UserError(f"cannot write to {out_dir} ({fault.strerror}); choose another --out_dir")
    return out_dir, None


def open_run(cfg, out_dir: Path, checkpoint: Path | None) -> float | None:
    """Writes config.json, or, of a run that is resumed, drops what was logged after the checkpoint: those steps are done again.
    Returns the last held-out pass rate that was logged, if any."""
    if cfg.resume:
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            truncate(
                out_dir / name, int(checkpoint.name.removeprefix("step_")) if checkpoint else -1
            )
        for rest in (out_dir / "checkpoints").glob("tmp-*"):
            shutil.rmtree(rest)
        rates = (
            [line["eval_pass_rate"] for line in read_run(out_dir)[1] if "eval_pass_rate" in line]
            if checkpoint
            else []
        )
        return rates[-1] if rates else None
    describe = ["git", "describe", "--always", "--dirty"]
    git = (
        subprocess.run(describe, cwd=HERE, capture_output=True, text=True).stdout.strip()
        if shutil.which("git")
        else ""
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").write_text(
        json.dumps(asdict(cfg) | {"git_commit": git, "torch": torch.__version__}, indent=1)
    )


def truncate(path: Path, step: int) -> None:
    """Drops the lines of later steps, and a last line that a kill cut in two."""
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)


def save_checkpoint(
    out_dir: Path, step: int, model, tokenizer, optimizer, total_tokens: int, before: float
) -> None:
    """checkpoints/step_N: a Hugging Face folder (adapters merged; bf16 on a GPU), state/ with what training goes on from (trained
    parameters and optimizer, torch.distributed.checkpoint: any number of processes can read it), trainer.json, and manifest.json with the
    SHA-256 of every file. Written beside its place and then renamed, so a kill leaves the last whole checkpoint. The last two are kept."""
    folder = out_dir / "checkpoints"
    temporary = folder / f"tmp-step_{step}"

    def begin():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish():
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        (temporary / "trainer.json").write_text(
            json.dumps({"step": step, "total_tokens": total_tokens, "before": before})
        )
        manifest = {
            str(file.relative_to(temporary)): digest(file)
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        place = folder / f"step_{step}"
        shutil.rmtree(place, ignore_errors=True)
        os.replace(temporary, place)
        for old in sorted(folder.glob("step_*"), key=lambda p: int(p.name.removeprefix("step_")))[
            :-2
        ]:
            shutil.rmtree(old)

    on_main(begin)
    dcp.save(
        training_state(model, optimizer),
        checkpoint_id=temporary / "state",
        no_dist=processes() == 1,
    )
    weights = {}
    for name, weight in whole_weights(model):
        if rank() == 0:
            weights[name] = weight.to("cpu", torch.bfloat16 if weight.is_cuda else weight.dtype)
    on_main(finish)


def training_state(model, optimizer) -> dict:
    """Trained parameters and optimizer state by parameter name; sharded where the model is."""
    weights, moments = get_state_dict(
        model, optimizer, options=StateDictOptions(ignore_frozen_params=True)
    )
    return {"model": weights, "optimizer": moments}


def load_checkpoint(checkpoint: Path, model, optimizer) -> tuple[int, int, float]:
    """Puts model and optimizer where they were, and returns (steps done, tokens generated, first pass rate)."""
    state = training_state(model, optimizer)
    dcp.load(state, checkpoint_id=checkpoint / "state", no_dist=processes() == 1)
    options = StateDictOptions(
        ignore_frozen_params=True, strict=False
    )  # frozen parameters are not in it
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    return trainer["step"], trainer["total_tokens"], trainer["before"]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_checkpoint(out_dir: Path) -> Path | None:
    """The newest checkpoint of a run, None if it has none yet. Raises UserError if a file of it is missing or changed."""
    found = sorted(
        (out_dir / "checkpoints").glob("step_*"), key=lambda p: int(p.name.removeprefix("step_"))
    )
    if not found:
        return None
    checkpoint = found[-1]
    advice = f"remove {checkpoint} to go on from the one before"
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        damaged = [name for name, sha in manifest.items() if digest(checkpoint / name) != sha]
    except (OSError, json.JSONDecodeError) as fault:
        raise UserError(f"{checkpoint} is damaged ({fault}); {advice}")
    if damaged or "trainer.json" not in manifest:
        raise UserError(
            f"{checkpoint} is damaged ({', '.join(damaged) or 'no trainer.json'} is not what was saved); {advice}"
        )
    return checkpoint


def read_run(run: Path) -> tuple[dict, list[dict]]:
    """(settings, step lines) of a run directory; each line also gets trained_total (tokens) and seconds_total (without evaluations), both
    summed up to it. Raises UserError if it is none."""
    try:
        config = json.loads((run / "config.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as fault:
        raise UserError(f"{run}: not a run directory of srpo.py ({fault})")
    trained = seconds = 0.0
    for line in lines:
        line["trained_total"] = trained = trained + line.get("trained_tokens", 0)
        line["seconds_total"] = seconds = seconds + sum(line.get("seconds", {}).values())
    return config, lines


def name_of(config: dict) -> str:
    """What tells a run apart from others of one study, without its seed: `srpo 1x4 verifier`."""
    parts = [config["method"]]
    if config["method"] != "grpo":
        parts += [f"{config['prefixes']}x{config['suffixes']}"]
        parts += [config["localizer"]] if config["localizer"] not in ("self", "random") else []
        parts += [config["seed_choice"]] if config["seed_choice"] != "first" else []
        parts += ["fresh seeds"] if config["seed_source"] != "base" else []
        parts += ["unmasked"] if not config.get("mask_prefix", True) else []
        parts += ["response length"] if config.get("length", "trained") != "trained" else []
    parts += ["clipped"] if config.get("clip") else []
    parts += [f"{config['updates']} updates"] if config.get("updates", 1) > 1 else []
    return " ".join(parts)
