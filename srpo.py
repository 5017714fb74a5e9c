"""SRPO: reset-based RL post-training for language-model reasoning. This file is the algorithm box.

"Credit Assignment with Resets in Language Model Reasoning" (arXiv 2605.25507). One training step,
for each of P prompts (1 to 5) and then for all of them (6, 7):

    1. base group     G rollouts i.i.d. from the prompt                         rollout.py
    2. seed           an incorrect rollout                                      rollout.py
    3. reset index    h*, its first wrong thought, named by the policy itself   localize.py
    4. suffix group   i.i.d. continuations of the thoughts before h*            rollout.py
    5. advantages     A = (r - mean) / std, inside each group                   loss.py
    6. loss           REINFORCE, mean over all rollouts, shared prefix masked   loss.py
    7. step           one on-policy AdamW step over the whole buffer            here

    python srpo.py                                     # the embedded policy, minutes on 2 CPU cores
    python srpo.py --method grpo --out_dir runs/grpo   # the baseline; rrpo: random resets
    python srpo.py --resume runs/grpo                  # a killed run, bit for bit on a CPU
    python srpo.py --model Qwen/Qwen2.5-0.5B-Instruct --train_data a.jsonl --eval_data b.jsonl
    torchrun --nproc_per_node=8 srpo.py --model ...    # the same run on 8 GPUs (or CPU processes)

With several processes, each process samples and grades its share of the prompts, receives all
rollouts, and trains on its share of the rows. Parameters, gradients and optimizer state are sharded
(FSDP2). Nothing in the algorithm depends on the number of processes.

Departures from the paper's settings: sampling at T = 1 and top_p = 1 (top_p below 1 biases the
gradient, and warns), and full fine-tuning unless --lora_rank is given.
Left out: separate GPUs for sampling, and sampling while training (it would be off-policy).
"""

import gc
import os
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Callable, ClassVar, Literal, Optional

# Before torch loads OpenMP: threads that wait for each other spin shortly, then sleep. By default
# they spin on, and where another program wants the same cores a step takes ten times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="2000")
if __name__ == "__main__":
    gc.disable()  # imports make half a million objects, and all stay; they take a fifth less time

import numpy as np
import torch
from tqdm import tqdm

from data import parallel, policies, runs
from data.curves import by_name, draw_curves
from data.driver import run_programs
from data.faults import UserError, counters
from data.metrics import Clock, Sums, Update, load_tracker, step_metrics, update_metrics
from data.parallel import gather, on_main, processes, rank, trained_weights
from data.problems import Problem
from data.programs import load_program, source_of, trained_rollouts
from data.settings import (
    Amount,
    Bounds,
    NotNegative,
    Positive,
    Share,
    Temperature,
    check_settings,
    given,
    read_command_line,
    setting,
)
from data.tasks import GENERATED, load_problems
from data.verifiers import DELIMITER, KINDS, check_machine
from eval import evaluate
from localize import LOCALIZERS, check_localizer
from loss import backward, body_and_head, set_advantages, weigh
from rollout import PROGRAMS, Engine, Rollout, Task, make_engine, records_of

# torch warns when a single process saves a checkpoint; that is intended here
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# ---------------------------------------------------------------------------------------- settings


