"""SRPO: reset-based RL post-training for language-model reasoning. This file is the algorithm box, read from top to bottom.

"Credit Assignment with Resets in Language Model Reasoning" (arXiv 2605.25507). One step, for P prompts:

    sample      a base group per prompt; a failure as seed; its first wrong thought h*, named by the policy; a suffix group from the
                thoughts before h*                                             rollout.py, localize.py
    grade       reward of the last \\boxed{}                                    data/problems.py
    advantages  inside each group                                              loss.py
    loss, step  masked group-relative REINFORCE, one AdamW step                loss.py
    sync, log, evaluate, save

    python srpo.py                                          # the embedded policy, minutes on 2 CPU cores
    python srpo.py --method grpo --out_dir runs/grpo        # the baseline; rrpo resets at a random thought
    python srpo.py --resume runs/grpo                       # goes on where a killed run was, bit for bit on a CPU
    python srpo.py --model Qwen/Qwen2.5-0.5B-Instruct --train_data problems.jsonl --eval_data held_out.jsonl
    torchrun --nproc_per_node=8 srpo.py --model ...         # the same run on 8 GPUs (or CPU processes)

With several processes each samples and grades its share of the prompts, every process gets all rollouts, and each trains on its share
of the rows; parameters, gradients and optimizer state are sharded (FSDP2). Nothing in the algorithm below depends on their number.

Departures from the paper's settings: sampling at T = 1 and top_p = 1 (other values bias the gradient; top_p < 1 warns), full fine-tuning
unless --lora_rank is given. Left out: training and sampling on different GPUs, and overlapping them (that is no longer on-policy).
"""

import json
import os
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import HfArgumentParser

from data.curves import by_name, draw_curves
from data.faults import UserError, counters
from data.parallel import connect, gather, on_main, processes, rank, whole, whole_weights
from data.runs import append, find_run, load_checkpoint, open_run, save_checkpoint
from data.tasks import GENERATED, load_problems
from data.verifiers import DELIMITER, sandbox_or_refusal
from eval import evaluate
from localize import LOCALIZERS, check_localizer
from loss import backward, chosen_logps, grouped, set_advantages
from rollout import PROGRAMS, Rollout, Task, encode_question, load_policy, make_engine, run_programs

warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled"
)  # saving from one process is what we mean
HERE = Path(__file__).resolve().parent
SPLITS = {
    "1x4": (4, 1, 4),
    "2x4": (0, 2, 4),
    "1x8": (0, 1, 8),
}  # base, prefixes, suffixes: 8 trained rollouts per prompt each


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting of a run. `python srpo.py --help` prints these lines."""

    method: Literal["srpo", "rrpo", "grpo"] = setting(
        "srpo", "srpo: reset at the located error; rrpo: at a random thought; grpo: no resets"
    )
    split: Literal["1x4", "2x4", "1x8"] = setting(
        "1x4", "prefixes x suffixes of 8 trained rollouts per prompt; the rest is the base group"
    )
    base: Optional[int] = setting(
        None, "size of the base group (default: from --split; 8 for grpo)"
    )
    prefixes: Optional[int] = setting(None, "reset states per prompt (default: from --split)")
    suffixes: Optional[int] = setting(
        None, "continuations of each reset state (default: from --split)"
    )
    model: str = setting(
        str(HERE / "data" / "policy"), "folder or hub id of the policy (default: the embedded one)"
    )
    train_data: str = setting(
        "chain-12", f"JSON-lines file of problems, or a generated task: {GENERATED}"
    )
    eval_data: str = setting("chain-12", "held-out problems, in the same forms")
    steps: int = setting(80, "gradient steps")
    prompts_per_step: int = setting(32, "problems per step")
    lr: Optional[float] = setting(
        None,
        "learning rate (default: 5e-4 for the embedded policy, 5e-5 with LoRA, 1e-6 for others)",
    )
    weight_decay: float = setting(0.01, "AdamW weight decay")
    grad_clip: float = setting(1.0, "largest norm of the gradient")
    seed: int = setting(0, "the run is a function of it")
    lora_rank: int = setting(
        0,
        "train adapters of this rank on all linear layers (the paper: 64; needs peft), 0: all weights",
    )
    grad_checkpointing: bool = setting(
        False, "recompute each layer in the backward: less memory, a third more compute"
    )
    engine: Literal["auto", "hf", "vllm"] = setting(
        "auto", "what samples: hf (transformers), vllm, auto: vllm where it constructs, else hf"
    )
    engine_memory: float = setting(0.5, "share of a GPU's memory that vLLM takes while sampling")
    tp: int = setting(1, "processes that share one vLLM engine, for models that do not fit one GPU")
    context: Optional[int] = setting(
        None, "longest sequence, prompt included, tokens (default: the model's)"
    )
    localizer: Optional[Literal["self", "random", "verifier", "oracle"]] = setting(
        None, "who finds the first wrong thought (default: self; random for rrpo)"
    )
    localize_fallback: Literal["random", "first", "skip"] = setting(
        "random", "reset index where the policy names none"
    )
    localize_temperature: float = setting(0.3, "sampling temperature of localization")
    localize_tokens: int = setting(4096, "longest localization answer, tokens")
    oracle_samples: int = setting(8, "continuations per prefix of --localizer oracle")
    oracle_tau: float = setting(
        0.1, "--localizer oracle resets before the first thought that loses more value than this"
    )
    seed_source: Literal["base", "fresh"] = setting(
        "base", "seeds are failures of the base group (which stay in it), or fresh draws"
    )
    seed_choice: Literal["first", "deepest"] = setting(
        "first", "which failures become seeds: the first (paper), or those with the largest h*"
    )
    max_seed_draws: int = setting(8, "fresh draws per prompt in search of a failure, at most")
    correct: float = setting(1.0, "rewards below this are failures")
    mask_prefix: bool = setting(
        True, "train suffix rollouts on their suffix only (false: ablation)"
    )
    length: Literal["trained", "response"] = setting(
        "trained",
        "a token weighs A / length: of the trained tokens (paper), or of the whole response",
    )
    clip: float = setting(0.0, "epsilon of the clipped surrogate (0: plain REINFORCE)")
    updates: int = setting(
        1, "gradient steps on each buffer (more than 1 is off-policy: use --clip)"
    )
    temperature: float = setting(1.0, "sampling temperature; log-probs are taken at it")
    top_p: float = setting(1.0, "nucleus sampling; below 1 the gradient is biased")
    max_thoughts: int = setting(20, "thoughts in a response, at most")
    max_tokens_per_thought: int = setting(256, "tokens in a thought, at most")
    micro_batch: int = setting(
        64, "rows per forward and process in training; does not change the gradient"
    )
    chunk: int = setting(
        4096, "tokens per call of the language-model head in training; does not change the gradient"
    )
    max_rows: int = setting(512, "rows that a process samples at once")
    eval_every: int = setting(20, "steps between evaluations (0: only before and after)")
    eval_problems: int = setting(256, "held-out problems that are used, at most")
    eval_samples: int = setting(2, "responses per held-out problem")
    save_every: int = setting(20, "steps between checkpoints; the last two are kept")
    rollouts_every: int = setting(
        10, "steps between those whose rollouts are written to rollouts.jsonl (0: none)"
    )
    out_dir: Optional[str] = setting(None, "run directory (default: a new one under runs/)")
    resume: Optional[str] = setting(None, "run directory to go on with; its settings are used")

    def resolve(self) -> "Config":
        """Fills in the defaults that depend on other settings. Raises UserError for settings that cannot work."""
        split = (8, 0, 0) if self.method == "grpo" else SPLITS[self.split]
        self.base, self.prefixes, self.suffixes = (
            given if given is not None else usual
            for given, usual in zip((self.base, self.prefixes, self.suffixes), split)
        )
        self.localizer = self.localizer or ("random" if self.method == "rrpo" else "self")
        if self.lr is None:
            self.lr = (
                5e-4
                if Path(self.model).resolve() == HERE / "data" / "policy"
                else 5e-5
                if self.lora_rank
                else 1e-6
            )
        positive = ("steps", "prompts_per_step", "max_thoughts", "max_tokens_per_thought", "micro_batch", "chunk", "max_rows", "updates",
                    "eval_problems", "eval_samples", "save_every", "localize_tokens", "oracle_samples", "tp")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in (
            "base",
            "prefixes",
            "suffixes",
            "max_seed_draws",
            "eval_every",
            "rollouts_every",
            "seed",
            "clip",
            "localize_temperature",
            "lora_rank",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative, not {getattr(self, name)}")
        if self.base + self.prefixes * self.suffixes < 2:
            raise UserError(
                "a prompt needs at least 2 trained rollouts; raise --base, or --prefixes and --suffixes"
            )
        if self.method == "rrpo" and self.localizer != "random":
            raise UserError(
                f"--method rrpo resets at random; use --method srpo with --localizer {self.localizer}"
            )
        if not self.temperature > 0:
            raise UserError(
                f"--temperature must be above 0, not {self.temperature}: greedy groups have no variance to learn from"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be in (0, 1], not {self.top_p}")
        if not 0 < self.engine_memory <= 1:
            raise UserError(f"--engine_memory must be in (0, 1], not {self.engine_memory}")
        if processes() % self.tp:
            raise UserError(
                f"--tp {self.tp} must divide the number of processes, {processes()}; start more with torchrun --nproc_per_node"
            )
        return self


# ------------------------------------------------------------------------------------------------------------------ training


def train(cfg: Config) -> dict:
    """Runs cfg.steps steps and returns {"before": pass rate, "after": pass rate, "out_dir": path}."""
    start_time, main = time.time(), rank() == 0
    train_problems = load_problems(cfg.train_data, seed=cfg.seed)
    eval_problems = load_problems(cfg.eval_data, seed=10**6 + cfg.seed)[
        : cfg.eval_problems
    ]  # generated: never the training problems
    if cfg.localizer == "verifier":
        check_localizer(cfg.localizer, train_problems, cfg.train_data)
    if cfg.top_p < 1 and main:
        print(
            f"warning: --top_p {cfg.top_p} samples from a truncated policy, but the gradient is the whole policy's: it is biased"
        )
    if any(p.kind == "code" for p in train_problems + eval_problems):
        isolated = sandbox_or_refusal()
        if main:
            print(isolated)
    device, sharded = connect()
    out_dir, resumed_from = on_main(find_run, cfg)
    model, tokenizer = load_policy(
        cfg.model, torch.bfloat16 if cfg.lora_rank and device.type == "cuda" else torch.float32
    )
    context = min(cfg.context or 10**9, model.config.get_text_config().max_position_embeddings)
    train_prompts = encode_all(tokenizer, train_problems, context, cfg.train_data)
    eval_prompts = encode_all(tokenizer, eval_problems, context, cfg.eval_data)
    n_parameters = sum(p.numel() for p in model.parameters())
    engine = make_engine(
        cfg.engine,
        cfg.model,
        model,
        tokenizer,
        context,
        cfg.max_rows,
        cfg.engine_memory,
        cfg.tp,
        device if sharded else None,
    )
    if cfg.clip and cfg.top_p < 1 and engine.name == "vllm":
        raise UserError(
            "--clip with --top_p below 1 needs log-probs of the whole policy, which vLLM does not give; use --engine hf or --top_p 1"
        )
    torch.manual_seed(cfg.seed)
    prepare(model, cfg, device, sharded)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=cfg.lr, weight_decay=cfg.weight_decay
    )
    first_step, total_tokens, before = 0, 0, None
    if resumed_from:
        first_step, total_tokens, before = load_checkpoint(resumed_from, model, optimizer)
        engine.sync(whole_weights(model))

    def task(problem, prompt_ids, step, slot):
        rng = np.random.default_rng(
            [cfg.seed, step, slot]
        )  # keyed, so that nothing depends on order, batches or restarts
        return Task(
            problem,
            prompt_ids,
            slot,
            cfg,
            engine.vocabulary,
            LOCALIZERS[cfg.localizer],
            rng,
            context,
        )

    def held_out():
        tasks = [
            task(p, ids, 0, slot) for slot, (p, ids) in enumerate(zip(eval_problems, eval_prompts))
        ]
        return evaluate(tasks, engine, cfg.eval_samples)["pass_rate"]

    after = on_main(
        open_run, cfg, out_dir, resumed_from
    )  # everything is checked: from here on files are written
    stop = StopRequest()
    if main:
        print(f"{cfg.method} {cfg.base} base + {cfg.prefixes} x {cfg.suffixes} | {n_parameters / 1e6:.2f} M parameters on "
              f"{processes()} x {device.type} | {len(train_problems)} problems from {cfg.train_data} | {out_dir}")  # fmt: skip
    if before is None:
        before = after = held_out()
        if main:
            append(
                out_dir / "metrics.jsonl", {"step": 0, "total_tokens": 0, "eval_pass_rate": before}
            )
            print(f"step 0: held-out pass rate {before:.3f}")
    starved, stopping = 0, False  # steps in a row without variance
    bar = tqdm(
        range(first_step, cfg.steps),
        initial=first_step,
        total=cfg.steps,
        desc=cfg.method,
        unit="step",
        dynamic_ncols=True,
        disable=not main,
    )
    for step in bar:
        clock = Clock()
        counters.clear()

        # sample and grade: every prompt runs its program, all of them together; each process its share
        chosen = data_order(len(train_problems), cfg.prompts_per_step, step, cfg.seed)
        tasks = [
            task(train_problems[i], train_prompts[i], step + 1, slot)
            for slot, i in enumerate(chosen)
        ]
        sampled = run_programs([PROGRAMS[cfg.method](t) for t in tasks], engine)
        buffers, generated, seconds = sampled.results, sampled.generated, sampled.seconds
        rollouts = [rollout for buffer in buffers for rollout in buffer]
        clock.seconds.update(seconds)
        clock.restart()

        # advantages, loss, one gradient step (each pass of --updates is one)
        set_advantages(rollouts)
        signal_there = any(r.advantage for r in rollouts)
        if signal_there:
            engine.sleep()
            for _ in range(cfg.updates):
                optimizer.zero_grad(set_to_none=True)
                sums = backward(
                    model,
                    rollouts,
                    len(rollouts),
                    tokenizer.pad_token_id,
                    cfg,
                    device,
                    rank(),
                    processes(),
                )
                grad_norm = whole(
                    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
                ).item()
                if not np.isfinite(grad_norm):
                    raise FloatingPointError(
                        f"the gradient of step {step + 1} is not finite; the last checkpoint is whole"
                    )
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            parts = gather(sums)
            sums = {
                key: (max if key == "gap_max" else sum)(part[key] for part in parts) for key in sums
            }
            clock.lap("train")
            engine.sync(whole_weights(model))
            clock.lap("sync")

        # log
        total_tokens += sum(r.generated for r in generated)
        line = {
            "step": step + 1,
            "total_tokens": total_tokens,
            **step_metrics(rollouts, generated, tasks),
        }
        if signal_there:
            n, in_prefix = sums["tokens"], sums["prefix_tokens"]
            line |= {"trained_tokens": int(n), "loss": sums["loss"], "entropy": sums["entropy"] / n, "grad_norm": grad_norm,
                     "gap": sums["gap"] / max(1, n - in_prefix), "gap_prefix": sums["gap_prefix"] / in_prefix if in_prefix else None,
                     "gap_max": sums["gap_max"]}  # fmt: skip
        else:
            counters["no_update"] += 1
            line |= {"trained_tokens": 0} | dict.fromkeys(
                ("loss", "entropy", "grad_norm", "gap", "gap_prefix", "gap_max")
            )
        starved = 0 if signal_there else starved + 1
        if main and starved and starved % 5 == 0:
            bar.write(
                f"warning: no group had variance for {starved} steps: all rewards are alike. Use easier problems or a better policy."
            )
        if main and step == first_step and cfg.prefixes and line["thoughts"] < 1.5:
            bar.write(
                f"warning: {line['thoughts']:.1f} thoughts a response: the policy hardly writes {DELIMITER}, so a reset starts over. See README, Your own model."
            )
        line |= {
            "counters": dict(counters),
            "seconds": {k: round(v, 4) for k, v in clock.seconds.items()},
        }
        if device.type == "cuda":
            line["gpu_gb"] = (
                torch.cuda.max_memory_allocated() / 1e9
            )  # of this process's trainer, at most so far
        if main and cfg.rollouts_every and step % cfg.rollouts_every == 0:
            write_rollouts(out_dir / "rollouts.jsonl", step + 1, rollouts, generated, tasks)

        # evaluate and save
        stopping = any(gather(stop.requested))
        last = step + 1 == cfg.steps or stopping
        if last or (cfg.eval_every and (step + 1) % cfg.eval_every == 0):
            line["eval_pass_rate"] = after = held_out()
            if main:
                bar.write(
                    f"step {step + 1}: held-out pass rate {after:.3f}, {total_tokens / 1e6:.2f} M tokens generated"
                )
        if main:
            append(out_dir / "metrics.jsonl", line)
            if "eval_pass_rate" in line:
                draw_curves(by_name([out_dir]), out_dir / "curve.png")
        if last or (step + 1) % cfg.save_every == 0:
            save_checkpoint(out_dir, step + 1, model, tokenizer, optimizer, total_tokens, before)
        bar.set_postfix_str(
            f"pass {line['pass_base'] if line['pass_base'] is not None else line['pass_suffix']:.2f}, {total_tokens / 1e6:.2f} M tokens"
        )
        if stopping:
            break
    bar.close()
    stop.restore()
    if main:
        if stopping:
            print(f"stopped after step {step + 1}; go on with: {command()} --resume {out_dir}")
        print(
            f"held-out pass rate {before:.3f} -> {after:.3f} in {total_tokens / 1e6:.2f} M generated tokens and {time.time() - start_time:.0f} s"
        )
        print(f"run directory: {out_dir}  (curve.png, metrics.jsonl, rollouts.jsonl, checkpoints/)")
    return {"before": before, "after": after, "out_dir": str(out_dir)}


def data_order(n_problems: int, per_step: int, step: int, seed: int) -> list[int]:
    """Problem positions of one step. Each epoch is a permutation that is a function of (seed, epoch)."""
    places = [
        divmod(position, n_problems) for position in range(step * per_step, (step + 1) * per_step)
    ]
    orders = {
        epoch: np.random.default_rng([seed, epoch, 7]).permutation(n_problems)
        for epoch, _ in places
    }
    return [int(orders[epoch][place]) for epoch, place in places]


def encode_all(tokenizer, problems, context: int, source: str) -> list[list[int]]:
    """Prompt ids of every problem. Raises UserError where one leaves no room for a response."""
    prompts = [encode_question(tokenizer, problem) for problem in problems]
    for problem, ids in zip(problems, prompts):
        if len(ids) >= context:
            raise UserError(
                f"{source}: the prompt of problem {problem.index} has {len(ids)} tokens, the model's context is {context}; remove it"
            )
    return prompts


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds = Counter()
        self.restart()

    def restart(self):
        self.at = time.perf_counter()

    def lap(self, phase: str):
        self.seconds[phase] += time.perf_counter() - self.at
        self.restart()


class StopRequest:
    """Ctrl-C or SIGTERM: the step in progress ends, is saved, and the run stops. A second Ctrl-C stops at once."""

    def __init__(self):
        self.requested = False
        self.before = {
            sign: signal.signal(sign, self.request) for sign in (signal.SIGINT, signal.SIGTERM)
        }

    def restore(self):
        for sign, handler in self.before.items():
            signal.signal(sign, handler)

    def request(self, *_):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if rank() == 0:
            print("\nstopping after this step (once more: at once)", file=sys.stderr)


# -------------------------------------------------------------------------------------------- processes, shards, adapters


def prepare(model, cfg: Config, device: torch.device, sharded: bool) -> None:
    """Makes the loaded model the one that is trained, in place: adapters, gradient checkpointing, shards (FSDP2: each layer, then the rest).

    Gradients of a sharded model are summed over processes, in float32: `token_weights` already hold 1/N of the whole step."""
    layers = [
        module
        for module in model.modules()
        if type(module).__name__ in (model._no_split_modules or ())
    ]
    if cfg.lora_rank:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UserError("--lora_rank needs the peft library: pip install peft")
        inject_adapter_in_model(
            LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear"),
            model,
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if cfg.grad_checkpointing:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if not sharded:
        return
    mesh = init_device_mesh(device.type, (processes(),))
    mixed = (
        dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if device.type == "cuda"
        else {}
    )
    for part in (*layers, model):  # moves it to the device, one part at a time
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(**mixed))
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    model.chosen_logps = MethodType(
        chosen_logps, model
    )  # bypasses model.forward, so that the head runs only where it must
    register_fsdp_forward_method(model, "chosen_logps")


# ------------------------------------------------------------------------------------------------------------------- metrics


def mean(values) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def step_metrics(rollouts: list[Rollout], generated: list[Rollout], tasks: list[Task]) -> dict:
    """The step line: everything that can be read from the records of one step. Rates are in [0, 1], None where there is nothing."""
    base = [r for r in rollouts if r.group[1] == 0]
    suffix = [r for r in rollouts if r.group[1] > 0]
    groups = grouped(rollouts).items()
    flat = lambda groups: mean(not any(r.advantage for r in members) for members in groups)  # noqa: E731
    resets = [members for (_, k), members in groups if k > 0]
    late = []  # h* - the true first wrong thought, for each of `resets`; measured where the task has a step checker, training never sees it
    for members in resets:
        truth = first_wrong(tasks[members[0].group[0]], members[0].seed)
        late.append(None if truth is None else members[0].reset - truth)
    tokens = Counter()
    for r in generated:
        tokens[r.purpose] += r.generated
    return {
        "pass_base": mean(r.reward for r in base),
        "pass_suffix": mean(r.reward for r in suffix),
        "zero_variance_base": flat(members for (_, k), members in groups if k == 0),
        "zero_variance_suffix": flat(members for (_, k), members in groups if k > 0),
        "pass_suffix_clean": mean(
            r.reward
            for members, d in zip(resets, late)
            if d is not None and d <= 0
            for r in members
        ),
        "pass_suffix_erroneous": mean(
            r.reward for members, d in zip(resets, late) if d is not None and d > 0 for r in members
        ),
        "reset_depth": mean(
            members[0].reset / len(members[0].seed.thought_ends) for members in resets
        ),  # h* / H
        "localized": dict(Counter(members[0].localized for members in resets)),
        "localized_exact": mean(d == 0 for d in late if d is not None),
        "localized_clean": mean(
            d <= 0 for d in late if d is not None
        ),  # no error is left in the shared prefix
        "tokens": {
            purpose: tokens[purpose]
            for purpose in ("base", "seed", "localization", "suffix", "oracle")
        },
        "verifier_calls": sum(r.reward is not None for r in generated),
        "masked_share": sum(r.prefix_len for r in rollouts)
        / sum(len(r.token_ids) for r in rollouts),
        "response_tokens": mean(len(r.token_ids) for r in rollouts),
        "thoughts": mean(len(r.thought_ends) for r in rollouts),
        "finish": dict(Counter(r.finish for r in rollouts)),
    }


def first_wrong(task: Task, rollout: Rollout) -> int | None:
    """1-based index of the true first wrong thought of a response; None where the task cannot tell, or none is wrong."""
    return (
        task.problem.check_steps(rollout.thoughts(task.vocabulary.tokenizer))
        if task.problem.check_steps
        else None
    )


def write_rollouts(
    path: Path, step: int, rollouts: list[Rollout], generated: list[Rollout], tasks: list[Task]
) -> None:
    """Every generated rollout of a step, one JSON line each; a suffix names its seed by `id`, a seed the localization
    answer it got. Trained ones have a group."""
    ids = {id(r): i for i, r in enumerate(generated)}
    tokenizer = tasks[0].vocabulary.tokenizer
    by_problem = {t.problem.index: t for t in tasks}
    with path.open("a", encoding="utf-8") as file:
        for i, r in enumerate(generated):
            task = by_problem[r.problem]
            record = {"step": step, "id": i, "problem": r.problem, "question": task.problem.question, "answer": task.problem.answer, "purpose": r.purpose,
                      "group": r.group, "reward": r.reward, "advantage": r.advantage, "finish": r.finish,
                      "thoughts": r.thoughts(tokenizer), "thought_ends": r.thought_ends, "prefix_len": r.prefix_len,
                      "first_wrong": first_wrong(task, r) if r.reward is not None else None,
                      "seed": ids[id(r.seed)] if r.seed else None, "reset": r.reset, "localized": r.localized,
                      "localization": ids[id(r.localization)] if r.localization else None}  # fmt: skip
            file.write(json.dumps(record) + "\n")


# ------------------------------------------------------------------------------------------------ run directory, checkpoints


# -------------------------------------------------------------------------------------------------------------- command line

MAY_CHANGE = {
    "steps",
    "resume",
    "eval_every",
    "save_every",
    "rollouts_every",
}  # on --resume: these do not change what is computed


def parse(argv: list[str]) -> Config:
    """Config from the command line; with --resume from the run's config.json, where other flags must agree with it."""
    parser = HfArgumentParser(
        Config, description="SRPO, RRPO and GRPO on one page. See README.md.", allow_abbrev=False
    )
    cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise UserError(f"unknown setting {unknown[0]}; see python srpo.py --help")
    if not cfg.resume:
        return cfg.resolve()
    try:
        saved = json.loads((Path(cfg.resume) / "config.json").read_text())
        resumed = Config(**{f.name: saved[f.name] for f in fields(Config)})
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as fault:
        raise UserError(
            f"--resume {cfg.resume}: no run of this program is there ({type(fault).__name__}: {fault})"
        )
    given = {
        arg.split("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")
        for arg in argv
        if arg.startswith("--")
    }
    for name in sorted(given):
        if name in MAY_CHANGE:
            setattr(resumed, name, getattr(cfg, name))
        elif getattr(cfg, name) != getattr(resumed, name):
            raise UserError(
                f"--resume {cfg.resume}: that run has {name} = {getattr(resumed, name)}, not {getattr(cfg, name)}; leave --{name} out"
            )
    return resumed.resolve()


def command() -> str:
    """How this program was started, for messages that say how to go on."""
    return (
        "python srpo.py"
        if processes() == 1
        else f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)} srpo.py"
    )


def main(argv: list[str]) -> None:
    """Trains; a UserError becomes one line on stderr and exit code 2."""
    try:
        train(parse(argv))
    except UserError as fault:
        if rank() > 0:
            time.sleep(
                5
            )  # where all processes fail alike, the first one's line is enough: torchrun ends the others meanwhile
        print(f"srpo.py: {fault}", file=sys.stderr)
        sys.exit(2)
    if (
        dist.is_initialized() and "vllm" not in sys.modules
    ):  # vLLM closes its groups, and ours, when the program ends
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
