"""Speed on one core: training, sampling, whole steps, the methods and the start, in one table.

    embedded   the embedded policy (0.47 M): 32 prompts, 8 rows each, 28 + 72 tokens
    llama      random weights (26 M: 8 layers, width 256, vocabulary 32,000): 4 prompts, 4 rows
               each, 48 + 100 tokens
    methods    steps of GRPO, SRPO and the walk with srpo.py's defaults; the weights stay
    start      a new process: until srpo.py is imported, and until its first step has ended

On the two models every row has the same number of tokens for all contenders: nothing ends a row
early. Training goes from rewards to the optimizer's step, on the same rollouts, micro-batches and
AdamW for all. The contenders are a plain loop (whole rows, log_softmax and gather on the responses,
nothing recomputed), transformers' `generate`, and TRL's GRPOTrainer where it is installed, in
float32 without gradient checkpointing. Its seconds are those between its callbacks on_step_begin
and on_step_end, so its set-up does not count. vLLM is measured where it is installed and one model
is picked: two do not fit into a process.

Contenders take turns in one process of one thread; seconds are CPU seconds. A ratio is the median
over the turns, with its range: machines differ, and so does what else runs on them. The matrix rate
is measured in each turn; a contender's share of it counts its own matrix products, not padding, and
not those of TRL's head on the prompts, which it runs on a CPU.

    python -m tests.speed                              # everything
    python -m tests.speed --only llama --repeats 3
    python -m tests.speed --readme                     # and puts the table into tests/README.md

Left out: GPUs (tests/gpu.sh), memory, more than one process.

Try it alone:  python -m tests.speed --only embedded --problems 4 --samples 2 --repeats 1
"""