@dataclass
class MethodSettings:
    _argument_group_name: ClassVar[str] = "method"  # its title in --help
    method: str = setting(
        "srpo",
        "srpo resets at the located error, rrpo at a random thought, grpo never; walk (ours) goes "
        "on to a success; MODULE:FUNCTION or FILE.py:FUNCTION is a program of your own",
    )
    split: Literal["1x4", "2x4", "1x8"] = setting(
        "1x4", "prefixes x suffixes of 8 trained rollouts per prompt; the rest is the base group"
    )
    base: Optional[NotNegative] = setting(
        None, "size of the base group; unset: by --split, 4 for walk, else 8"
    )
    prefixes: Optional[NotNegative] = setting(None, "reset states of a prompt; unset: by --split")
    suffixes: Optional[NotNegative] = setting(
        None, "continuations of a reset state; unset: by --split"
    )
    localizer: Optional[Literal["self", "random", "verifier", "oracle"]] = setting(
        None, "who finds the first wrong thought; unset: self, for rrpo random"
    )
    localize_fallback: Literal["random", "first", "skip"] = setting(
        "random", "h* where the policy names none; skip: that seed is not used"
    )
    localize_temperature: Amount = setting(0.3, "sampling temperature of localization")
    localize_tokens: Positive = setting(4096, "longest localization answer, tokens")
    oracle_samples: Positive = setting(8, "oracle: continuations of each prefix")
    oracle_tau: Annotated[float, Bounds(-1, 1)] = setting(
        0.1, "oracle: h* is the first thought to lose more value than this"
    )
    seed_source: Literal["base", "fresh"] = setting(
        "base", "seeds are failures of the base group, which stay in it, or fresh draws"
    )
    max_seed_draws: NotNegative = setting(
        8, "fresh draws for a prompt in search of a failure, at most"
    )
    rounds: Annotated[int, Bounds(0, 200)] = setting(
        12, "walk: resets of a prompt, at most; 0: none"
    )
    correct: Annotated[float, Bounds(0, 1)] = setting(1.0, "a reward below this is a failure")
    mask_prefix: bool = setting(True, "train suffix rollouts on their suffix only")
    length: Literal["trained", "response", "step"] = setting(
        "trained",
        "a token weighs A over its rollout's trained tokens (paper), its whole response, "
        "or all trained tokens of the step",
    )
    off_policy_shape: Amount = setting(
        0.0, "off-policy tokens weigh A p/(p + this), Critique-GRPO: 0.1; 0: A log p"
    )
    clip: Amount = setting(0.0, "epsilon of the clipped surrogate; 0: plain REINFORCE")
    updates: Positive = setting(
        1, "gradient steps on each buffer; above 1 is off-policy: use --clip"
    )


@dataclass
class DataSettings:
    _argument_group_name: ClassVar[str] = "data"
    model: str = setting("embedded", "folder or hub id of the policy; embedded: data/policy")
    train_data: str = setting("chain-12", f"JSON-lines file, or a generated task: {GENERATED}")
    eval_data: str = setting("chain-12", "held-out problems, in the same forms")
    seed: NotNegative = setting(0, "the run is a function of it")


@dataclass
class SamplingSettings:
    _argument_group_name: ClassVar[str] = "sampling"
    engine: Literal["auto", "hf", "vllm"] = setting(
        "auto",
        "what samples: hf is transformers; auto is vllm where it works, else hf, and "
        "--resume keeps what it found (another one: with --allow_changes true)",
    )
    engine_memory: Share = setting(0.5, "share of a GPU's memory that vLLM takes")
    tp: Positive = setting(1, "processes that share one vLLM, for models that do not fit one GPU")
    context: Optional[Positive] = setting(None, "longest sequence, tokens; unset: the model's")
    max_thoughts: Positive = setting(20, "thoughts in a response, at most")
    max_tokens_per_thought: Positive = setting(256, "tokens in a thought, at most")
    temperature: Temperature = setting(1.0, "sampling temperature; log-probs are taken at it")
    top_p: Share = setting(1.0, "nucleus sampling; below 1 the gradient is biased")
    max_rows: Positive = setting(512, "rows that a process samples at once")


@dataclass
class TrainingSettings:
    _argument_group_name: ClassVar[str] = "training"
    steps: Positive = setting(80, "training steps (one buffer each)")
    prompts_per_step: Positive = setting(32, "problems in a step")
    lr: Optional[Annotated[float, Bounds(0, 1)]] = setting(
        None, "learning rate; unset: 5e-4 for the embedded policy, 5e-5 with LoRA, else 1e-6"
    )
    weight_decay: Amount = setting(0.01, "AdamW weight decay")
    grad_clip: Annotated[float, Bounds(0, above=True)] = setting(
        1.0, "largest norm of the gradient"
    )
    lora_rank: NotNegative = setting(
        0, "rank of LoRA adapters (paper: 64; needs peft); 0: all weights"
    )
    dtype: Optional[Literal["float32", "bfloat16"]] = setting(
        None,
        "what training and sampling compute in, on float32 weights; unset: bfloat16 on GPUs, else "
        "float32",
    )
    grad_checkpointing: bool = setting(False, "less memory, a third more compute")
    micro_batch: Positive = setting(
        64, "rows in a forward of a process; the gradient stays the same"
    )
    chunk: NotNegative = setting(0, "tokens in a call of the head; 0: 256, on a GPU 4096")


