"""Checks on one GPU, in ten minutes, what a CPU cannot show. Prints one table.

    shards       a group of one process (NCCL); the gradient of bf16 shards beside float32's
    engine       the transformers engine on the device: its log-probs beside the trainer's
    run          srpo.py, killed and resumed: the same bytes? And its seconds by phase
    train-0.5B   a training step of Qwen2.5's shape with random weights at the paper's lengths:
    train-1.5B   peak memory beside the table of tests/README.md, and utilisation
    vllm         vLLM's sleep, wake-up and new weights, where it is installed
    vllm-lora    the same with adapters, where peft is installed, too

    bash tests/gpu.sh                         # all; makes sure of the environment first
    bash tests/gpu.sh --only run engine
    bash tests/gpu.sh --patience 4            # a slow or busy machine: four times all limits

Each check is a process of its own with a time limit. One that fails does not stop the others; the
exit code is 1 if any failed. Without a GPU the same checks run on the CPU with small shapes, and
the table says what that leaves open. Everything is written to --out (runs/gpu): the table, and each
check's output.

Left out: more than one GPU, and 7B.

Try it alone:  python -m tests.gpu --only shards --out /tmp/gpu
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python tests/gpu.py`

from data.driver import run_programs  # noqa: E402
from data.metrics import Clock, update_metrics  # noqa: E402
from data.parallel import connect, shard, whole  # noqa: E402
from data.policies import layers_of, load_policy  # noqa: E402
from data.programs import trained_rollouts  # noqa: E402
from data.tasks import load_problems  # noqa: E402
from loss import backward, body_and_head, collate, set_advantages, weigh  # noqa: E402
from rollout import HFEngine, Rollout, grpo, make_tasks  # noqa: E402
from srpo import Config, parse, prepare, set_up, tasks_of_step, update_policy  # noqa: E402
from tests.speed import Span, multiply, operations  # noqa: E402

CUDA = torch.cuda.is_available()

# ----------------------------------------------------------------------------------------- a report


class NotDone(Exception):
    """A check cannot run here; says why."""


class Report:
    """What a check found: lines of a file, so that a check that is stopped has told its part."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, what: str, found: str, expected: str = "") -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([what, found, expected]) + "\n")

    def lines(self) -> list[list[str]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def require(fine: bool, what: str) -> None:
    if not fine:
        raise SystemExit(what)


# ----------------------------------------------------------------------------------- shards, engine


def random_rollouts(vocabulary: int, groups: int, prompt: int, length: int) -> list[Rollout]:
    """Groups of 4 rows of random tokens, one of which is right. prompt, length: tokens."""
    torch.manual_seed(0)
    rollouts = []
    for slot in range(groups):
        prompt_ids = torch.randint(vocabulary, (prompt,)).tolist()
        for i in range(4):
            ids = torch.randint(vocabulary, (length,)).tolist()
            rollout = Rollout(slot, "base", prompt_ids, ids, [0.0] * length, [length], "length")
            rollout.reward, rollout.group = float(i == 0), (slot, 0)
            rollouts.append(rollout)
    set_advantages(rollouts)
    return rollouts


def check_shards(report: Report, out: Path) -> None:
    device, _ = connect("bfloat16")
    ones = torch.ones(1000, device=device)
    dist.all_reduce(ones)
    require(bool((ones == 1).all()), "a sum over one process is not its own part")
    report.add("collectives of one process", dist.get_backend_config())
    model, tokenizer = load_policy("embedded")
    model.to(device)
    cfg = Config().resolve()
    items = weigh(random_rollouts(len(tokenizer), groups=6, prompt=28, length=72), cfg)
    backward(model, items, tokenizer.pad_token_id, cfg, device)
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    model, _ = load_policy("embedded")
    shard(model, layers_of(model), device, torch.bfloat16, body_and_head)
    backward(model, items, tokenizer.pad_token_id, cfg, device)
    worst = 0.0
    for name, p in model.named_parameters():
        require(p.dtype == p.grad.dtype == torch.float32, f"{name} is not float32")
        difference = (whole(p.grad) - exact[name]).norm() / exact[name].norm()
        worst = max(worst, difference.item())
    what = "gradient of shards computed in bf16, beside float32 whole"
    report.add(what, f"off by {worst:.2g} of its norm, at worst", "at most 0.15")
    require(worst < 0.15, f"the gradient of shards is off by {worst:.1%}")
    dist.destroy_process_group()


GAP = 0.1  # nats on average: bf16 beside float32


def check_engine(report: Report, out: Path) -> None:
    device = torch.device("cuda" if CUDA else "cpu")
    model, tokenizer = load_policy("embedded")
    engine = HFEngine(model, tokenizer, device=device, dtype=torch.bfloat16)
    model.to(device)
    report.add("engine's copy", f"{engine.model.dtype} on {engine.model.device}")
    problems = load_problems("chain-12", seed=1)[: 32 if CUDA else 8]
    tasks = make_tasks(problems, engine, context=384, base=8)
    for weights in ("first", "changed"):
        start = time.perf_counter()
        sampled = run_programs([grpo(task) for task in tasks], engine)
        seconds = time.perf_counter() - start
        tokens = sum(rollout.generated for rollout in sampled.generated)
        gap = gap_to_trainer(model, sampled.generated, tokenizer.pad_token_id)
        report.add(f"{weights} weights: sampled", f"{tokens} tokens, {tokens / seconds:.0f} a s")
        what = f"{weights} weights: sampler's log-probs beside the trainer's in float32"
        report.add(what, f"{gap:.2g} nats on average", f"at most {GAP}")
        require(gap <= GAP, f"the sampler's log-probs are off by {gap:.2g} nats")
        with torch.no_grad():  # what an optimizer step would do
            for parameter in model.parameters():
                parameter.mul_(1.02)
        engine.sync(model.named_parameters())


def gap_to_trainer(model, rollouts: list[Rollout], pad_id: int) -> float:
    """The mean difference between the sampler's and the trainer's log-probs, nats."""
    for rollout in rollouts:
        rollout.advantages = [1.0] * len(rollout.thought_ends)
    cfg = Config().resolve()
    batch = collate(weigh(rollouts, cfg), pad_id).to(model.device)
    _, scored = body_and_head(model, batch, cfg)
    return (scored.logps - batch.chosen.old_logps).abs().mean().item()


# --------------------------------------------------------------------------------------- a real run

RUN = (
    "--engine hf --steps 4 --save_every 2 --eval_every 0 --eval_problems 16 "
    "--train_data chain-4 --eval_data chain-4 --prompts_per_step 16 --rollouts_every 1"
)


def check_run(report: Report, out: Path) -> None:
    whole_run, killed = out / "whole", out / "killed"
    command = [sys.executable, "srpo.py", *RUN.split(), "--out_dir"]
    subprocess.run([*command, whole_run], cwd=ROOT, check=True)
    process = subprocess.Popen([*command, killed], cwd=ROOT)
    while process.poll() is None and len(step_lines(killed)) < 3:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = [line["step"] for line in step_lines(killed)]
    report.add("killed after step", str(done[-1]), "3 or 4: polling is late")
    subprocess.run([sys.executable, "srpo.py", "--resume", killed], cwd=ROOT, check=True)
    lines, resumed = step_lines(whole_run), step_lines(killed)
    steps = [line["step"] for line in resumed]
    require(steps == [1, 2, 3, 4], f"the resumed run has the steps {steps}")
    require(any(line["trained_tokens"] for line in lines), "no step trained anything")
    same = {"step lines": without_seconds(lines) == without_seconds(resumed)}
    for name in ("rollouts.jsonl", "checkpoints/step_4/model.safetensors"):
        same[name] = (whole_run / name).read_bytes() == (killed / name).read_bytes()
    for name, equal in same.items():
        report.add(f"resumed: {name}", "the same" if equal else "DIFFERENT", "the same on a CPU")
    require(CUDA or all(same.values()), "the resumed run is another one")
    report.add("largest gap, nats", f"{max(line['gap'] or 0 for line in lines):.2g}")
    phases = {}
    for line in lines:
        phases |= line["seconds"]
    for phase in phases:
        seconds = [line["seconds"].get(phase, 0.0) for line in lines]
        shown = f"{seconds[0]:.2f} in the first, then {sum(seconds[1:]) / 3:.2f}"
        report.add(f"seconds of a step: {phase}", shown)


def step_lines(run: Path) -> list[dict]:
    """The finished lines of metrics.jsonl without the evaluation before training."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()][1:]


def without_seconds(lines: list[dict]) -> list[dict]:
    dropped = ("seconds", "gpu_gb")
    return [{key: line[key] for key in line if key not in dropped} for line in lines]


# --------------------------------------------------------------------------------- memory, on paper


@dataclass
class Shape:
    """A model of the Qwen2.5 family."""

    P: float  # parameters
    layers: int
    d: int
    d_ff: int
    heads: int
    kv_heads: int
    head_size: int
    V: int  # vocabulary
    tied: bool  # are the embeddings the head?


SHAPES = {
    "0.5B": Shape(0.494e9, 24, 896, 4864, 14, 2, 64, 151936, True),
    "1.5B": Shape(1.544e9, 28, 1536, 8960, 12, 2, 128, 151936, True),
    "7B": Shape(7.616e9, 28, 3584, 18944, 28, 4, 128, 152064, False),
    "14B": Shape(14.77e9, 48, 5120, 13824, 40, 8, 128, 152064, False),
}
R = 4  # rows of a micro-batch
PROMPT, RESPONSE = 512, 5120  # tokens of a row
CHUNK = 4096  # tokens of a call of the head
RANK = 64  # of the adapters


@dataclass
class Bytes:
    """Of a GPU, without what vLLM was given."""

    sampling: float
    training: float


def on_paper(s: Shape, N: int) -> dict[str, Bytes]:
    """Memory on N GPUs by what is trained: the formulas of tests/README.md."""
    E = s.V * s.d * (1 if s.tied else 2)
    P_layer = (s.P - E) / s.layers
    r = RANK * s.layers * (4 * s.d + 2 * (s.d + s.kv_heads * s.head_size) + 3 * (s.d + s.d_ff))
    recomputed = 6 * s.d + 2 * (s.heads + 2 * s.kv_heads) * s.head_size + 4 * s.d_ff
    L = PROMPT + RESPONSE
    activations = 2 * R * L * (s.layers * s.d + recomputed) + 12 * CHUNK * s.V
    gathered = 8 * E + 10 * P_layer
    adapted = 2 * s.P
    return {
        "all weights": Bytes(12 * s.P / N, 16 * s.P / N + gathered + activations),
        "LoRA": Bytes(
            (adapted + 12 * r) / N,
            (adapted + 16 * r) / N + 2 * E + 4 * P_layer + activations,
        ),
    }


# ---------------------------------------------------------------------------------- a training step


def random_qwen(s: Shape) -> torch.nn.Module:
    config = Qwen2Config(
        vocab_size=s.V,
        hidden_size=s.d,
        intermediate_size=s.d_ff,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        tie_word_embeddings=s.tied,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config)


def check_train(name: str, report: Report, out: Path) -> None:
    shape, prompt, length = SHAPES[name], PROMPT, RESPONSE
    if not CUDA:
        shape = replace(shape, layers=2, d=128, d_ff=512, heads=2, kv_heads=1, V=4096)
        prompt, length = 32, 320
    device, sharded = connect()
    model = random_qwen(shape)
    parameters = sum(p.numel() for p in model.parameters())
    size = f"{parameters / 1e6:.1f} M parameters, {R} rows of {prompt} + {length} tokens"
    report.add("shape", size if CUDA else f"a small one instead: {size}")
    once = operations(model, [Span(0, prompt)] + [Span(prompt, prompt + length)] * R, R * length)
    cfg = Config(grad_checkpointing=True, micro_batch=R).resolve()
    prepare(model, cfg, device, sharded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    items = weigh(random_rollouts(shape.V, groups=R // 4, prompt=prompt, length=length), cfg)

    def step():
        sums = backward(model, items, 0, cfg, device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sums

    report.add("first step", f"{seconds_of(step):.1f} s, without loading")
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    repeats = 3
    seconds = sum(seconds_of(step) for _ in range(repeats)) / repeats
    report.add("a step", f"{seconds:.2f} s, {R * length / seconds:.0f} trained tokens a s")
    rate = matrix_rate(device)
    found = f"{3 * once / seconds / rate:.0%} of {rate / 1e12:.2g} TFLOP/s"
    expected = "on paper 30%: 40% with it" if CUDA else ""
    report.add("share of the matrix rate, recomputation not counted", found, expected)
    if not CUDA:
        report.add("memory", "not measured: a CPU has no counter of its peak")
        return
    paper = on_paper(shape, N=1)["all weights"]
    compare_memory(report, "between steps", torch.cuda.memory_allocated(), paper.sampling)
    compare_memory(report, "peak of training", torch.cuda.max_memory_allocated(), paper.training)


def compare_memory(report: Report, what: str, found: float, paper: float) -> None:
    report.add(f"GB {what}", f"{found / 1e9:.1f}", f"on paper {paper / 1e9:.1f}, at most 15% more")
    require(found < 1.15 * paper, f"{what}: more memory than the table of tests/README.md says")


def seconds_of(action) -> float:
    start = time.perf_counter()
    action()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(device: torch.device) -> float:
    """Operations a second of square products: bf16 on a GPU, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if CUDA else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds_of(partial(multiply, a, 4))
    n = 32
    return n * 2 * size**3 / seconds_of(partial(multiply, a, n))


# --------------------------------------------------------------------------------------------- vLLM


def check_vllm(lora_rank: int, report: Report, out: Path) -> None:
    if not find_spec("vllm"):
        raise NotDone("vLLM is not installed: pip install -r requirements.txt vllm==0.32.0")
    if lora_rank and not find_spec("peft"):
        raise NotDone("peft is not installed: pip install peft")
    flags = "--engine vllm --method grpo --prompts_per_step 16 --train_data chain-4 --eval_data"
    flags += (
        f" chain-4 --eval_problems 4 --engine_memory 0.3 --max_rows 128 --lora_rank {lora_rank}"
    )
    run = set_up(parse([*flags.split(), "--out_dir", str(out / f"vllm_run_{lora_rank}")]))
    report.add("version", import_module("vllm").__version__)
    for step in range(3):
        tasks = tasks_of_step(run, step)
        clock = Clock()
        sampled = run_programs([run.program(task) for task in tasks], run.engine)
        clock.lap("sampling")
        rollouts = trained_rollouts(run.cfg.method, sampled)
        set_advantages(rollouts)
        before = used_gb()
        run.engine.sleep()
        clock.lap("sleep")
        asleep = used_gb()
        metrics = update_metrics(update_policy(run, rollouts, clock))
        require(metrics["gap"] is not None, "a step of flat groups: nothing was trained")
        seconds = ", ".join(f"{phase} {s:.2f}" for phase, s in clock.seconds.items())
        report.add(f"step {step + 1}: seconds (sync: wake-up and new weights)", seconds)
        found = f"{before:.1f} awake, {asleep:.1f} asleep, {used_gb():.1f} awake again"
        report.add(f"step {step + 1}: GB of the GPU in use", found if CUDA else "no GPU")
        report.add(f"step {step + 1}: gap, nats", f"{metrics['gap']:.2g}", f"at most {GAP}")
        require(metrics["gap"] < GAP, "vLLM samples from other weights than the trainer's")
        require(not CUDA or asleep < before - 1, "sleep gave less than 1 GB back")


def used_gb() -> float:
    if not CUDA:
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e9


# ------------------------------------------------------------------------------- running the checks


@dataclass
class Check:
    action: object  # (Report, folder for its files) -> None
    limit: float  # seconds


CHECKS = {
    "shards": Check(check_shards, 60),
    "engine": Check(check_engine, 60),
    "run": Check(check_run, 150),
    "train-0.5B": Check(partial(check_train, "0.5B"), 70),
    "train-1.5B": Check(partial(check_train, "1.5B"), 110),
    "vllm": Check(partial(check_vllm, 0), 140),
    "vllm-lora": Check(partial(check_vllm, 8), 140),
}
TOGETHER = 570  # seconds: checks that come too late are not done
NOT_DONE = 3  # exit code of a check that cannot run here; the last line of its output says why


@dataclass
class Ended:
    """How a check ended."""

    state: str  # ok | FAILED | not done
    why: str
    seconds: float


def run_limited(command: list, limit: float, log: Path) -> Ended:
    """Runs a command for at most `limit` seconds; then it and what it started are killed."""
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # what it started too, also after Ctrl-C
            kill_group(process.pid)
            process.wait()
    seconds = time.monotonic() - start
    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    if code == 0:
        return Ended("ok", "", seconds)
    if code is None:
        return Ended("FAILED", f"stopped after {limit:.0f} s", seconds)
    if code == NOT_DONE:
        return Ended("not done", last, seconds)
    return Ended("FAILED", f"exit code {code}: {last[:200]} (see {log})", seconds)


def kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:  # all have ended
        pass


def run_checks(names: list[str], out: Path, patience: float) -> list[Ended]:
    ends = []
    last = time.monotonic() + TOGETHER * patience
    for name in names:
        limit = min(CHECKS[name].limit * patience, last - time.monotonic())
        if limit <= 0:
            ends.append(Ended("not done", "the time for all checks was over", 0))
            continue
        command = [sys.executable, "-m", "tests.gpu", "--check", name, "--out", str(out)]
        ends.append(run_limited(command, limit, out / f"{name}.log"))
        print(f"{name}: {ends[-1].state} {ends[-1].why}", file=sys.stderr)
    return ends


def table(names: list[str], ends: list[Ended], out: Path) -> str:
    """For each check a line that says how it ended, and one for each thing that it found."""
    lines = ["| check | what | found | expected |", "|---|---|---|---|"]
    for name, end in zip(names, ends):
        state = f"**{end.state}** {end.why.replace('|', '/')}".strip()
        lines.append(f"| {name} | all of it, in {end.seconds:.0f} s | {state} | |")
        for what, found, expected in Report(out / f"{name}.jsonl").lines():
            lines.append(f"| {name} | {what} | {found} | {expected} |")
    return "\n".join(lines)


def about() -> str:
    """The machine and the versions, and what a CPU leaves open."""
    versions = f"torch {torch.__version__}, transformers {version('transformers')}"
    date = time.strftime("%d %B %Y")
    if CUDA:
        name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] / 1e9
        return f"{date}, {name} with {memory:.0f} GB, CUDA {torch.version.cuda}, {versions}"
    return (
        f"{date}, NO GPU, {versions}. The same checks on a CPU with small shapes. This does not "
        "show: NCCL, bf16, memory, utilisation of a GPU, vLLM's sleep."
    )


def fresh(out: Path) -> None:
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        sys.exit(f"{out} is there already: remove it, or give another --out")


def check_here(name: str, out: Path) -> None:
    """Runs one check in this process."""
    try:
        CHECKS[name].action(Report(out / f"{name}.jsonl"), out)
    except NotDone as reason:
        print(reason)
        sys.exit(NOT_DONE)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Checks on one GPU; see the top of the file.")
    option = parser.add_argument
    option("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="checks to run")
    option("--out", type=Path, default=ROOT / "runs" / "gpu", help="a new folder for all output")
    option("--patience", type=float, default=1.0, help="times the limits of ten minutes")
    option("--check", choices=CHECKS, help="runs one check in this process (used by this script)")
    args = parser.parse_args(argv)
    if args.check:
        check_here(args.check, args.out)
        return
    fresh(args.out)
    ends = run_checks(args.only, args.out, args.patience)
    page = f"{table(args.only, ends, args.out)}\n\n{about()}\n"
    (args.out / "table.md").write_text(page)
    print(page)
    failed = [name for name, end in zip(args.only, ends) if end.state == "FAILED"]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