import argparse
import copy
import os
import platform
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
import transformers
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python tests/speed.py`

from data.curves import renew  # noqa: E402
from data.driver import run_programs  # noqa: E402
from data.metrics import Clock  # noqa: E402
from data.policies import load_policy  # noqa: E402
from data.programs import trained_rollouts  # noqa: E402
from data.tasks import load_problems  # noqa: E402
from loss import backward, set_advantages, weigh  # noqa: E402
from rollout import HFEngine, Request, Rollout, make_engine  # noqa: E402
from srpo import Training, parse, set_up, tasks_of_step, update_policy  # noqa: E402

LR = 1e-9  # the weights stay where they are, so that all turns do the same work


@dataclass
class Cost:
    """What one contender took in one turn."""

    seconds: float  # CPU seconds
    tokens: int = 0  # sampled tokens; 0 where tokens are not the point
    operations: float = 0.0  # floating-point operations of its matrix products; 0: not counted


Costs = dict[str, Cost]  # by "what: who"


def timed(action: Callable, tokens: int = 0, operations: float = 0.0) -> Cost:
    start = time.process_time()
    action()
    return Cost(time.process_time() - start, tokens, operations)


# ----------------------------------------------------------------------------------- the two models


@dataclass
class Workload:
    """A model, its prompts, and how many rows of how many tokens it samples and trains."""

    name: str
    model: torch.nn.Module
    tokenizer: object
    prompts: list[str]
    samples: int  # rows of each prompt
    length: int  # sampled tokens of each row

    def __post_init__(self):
        self.prompt_ids = [self.tokenizer(prompt)["input_ids"] for prompt in self.prompts]
        self.micro_batch = min(64, len(self.prompts) * self.samples)

    @property
    def tokens(self) -> int:
        return len(self.prompts) * self.samples * self.length

    def requests(self) -> list[Request]:
        """They are not cut into thoughts, so only their length ends them."""
        settings = dict(n=self.samples, max_tokens=self.length, temperature=1.0, top_p=1.0)
        requests = []
        for slot, ids in enumerate(self.prompt_ids):
            requests.append(Request(slot, "base", ids, rng_key=slot, **settings))
        return requests


def embedded(problems: int, samples: int) -> Workload:
    model, tokenizer = load_policy("embedded")
    prompts = [problem.question for problem in load_problems("chain-12", seed=1)[:problems]]
    return Workload("embedded", model, tokenizer, prompts, samples, length=72)


def random_llama(problems: int, samples: int) -> Workload:
    """Random weights under the embedded policy's tokenizer, of which a word is a token."""
    _, tokenizer = load_policy("embedded")
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    prompts = [" ".join([str(i)] * 48) for i in range(problems)]
    return Workload("llama", model, tokenizer, prompts, samples, length=100)


@dataclass
class Span:
    """Tokens that run through the model together: positions start to end - 1 of a sequence."""

    start: int
    end: int


def operations(model, spans: list[Span], heads: int) -> float:
    """Floating-point operations of a forward; a backward takes twice as many.

    Matrix products of the layers, attention included (over earlier tokens only), and of the head on
    `heads` tokens.
    """
    config = model.config.get_text_config()
    embeddings = model.get_input_embeddings().weight
    matrices = sum(p.numel() for p in model.base_model.parameters() if p.dim() == 2)
    matrices -= embeddings.numel()
    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_size * config.num_hidden_layers
    tokens = keys = 0
    for span in spans:
        tokens += span.end - span.start
        keys += (span.end * (span.end + 1) - span.start * (span.start + 1)) / 2
    return 2 * matrices * tokens + 4 * width * keys + 2 * embeddings.numel() * heads


def spans_of(work: Workload, shared: bool) -> list[Span]:
    """Of all rows. shared: a prompt runs once for its rows."""
    spans = []
    for ids in work.prompt_ids:
        row = Span(len(ids) if shared else 0, len(ids) + work.length)
        spans += [Span(0, len(ids))] * shared + [row] * work.samples
    return spans


# --------------------------------------------------------------------------------------- contenders


class Ours:
    """The project's engine and training step."""

    def __init__(self, work: Workload):
        self.work = work
        self.engine = HFEngine(work.model, work.tokenizer)
        self.engine.vocabulary.eos = set()  # no row ends early
        self.cfg = parse(["--micro_batch", str(work.micro_batch)])
        self.optimizer = torch.optim.AdamW(work.model.parameters(), LR, weight_decay=0.01)

    def sample(self) -> list[Rollout]:
        return graded(chain(*self.engine.sample(self.work.requests())))

    def weighted(self, rollouts: list[Rollout]) -> list:
        for rollout in rollouts:
            rollout.advantages = None
        set_advantages(rollouts)
        return weigh(rollouts, self.cfg)

    def train(self, rollouts: list[Rollout]) -> None:
        model, pad_id = self.work.model, self.work.tokenizer.pad_token_id
        backward(model, self.weighted(rollouts), pad_id, self.cfg)
        self.step()

    def train_rows(self, rollouts: list[Rollout]) -> None:
        """Each row runs with a prompt of its own."""
        with patch("loss.can_share", never):  # loss.py then runs whole rows
            self.train(rollouts)

    def train_plainly(self, rollouts: list[Rollout]) -> None:
        """A loop without loss.py's log-probs and gradient."""
        for items in parts_of(self.weighted(rollouts), self.work.micro_batch):
            plain_loss(self.work.model, items, self.work.tokenizer.pad_token_id).backward()
        self.step()

    def step(self) -> None:
        clip_grad_norm_(self.work.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def whole_step(self) -> None:
        self.train(self.sample())

    def contenders(self) -> list[Callable]:
        work, model, n = self.work, self.work.model, self.work.tokens
        rollouts = self.sample()
        once = operations(model, spans_of(work, shared=True), n)
        again = operations(model, spans_of(work, shared=False), n)
        actions = [
            ("training: ours", partial(self.train, rollouts), 3 * once),
            ("training: plain loop", partial(self.train_plainly, rollouts), 3 * again),
            ("training: ours, whole rows", partial(self.train_rows, rollouts), 3 * again),
            ("sampling: ours", self.sample, once),
            ("sampling: generate", Generate(work), again),
            ("whole step: ours", self.whole_step, 4 * once),
        ]
        return [partial(one_cost, f"{work.name}, {name}", *rest, n) for name, *rest in actions]


def one_cost(name: str, action: Callable, operations: float, tokens: int) -> Costs:
    return {name: timed(action, tokens, operations)}


def graded(rollouts) -> list[Rollout]:
    """Rewards 0 and 1 in turns: every group has variance."""
    rollouts = list(rollouts)
    for i, rollout in enumerate(rollouts):
        rollout.reward = i % 2
        rollout.group = (rollout.problem, 0)
    return rollouts


def never(model) -> bool:
    return False


def parts_of(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def plain_loss(model, items: list, pad_id: int) -> torch.Tensor:
    """The loss of some rows, whole, all at once. items: loss.Weighted, without masked tokens."""
    rows = [torch.tensor(item.rollout.prompt_ids + item.rollout.token_ids) for item in items]
    responses = [torch.tensor(item.rollout.token_ids) for item in items]
    # Left-padded, so that all responses end together; weights are 0 on what is padded.
    ids = pad_sequence(rows, True, pad_id, "left")  # [B, T]
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
    targets = pad_sequence(responses, True, pad_id, "left")  # [B, L]
    weights = pad_sequence([torch.tensor(item.weights) for item in items], True, 0.0, "left")
    out = model(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=targets.shape[1] + 1,
    )
    logps = out.logits[:, :-1].log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return -(weights * logps).sum()


class Generate:
    """transformers' `generate` on the same prompts, with its own attention and cache."""

    def __init__(self, work: Workload):
        self.model = copy.deepcopy(work.model).eval()
        self.model.set_attn_implementation("sdpa")  # the engine sets another
        rows = []
        for ids in work.prompt_ids:
            rows += [torch.tensor(ids)] * work.samples
        pad_id = work.tokenizer.pad_token_id
        self.inputs = {
            "input_ids": pad_sequence(rows, True, pad_id, "left"),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left"),
        }
        length = dict(max_new_tokens=work.length, min_new_tokens=work.length)
        self.settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **length)

    def __call__(self) -> None:
        self.model.generate(**self.inputs, **self.settings)


def vllm_contender(work: Workload, folder: str) -> Callable:
    """Here a row that ends its text is over: vLLM looks for that itself."""
    work.model.save_pretrained(folder)
    work.tokenizer.save_pretrained(folder)
    context = work.model.config.max_position_embeddings
    engine = make_engine("vllm", folder, work.model, work.tokenizer, context, max_rows=256)

    def sample() -> Costs:
        engine.llm.reset_prefix_cache()
        start = time.process_time()
        rollouts = list(chain(*engine.sample(work.requests())))
        seconds = time.process_time() - start
        tokens = sum(rollout.generated for rollout in rollouts)
        return {f"{work.name}, sampling: vLLM": Cost(seconds, tokens)}

    return sample


# ---------------------------------------------------------------------------------------------- TRL


class Laps(TrainerCallback):
    """CPU seconds of the last training step of a transformers Trainer."""

    def on_step_begin(self, *args, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, *args, **kwargs):
        self.seconds = time.process_time() - self.start


class TRL:
    """TRL's GRPOTrainer on a copy of the model: GRPO's loss without KL, one step a call.

    rollouts: what it trains on; None: it samples with transformers' `generate`.
    """

    def __init__(self, work: Workload, folder: str, rollouts: list[Rollout] | None = None):
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func is experimental in TRL
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self.work, self.laps, self.sampling = work, Laps(), 0.0
        self.rows_of = defaultdict(list)  # token ids of the rows to train, by prompt
        for rollout in rollouts or []:
            self.rows_of[work.prompts[rollout.problem]].append(rollout)
        self.model = copy.deepcopy(work.model).train()
        self.model.set_attn_implementation("sdpa")
        self.generate, self.model.generate = self.model.generate, self.timed_generate
        self.trainer = GRPOTrainer(
            model=self.model,
            reward_funcs=[rewards_in_turns],
            args=GRPOConfig(folder, **self.settings()),
            train_dataset=Dataset.from_dict({"prompt": work.prompts}),
            processing_class=work.tokenizer,
            callbacks=[self.laps],
            optimizers=(torch.optim.AdamW(self.model.parameters(), LR, weight_decay=0.01), None),
            rollout_func=self.given_rows if rollouts else None,
        )

        self.trainer.remove_callback(PrinterCallback)

    def settings(self) -> dict:
        """Everything that makes its work the same as ours; the rest are its defaults."""
        work = self.work
        return dict(
            per_device_train_batch_size=work.micro_batch,
            gradient_accumulation_steps=len(work.prompts) * work.samples // work.micro_batch,
            num_generations=work.samples,
            max_completion_length=work.length,
            generation_kwargs={"min_new_tokens": work.length},
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            loss_type="grpo",
            beta=0.0,
            max_grad_norm=1.0,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )

    def given_rows(self, prompts: list[str], trainer) -> dict:
        """The next row of each prompt, in the form of TRL's rollout_func."""
        taken = defaultdict(int)
        rollouts = []
        for prompt in prompts:
            rollouts.append(self.rows_of[prompt][taken[prompt]])
            taken[prompt] += 1
        return {
            "prompt_ids": [rollout.prompt_ids for rollout in rollouts],
            "completion_ids": [rollout.token_ids for rollout in rollouts],
            "logprobs": [rollout.logps for rollout in rollouts],
        }

    def timed_generate(self, *args, **kwargs):
        start = time.process_time()
        out = self.generate(*args, **kwargs)
        self.sampling = time.process_time() - start
        assert out.shape[1] - kwargs["input_ids"].shape[1] == self.work.length
        return out

    def __call__(self) -> Costs:
        self.trainer.train()
        n, name = self.work.tokens, f"{self.work.name}, "
        forward = operations(self.work.model, spans_of(self.work, shared=False), n)
        who = f"TRL {version('trl')}"
        if self.rows_of:
            return {f"{name}training: {who}": Cost(self.laps.seconds, n, 3 * forward)}
        return {
            f"{name}sampling: {who}": Cost(self.sampling, n, forward),
            f"{name}whole step: {who}": Cost(self.laps.seconds, n, 4 * forward),
        }


def rewards_in_turns(completions: list, **_) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


# ----------------------------------------------------------------------------- methods, and a start


def method_contender(method: str, folder: str) -> Callable:
    """A step of srpo.py with its defaults; another step of the data in each turn."""
    argv = f"--method {method} --engine hf --lr {LR} --eval_problems 1 --eval_samples 1"
    run = set_up(parse([*argv.split(), "--out_dir", f"{folder}/{method}"]))
    run.stop.restore()
    return partial(method_step, run)


def method_step(run: Training) -> Costs:
    start = time.process_time()
    tasks = tasks_of_step(run, run.progress.step)
    sampled = run_programs([run.program(task) for task in tasks], run.engine)
    seconds = time.process_time() - start
    rollouts = trained_rollouts(run.cfg.method, sampled)
    set_advantages(rollouts)
    update_policy(run, rollouts, Clock())
    run.progress.step += 1
    tokens = sum(rollout.generated for rollout in sampled.generated)
    return {
        f"methods, sampling: {run.cfg.method}": Cost(seconds, tokens),
        f"methods, whole step: {run.cfg.method}": Cost(time.process_time() - start, tokens),
    }


FIRST_STEP = """
import gc
gc.disable()  # these three lines are srpo.py's own, where it is the program
import time, srpo
gc.freeze()
gc.enable()
print(time.process_time())
def ended(*_, **__):
    print(time.process_time())
    raise SystemExit
srpo.evaluate_log_and_save = ended
srpo.main(["--out_dir", {out_dir!r}])
"""


def start_contender() -> Costs:
    """CPU seconds of a new process. Its first step ends after the evaluation before training."""
    with TemporaryDirectory() as folder:
        program = FIRST_STEP.format(out_dir=f"{folder}/run")
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        )
    lines = done.stdout.splitlines()
    imported, ended = float(lines[0]), float(lines[-1])
    return {"start, imports: srpo": Cost(imported), "start, first step: srpo": Cost(ended)}


# ---------------------------------------------------------------------------------------- measuring


RATE = "matrix rate"


def matrix_rate() -> Costs:
    """The machine's own rate: products of 1024 x 1024 matrices in float32."""
    a = torch.randn(1024, 1024)
    n = 16
    cost = timed(partial(multiply, a, n), operations=2 * 1024**3 * n)
    return {RATE: cost}


def multiply(a: torch.Tensor, n: int) -> None:
    for _ in range(n):
        a @ a


def take_turns(contenders: list[Callable], repeats: int) -> dict[str, list[Cost]]:
    """All contenders in turns, after one round of warm-up."""
    measured = defaultdict(list)
    for repeat in range(repeats + 1):
        for contender in contenders:
            for name, cost in contender().items():
                if repeat > 0:
                    measured[name].append(cost)
        print(f"turn {repeat} of {repeats}", file=sys.stderr)
    return measured


HEADER = """\
| what | who | CPU s | CPU ms a token | a token, of the first line | of the matrix rate |
|---|---|---|---|---|---|"""


def table_rows(measured: dict[str, list[Cost]]) -> list[str]:
    """A line for each contender. It is compared with the first one of the same `what`."""
    rates = np.array([cost.operations / cost.seconds for cost in measured[RATE]])
    by_what = defaultdict(dict)  # what -> who -> costs
    for name, costs in measured.items():
        if name != RATE:
            what, who = name.split(": ")
            by_what[what][who] = costs
    lines = []
    for what, contenders in by_what.items():
        first = None
        for who, costs in contenders.items():
            line = Line(what, who, costs, rates)
            first = first or line
            lines.append(line.cells(first))
    return lines


class Line:
    """A contender's turns as a line of the table."""

    def __init__(self, what: str, who: str, costs: list[Cost], rates: np.ndarray):
        self.what, self.who = what, who
        self.seconds = np.array([cost.seconds for cost in costs])
        self.per = np.array([max(1, cost.tokens) for cost in costs])  # tokens of a turn
        operations = np.array([cost.operations for cost in costs])
        self.utilisation = np.median(operations / self.seconds / rates)

    def cells(self, first: "Line") -> str:
        each, of_first = self.seconds / self.per, first.seconds / first.per
        a_token = f"{1000 * np.median(each):.3f}" if self.per.min() > 1 else "-"
        compared = "1" if self is first else with_range(each / of_first)
        utilisation = f"{self.utilisation:.0%}" if self.utilisation else "-"
        seconds = f"{np.median(self.seconds):.2f}"
        return f"| {self.what} | {self.who} | {seconds} | {a_token} | {compared} | {utilisation} |"


def with_range(ratios: np.ndarray) -> str:
    return f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


def machine() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def footer(argv: list[str], commit: str, rates: list[Cost], remarks: list[str]) -> list[str]:
    """Command, machine, versions and date: what the table is of."""
    rate = np.median([cost.operations / cost.seconds for cost in rates]) / 1e9
    command = " ".join(["python -m tests.speed", *argv])
    return [
        "",
        f"`{command}`, {time.strftime('%d %B %Y')}, commit {commit}, one thread of "
        f"{machine()} ({rate:.0f} GFLOP/s in float32), torch {version('torch')}, "
        f"transformers {version('transformers')}.",
        *remarks,
    ]


# ------------------------------------------------------------------------------------------- pieces


MODELS = {"embedded": embedded, "llama": random_llama}
PIECES = [*MODELS, "methods", "start"]
SIZES = {"embedded": (32, 8), "llama": (4, 4)}  # prompts, rows of each


def contenders_of(piece: str, args, folder: str) -> list[Callable]:
    if piece == "start":
        return [start_contender]
    if piece == "methods":
        methods = ("grpo", "srpo", "walk")
        with redirect_stdout(sys.stderr):
            return [method_contender(method, folder) for method in methods]
    problems, samples = SIZES[piece]
    work = MODELS[piece](args.problems or problems, args.samples or samples)
    ours = Ours(work)
    contenders = ours.contenders()
    if find_spec("trl"):
        contenders.append(TRL(work, f"{folder}/trl", ours.sample()))
        contenders.append(TRL(work, f"{folder}/trl"))
    if find_spec("vllm") and args.only == [piece]:
        contenders.append(vllm_contender(work, f"{folder}/vllm"))
    return contenders


def measure(args) -> list[str]:
    """The lines of the report: the table, and what it is of."""
    measured_commit = commit()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that `start` times
    rows, rates = [], []
    for piece in args.only:
        with TemporaryDirectory() as folder:
            contenders = [matrix_rate, *contenders_of(piece, args, folder)]
            measured = take_turns(contenders, args.repeats)
        rates += measured[RATE]
        rows += table_rows(measured)
    remarks = []
    if not find_spec("trl"):
        remarks.append("TRL is not installed here: `pip install trl`, and it is measured too.")
    return [HEADER, *rows, *footer(args.argv, measured_commit, rates, remarks)]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Speed on one core; see the top of the file.")
    option = parser.add_argument
    option("--only", nargs="+", choices=PIECES, default=PIECES, help="pieces to measure")
    option("--repeats", type=int, default=5, help="turns, after one of warm-up")
    option("--problems", type=int, help="prompts of the two models (unset: as above)")
    option("--samples", type=int, help="rows of each prompt (unset: as above)")
    option("--readme", action="store_true", help="renew the table of tests/README.md")
    args = parser.parse_args(argv)
    args.argv = argv
    transformers.logging.set_verbosity_error()
    report = "\n".join(measure(args))
    print(report)
    if args.readme:
        renew(ROOT / "tests" / "README.md", "tests/speed.py", report)


if __name__ == "__main__":
    main(sys.argv[1:])