@dataclass
class LoggingSettings:
    _argument_group_name: ClassVar[str] = "evaluating, logging and resuming"
    eval_every: NotNegative = setting(20, "steps between evaluations; 0: only before and after")
    eval_problems: Positive = setting(256, "held-out problems that are used, at most")
    eval_samples: Positive = setting(2, "responses to each held-out problem")
    save_every: Positive = setting(20, "steps between checkpoints; the last two are kept")
    rollouts_every: NotNegative = setting(
        10, "save rollouts of every n-th step, from the first; 0: none"
    )
    out_dir: Optional[str] = setting(None, "run directory; unset: a new one under runs/")
    resume: Optional[str] = setting(None, "run directory to go on with; its settings are used")
    allow_changes: bool = setting(
        False, "resume although settings (not method and split), problems or policy changed"
    )
    tracker: Optional[Literal["trackio", "wandb"]] = setting(
        None, "package that gets the step lines too; unset: none"
    )


GROUPS = (MethodSettings, DataSettings, SamplingSettings, TrainingSettings, LoggingSettings)
SPLITS = {"1x4": (4, 1, 4), "2x4": (0, 2, 4), "1x8": (0, 1, 8)}  # base, prefixes, suffixes
# Not in a run's name: method and split (it shows them), the seed, and what changes no step.
UNNAMED = (
    "method split seed steps out_dir resume engine engine_memory tp grad_checkpointing micro_batch "
    "chunk max_rows eval_every save_every rollouts_every allow_changes tracker"
).split()

# On --resume these may change: what a step computes stays the same, up to rounding.
MAY_CHANGE = (
    "steps resume eval_every save_every rollouts_every "
    "micro_batch chunk max_rows engine_memory tp grad_checkpointing allow_changes tracker"
).split()


@dataclass  # which reads the bases from the last one to the first
class Config(LoggingSettings, TrainingSettings, SamplingSettings, DataSettings, MethodSettings):
    """Every setting of a run. `python srpo.py --help` prints them."""

    def resolve(self) -> "Config":
        """Fills in the defaults that depend on other settings, and checks all of them."""
        if Path(policies.policy_source(self.model)).resolve() == policies.EMBEDDED:
            self.model = "embedded"
        has_split = self.method in ("srpo", "rrpo")
        base, prefixes, suffixes = SPLITS[self.split] if has_split else (8, 0, 0)
        if self.method == "walk":
            base = 4  # and 4 more where their rewards differ
        self.base = base if self.base is None else self.base
        self.prefixes = prefixes if self.prefixes is None else self.prefixes
        self.suffixes = suffixes if self.suffixes is None else self.suffixes
        if self.localizer is None:
            self.localizer = "random" if self.method == "rrpo" else "self"
        if self.lr is None:
            self.lr = self.usual_lr()
        if self.dtype is None:
            self.dtype = parallel.usual_dtype()
        self.check()
        return self

    def usual_lr(self) -> float:
        if self.model == "embedded":
            return 5e-4
        return 5e-5 if self.lora_rank else 1e-6

    def check(self) -> None:
        """Raises UserError for settings that cannot work."""
        check_settings(self)
        self.check_groups()
        self.check_resets()
        if 0 < self.localize_temperature < 0.01:
            raise UserError("--localize_temperature must be 0 (greedy) or at least 0.01")
        if processes() % self.tp:
            raise UserError(
                f"--tp {self.tp} must divide the number of processes, {processes()}; "
                "start more with torchrun --nproc_per_node"
            )

    def check_groups(self) -> None:
        """The sizes of groups must fit the method."""
        if self.method in ("grpo", "walk") and (self.prefixes or self.suffixes):
            raise UserError(
                f"--method {self.method} has no suffix groups; "
                "leave --prefixes and --suffixes out, or use srpo"
            )
        if self.method not in ("srpo", "rrpo") and self.split != "1x4":
            raise UserError(
                f"--split is of srpo and rrpo; give --method {self.method} what it reads of "
                "--base, --prefixes and --suffixes"
            )
        if self.prefixes and self.suffixes < 2:
            raise UserError(f"--suffixes must be at least 2, not {self.suffixes}: it is a group")
        # A walk adds the second rollout of a group.
        fewest = 1 if self.method == "walk" and self.rounds else 2
        if self.base + self.prefixes * self.suffixes < fewest:
            raise UserError(
                f"a prompt needs at least {fewest} trained rollouts; raise --base or --prefixes"
            )

    def check_resets(self) -> None:
        """A method that resets needs seeds, and its localizer."""
        if self.method == "grpo" and self.localizer != "self":
            raise UserError("--method grpo never resets; leave --localizer out, or use srpo")
        if self.method == "rrpo" and self.localizer != "random":
            raise UserError(
                "--method rrpo resets at random; "
                f"use --method srpo with --localizer {self.localizer}"
            )
        draws_seeds = self.method in ("srpo", "rrpo") and self.prefixes
        only_fresh = not self.base or self.seed_source == "fresh"
        if draws_seeds and only_fresh and not self.max_seed_draws:
            raise UserError("--max_seed_draws 0: then there is no seed; raise it")

    def name(self) -> str:
        """The method, and every unusual setting that its steps depend on: `srpo 1x4 clip=0.2`."""
        parts = [self.method]
        usual = Config(method=self.method, split=self.split).resolve()
        usual.lr = self.usual_lr()  # the default for this model and this lora_rank
        if self.prefixes:
            split = f"{self.prefixes}x{self.suffixes}"
            parts.append(split)
            usual.prefixes, usual.suffixes = self.prefixes, self.suffixes  # named by now
            if split in SPLITS and self.method in ("srpo", "rrpo"):
                usual.base, _, _ = SPLITS[split]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in UNNAMED and value != getattr(usual, f.name):
                parts.append(f"{f.name}={value}")
        return " ".join(parts)


# ---------------------------------------------------------------------------------------- training


def train(cfg: Config) -> dict:
    """Runs cfg.steps steps. Returns {"before": pass rate, "after": pass rate, "out_dir": path}."""
    start_time = time.time()
    run = set_up(cfg)
    stopping = False
    bar = progress_bar(run)
    for step in bar:
        clock = Clock()
        counters.clear()

        # 1 to 4. Base group, seed, reset index h*, suffix group: the programs of all prompts sample
        # together, each process its share, and the verifier grades.
        tasks = tasks_of_step(run, step)
        sampled = run_programs([run.program(task) for task in tasks], run.engine)
        rollouts = trained_rollouts(cfg.method, sampled)
        clock.add(sampled.seconds)

        # 5. Advantages, inside each group.
        set_advantages(rollouts)

        # 6 and 7. The masked loss, and one gradient step (each pass of --updates is one).
        update = update_policy(run, rollouts, clock)

        run.progress.step = step + 1
        run.progress.total_tokens += sum(rollout.generated for rollout in sampled.generated)
        line = {"step": step + 1, "total_tokens": run.progress.total_tokens}
        line |= step_metrics(rollouts, sampled.generated, tasks)
        line |= update_metrics(update)
        line["counters"] = dict(counters)
        line |= clock.metrics()
        if cfg.rollouts_every and step % cfg.rollouts_every == 0 and rank() == 0:
            records = records_of(step + 1, sampled.generated, tasks)
            runs.append(run.out_dir / "rollouts.jsonl", records)
        stopping = any(gather(run.stop.requested))
        evaluate_log_and_save(run, bar, line, last=stopping or step + 1 == cfg.steps)
        if stopping:
            break
    bar.close()
    run.stop.restore()
    print_result(run, stopping, time.time() - start_time)
    close(run)
    return {"before": run.progress.before, "after": run.after, "out_dir": str(run.out_dir)}


def progress_bar(run: "Training") -> tqdm:
    return tqdm(
        range(run.progress.step, run.cfg.steps),
        initial=run.progress.step,
        total=run.cfg.steps,
        desc=run.cfg.method,
        unit="step",
        dynamic_ncols=True,
        disable=rank() > 0,
    )


def tasks_of_step(run: "Training", step: int) -> list[Task]:
    """The tasks of one step: one for each of its prompts."""
    n = run.cfg.prompts_per_step
    tasks = []
    for slot in range(n):
        place = data_order(len(run.train_set.problems), step * n + slot, run.cfg.seed)
        tasks.append(run.train_set.task(run, place, step + 1, slot))
    return tasks


def data_order(n_problems: int, position: int, run_seed: int) -> int:
    """The problem at a position of the endless stream: a new permutation for each epoch."""
    epoch, place = divmod(position, n_problems)
    return int(permutation(n_problems, run_seed, epoch)[place])


@lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def permutation(n_problems: int, run_seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([run_seed, epoch, 7]).permutation(n_problems)


def update_policy(run: "Training", rollouts: list[Rollout], clock: "Clock") -> Update | None:
    """Paper steps 6 and 7, and the new weights to the engine. None: all groups are flat."""
    cfg = run.cfg
    # Only rollouts with some weight are run. A fork with an entropy bonus or a KL term keeps all.
    items = [item for item in weigh(rollouts, cfg) if any(item.weights)]
    if not items:
        counters["no_update"] += 1
        return None
    run.engine.sleep()
    for _ in range(cfg.updates):  # the step line reports the last one
        run.optimizer.zero_grad(set_to_none=True)
        pad_id = run.tokenizer.pad_token_id
        my_sums = backward(run.model, items, pad_id, cfg, run.device, rank(), processes())
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip)
        grad_norm = parallel.whole(norm).item()
        if not np.isfinite(grad_norm):
            raise UserError(
                f"the gradient of step {run.progress.step + 1} is not finite; the last checkpoint "
                "is from before that: start from there with a smaller --lr"
            )
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    sums = Sums()
    for part in gather(my_sums):
        sums.add(part)
    clock.lap("train")
    run.engine.sync(trained_weights(run.model))
    clock.lap("sync")
    return Update(sums, grad_norm)


def held_out(run: "Training") -> dict:
    """Pass rate on held-out problems, and the faults on the way, for the step line.

    At training's temperature. Always as step 0: all evaluations use the same random numbers.
    """
    counters.clear()
    tasks = [run.eval_set.task(run, i, 0, i) for i in range(len(run.eval_set.problems))]
    run.after = evaluate(tasks, run.engine, run.cfg.eval_samples).pass_rate
    return {"eval_pass_rate": run.after, "eval_counters": dict(counters)}


# ------------------------------------------------------------------------------------------ set-up


@dataclass
class ProblemSet:
    """Problems and their prompts."""

    problems: list[Problem]
    prompts: list[list[int]]

    def task(self, run: "Training", place: int, step: int, slot: int) -> Task:
        """The task of the problem at `place`. (seed, step, slot) alone fix its random numbers."""
        return Task(
            problem=self.problems[place],
            prompt_ids=self.prompts[place],
            slot=slot,
            cfg=run.cfg,
            vocabulary=run.engine.vocabulary,
            localize=LOCALIZERS[run.cfg.localizer],
            rng=np.random.default_rng([run.cfg.seed, step, slot]),
            context=run.context,
        )


@dataclass
class Training:
    """The parts of a run, and where it is."""

    cfg: Config
    program: Callable  # the method: Task -> generator, see rollout.py
    device: torch.device
    model: torch.nn.Module
    tokenizer: object
    engine: Engine
    optimizer: torch.optim.Optimizer
    context: int  # longest sequence, tokens
    train_set: ProblemSet
    eval_set: ProblemSet
    out_dir: Path
    origin: runs.Origin  # what --resume compares
    tracker: ModuleType | None  # of --tracker; on rank 0
    progress: runs.Progress = field(default_factory=runs.Progress)
    stop: parallel.StopRequest = field(default_factory=parallel.StopRequest)  # listens from now on
    after: float | None = None  # the last held-out pass rate
    flat_steps: int = 0  # steps in a row whose groups were all flat: no variance, no update


def set_up(cfg: Config) -> Training:
    """Loads everything, checks everything, and only then writes to the run directory."""
    program = load_program(cfg.method)
    train_problems, eval_problems = load_data(cfg)
    tracker = load_tracker(cfg.tracker) if rank() == 0 else None
    device, sharded = parallel.connect(cfg.dtype)
    out_dir = Path(cfg.resume or cfg.out_dir or on_main(new_out_dir, cfg))
    last_checkpoint = None
    if cfg.resume:
        last_checkpoint = on_main(runs.reopen, out_dir, cfg.steps)
    else:
        on_main(runs.check_new, out_dir)
    dtype = getattr(torch, cfg.dtype)
    # A LoRA base is not trained: it needs no float32 weights.
    model, tokenizer = policies.load_policy(cfg.model, dtype if cfg.lora_rank else torch.float32)
    policies.check_head(model, cfg.model)
    policies.check_saving(model, tokenizer, cfg.model)
    context = context_of(cfg, model)
    train_prompts = policies.encode_all(tokenizer, train_problems, context, cfg.train_data)
    eval_prompts = policies.encode_all(tokenizer, eval_problems, context, cfg.eval_data)
    policy = policies.fingerprint(model, tokenizer)
    if cfg.lora_rank:  # a checkpoint then lacks the base
        policy["base weights"] = policies.digest_of_weights(model)
    origin = origin_of(cfg, program, policy, train_problems, eval_problems)
    if last_checkpoint:
        on_main(runs.check_origin, last_checkpoint, origin, cfg.allow_changes)
    n_parameters = sum(p.numel() for p in model.parameters())
    adapt(model, cfg)  # before the engine, which may keep a copy
    engine = open_engine(cfg, model, tokenizer, context, device if sharded else None, dtype)
    cfg.engine = engine.name  # auto: --resume must find the same one
    prepare(model, cfg, device, sharded)
    trained = [p for p in model.parameters() if p.requires_grad]
    run = Training(
        cfg=cfg,
        program=program,
        device=device,
        model=model,
        tokenizer=tokenizer,
        engine=engine,
        optimizer=new_optimizer(trained, cfg),
        context=context,
        train_set=ProblemSet(train_problems, train_prompts),
        eval_set=ProblemSet(eval_problems, eval_prompts),
        out_dir=out_dir,
        origin=origin,
        tracker=tracker,
    )
    begin(run, last_checkpoint, n_parameters)
    return run


def context_of(cfg: Config, model) -> int:
    """Tokens of the longest sequence of a run. Raises UserError where the model takes fewer."""
    longest = policies.longest_sequence(model, cfg.model)
    if cfg.context and cfg.context > longest:
        raise UserError(f"--context {cfg.context}: the model takes {longest} tokens at most")
    return cfg.context or longest


def new_optimizer(parameters: list[torch.nn.Parameter], cfg: Config) -> torch.optim.Optimizer:
    """AdamW with its moments at zero.

    torch makes them at the first update. A checkpoint that comes earlier has to make them by an
    update of zeros, which AdamW counts: the first real one would then be a quarter smaller.
    """
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def open_engine(cfg: Config, model, tokenizer, context: int, copy_device, dtype) -> Engine:
    """The engine of --engine. copy_device: where it keeps a copy of the model; None: no copy."""
    settings = dict(max_rows=cfg.max_rows, memory=cfg.engine_memory, tp=cfg.tp)
    settings |= dict(device=copy_device, dtype=dtype, lora_rank=cfg.lora_rank)
    engine = make_engine(cfg.engine, cfg.model, model, tokenizer, context, **settings)
    if cfg.clip and cfg.top_p < 1 and engine.name == "vllm":
        raise UserError(
            "--clip with --top_p below 1 needs log-probs of the whole policy, which vLLM does not "
            "give; use --engine hf or --top_p 1"
        )
    return engine


def load_data(cfg: Config) -> tuple[list[Problem], list[Problem]]:
    """(training problems, held-out problems). Raises UserError where the run cannot use them."""
    train_problems = load_problems(cfg.train_data, seed=cfg.seed)
    # Another seed: another draw. What both draws share is counted below.
    n = cfg.eval_problems
    eval_problems = load_problems(cfg.eval_data, seed=10**6 + cfg.seed, n=n)[:n]
    check_localizer(cfg.localizer, train_problems, cfg.train_data)
    isolation = check_machine(train_problems + eval_problems)
    if rank() == 0:
        if cfg.top_p < 1:
            print("warning: --top_p below 1 biases the gradient, which is the whole policy's")
        questions = {problem.question for problem in train_problems}
        shared = sum(problem.question in questions for problem in eval_problems)
        if shared:
            print(f"warning: {shared} of {len(eval_problems)} held-out problems are trained on")
        guessable = [p.kind for p in train_problems if KINDS[p.kind].can_be_guessed]
        if guessable and cfg.method in ("srpo", "rrpo", "walk"):
            print(
                f"warning: {len(guessable)} of {len(train_problems)} training problems can be "
                f"guessed ({', '.join(sorted(set(guessable)))}): resets may be rewarded for luck"
            )
        if isolation:
            print(isolation)
    return train_problems, eval_problems


def origin_of(
    cfg: Config, program: Callable, policy: dict, train_problems, eval_problems
) -> runs.Origin:
    """What the run is a function of. policy: policies.fingerprint of it."""
    fixed = {key: value for key, value in asdict(cfg).items() if key not in MAY_CHANGE}
    del fixed["out_dir"]
    del fixed["engine"]  # what auto found; config.json keeps it
    inputs = dict(policy)
    if cfg.method not in PROGRAMS:
        inputs["file of --method"] = source_of(program)
    inputs["training problems"] = [(p.question, p.answer, p.kind, p.tests) for p in train_problems]
    inputs["held-out problems"] = [(p.question, p.answer, p.kind, p.tests) for p in eval_problems]
    return runs.Origin(fixed, {name: runs.digest_of(inputs[name]) for name in inputs})


def new_out_dir(cfg: Config) -> str:
    method = re.sub(r"[^\w.-]+", "-", cfg.method).strip("-")
    resets = f"-{cfg.prefixes}x{cfg.suffixes}" if cfg.prefixes else ""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return str(runs.ROOT / "runs" / f"{method}{resets}-seed{cfg.seed}-{stamp}")


def adapt(model, cfg: Config) -> None:
    """Adds the adapters of --lora_rank to the loaded model, in place."""
    torch.manual_seed(cfg.seed)  # they start at random
    if cfg.lora_rank:
        policies.add_adapters(model, cfg.lora_rank)


def prepare(model, cfg: Config, device: torch.device, sharded: bool) -> None:
    """Makes the model ready for training, in place: checkpointing, shards."""
    if cfg.grad_checkpointing:
        policies.checkpoint_layers(model)
    if sharded:
        dtype = getattr(torch, cfg.dtype)
        parallel.shard(model, policies.layers_of(model), device, dtype, body_and_head)


def begin(run: Training, last_checkpoint: Path | None, n_parameters: int) -> None:
    """Writes config.json (or loads the last checkpoint), prints the header, measures the policy."""
    cfg = run.cfg
    settings = {"name": cfg.name()} | asdict(cfg) | {"resume": None, "allow_changes": False}
    if last_checkpoint:
        run.progress = runs.load_checkpoint(last_checkpoint, run.model, run.optimizer)
        for group in run.optimizer.param_groups:  # the settings', if --allow_changes changed them
            group |= {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
        run.engine.sync(trained_weights(run.model))
    if cfg.resume:
        if rank() == 0 and run.progress.step >= cfg.steps:
            print(f"all {cfg.steps} steps are done; --steps with a larger number goes on")
        run.after = on_main(runs.rewind, run.out_dir, last_checkpoint)
        on_main(runs.remember, run.out_dir, settings)
    else:
        on_main(runs.start, run.out_dir, settings)
    if run.tracker:
        run.tracker.init(project="srpo", name=run.out_dir.name, config=settings, resume="allow")
    if rank() == 0:
        print(
            f"{cfg.name()} | {n_parameters / 1e6:.2f} M parameters on {processes()} x "
            f"{run.device.type} | {len(run.train_set.problems)} problems from {cfg.train_data} | "
            f"{run.out_dir}"
        )
    if run.progress.before is None:
        line = {"step": 0, "total_tokens": 0} | held_out(run)
        run.progress.before = run.after
        if rank() == 0:
            runs.append(run.out_dir / "metrics.jsonl", [line])
            if run.tracker:
                run.tracker.log(line, step=0)
            print(f"step 0: held-out pass rate {run.after:.3f}")


# -------------------------------------------------------------------------------- the end of a step


def evaluate_log_and_save(run: Training, bar: tqdm, line: dict, last: bool) -> None:
    """Ends a step. last: it is the last one of this run, and is always evaluated and saved."""
    cfg, step = run.cfg, run.progress.step
    warn(run, bar, line)
    tokens = f"{run.progress.total_tokens / 1e6:.2f} M tokens"
    evaluated = last or (cfg.eval_every and step % cfg.eval_every == 0)
    if evaluated:
        line |= held_out(run)
        say(bar, f"step {step}: held-out pass rate {run.after:.3f}, {tokens} generated")
    if rank() == 0:
        runs.append(run.out_dir / "metrics.jsonl", [line])
        if run.tracker:
            run.tracker.log({key: line[key] for key in line if line[key] is not None}, step=step)
        if evaluated:
            with runs.writing(run.out_dir / "curve.png"):
                draw_curves(by_name([run.out_dir]), run.out_dir / "curve.png")
    if last or step % cfg.save_every == 0:
        parts = run.model, run.tokenizer, run.optimizer
        runs.save_checkpoint(run.out_dir, run.progress, run.origin, *parts)
    rate = line["pass_suffix"] if line["pass_base"] is None else line["pass_base"]
    passed = "" if rate is None else f"pass {rate:.2f}, "
    bar.set_postfix_str(passed + tokens)


def say(bar: tqdm, text: str) -> None:
    """Prints above the progress bar, on rank 0."""
    if rank() == 0:
        bar.write(text)


def warn(run: Training, bar: tqdm, line: dict) -> None:
    """Prints a warning if something keeps the run from learning."""
    run.flat_steps = 0 if line["trained_tokens"] else run.flat_steps + 1
    if run.flat_steps and run.flat_steps % 5 == 0:
        text = "warning: no group had variance for {} steps: all rewards are alike. {}"
        advice = "Use easier problems or a better policy."
        if run.cfg.method != "walk":
            advice = "Use easier problems, a better policy, or --method walk."
        say(bar, text.format(run.flat_steps, advice))
    if line["step"] == 1 and run.cfg.method != "grpo" and line["thoughts"] < 1.5:
        text = "warning: {:.1f} thoughts a response: the policy hardly writes {}, {}"
        advice = "so a reset starts over. See README, Your own model."
        say(bar, text.format(line["thoughts"], DELIMITER, advice))


def print_result(run: Training, stopped: bool, seconds: float) -> None:
    if rank() > 0:
        return
    progress = run.progress
    if stopped:
        print(f"stopped after step {progress.step}; go on with: {command()} --resume {run.out_dir}")
    since = " since this resume" if run.cfg.resume else ""
    print(
        f"held-out pass rate {progress.before:.3f} -> {run.after:.3f} in "
        f"{progress.total_tokens / 1e6:.2f} M generated tokens and {seconds:.0f} s{since}"
    )
    print(f"run directory: {run.out_dir}  (curve.png, metrics.jsonl, rollouts.jsonl, checkpoints/)")


def close(run: Training) -> None:
    if run.tracker:
        run.tracker.finish()
    if rank() == 0:
        runs.leave(run.out_dir)


# ------------------------------------------------------------------------------------- command line


def parse(argv: list[str]) -> Config:
    """Config from the command line. With --resume it is the saved one; other flags must agree."""
    about = "Trains a policy with SRPO, RRPO or GRPO. See README.md."
    cfg = Config(**read_command_line(GROUPS, about, argv))
    if not cfg.resume:
        return cfg.resolve()
    resumed = saved_config(Path(cfg.resume))
    for name in sorted(given(argv)):
        if name in ("method", "split"):
            check_same(cfg, resumed, name)
        if name in MAY_CHANGE or cfg.allow_changes:
            setattr(resumed, name, getattr(cfg, name))
        elif getattr(cfg, name) != getattr(resumed, name):
            raise UserError(
                f"--resume {cfg.resume}: that run has {name} = {getattr(resumed, name)}, "
                f"not {getattr(cfg, name)}; leave --{name} out, or add --allow_changes true"
            )
    return resumed.resolve()


def check_same(cfg: Config, resumed: Config, name: str) -> None:
    """Raises UserError where method or split changed: the saved run has its group sizes by them.

    A program of one's own may have moved to another file.
    """
    then, now = getattr(resumed, name), getattr(cfg, name)
    moved = name == "method" and then not in PROGRAMS and now not in PROGRAMS
    if then != now and not moved:
        raise UserError(f"--resume {cfg.resume}: --{name} cannot change; start a new run")


def saved_config(out_dir: Path) -> Config:
    """The settings of a saved run. Settings that it lacks get their defaults; a line names them."""
    saved = runs.read_settings(out_dir)
    known = {f.name: saved[f.name] for f in fields(Config) if f.name in saved}
    saved_cfg = Config(**known)
    check_settings(saved_cfg, f"{out_dir}/config.json: ")
    missing = [f.name for f in fields(Config) if f.name not in saved]
    if missing and rank() == 0:
        print(f"--resume {out_dir}: an older run; it gets the default of {', '.join(missing)}")
    return saved_cfg


def command() -> str:
    """How this program was started, for messages that say how to go on."""
    if processes() == 1:
        return "python srpo.py"
    return f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)} srpo.py"


def main(argv: list[str]) -> None:
    """Trains; a UserError becomes one line on stderr and exit code 2."""
    try:
        train(parse(argv))
    except UserError as fault:
        if rank() > 0:
            # The others wait: torchrun usually ends them before they print the same line.
            time.sleep(30)
        print(f"srpo.py: {fault}", file=sys.stderr)
        sys.exit(2)
    parallel.end_program()


if __name__ == "__main__":
    gc.freeze()  # later collections pass over what the imports made
    gc.enable()
    main(sys.argv[1:])
