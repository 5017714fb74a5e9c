"""Speed of the engines and of the gradient, in tokens per second.

The engines are compared with transformers' own `generate`: the same prompts, and the same stops
(those of the embedded policy). The gradient of an SRPO step is compared with one that does not
share prompts and reset states between rollouts, and with a plain loop (whole rows, log_softmax and
gather). With vLLM also: an SRPO step with and without a
barrier between its phases, and the time of a weight sync. Contenders take turns, so read the
ratios: machines differ, and so does what else runs on them.

    python -m tests.speed --repeats 5                    # the embedded policy
    python -m tests.speed --layers 8 --problems 16 --samples 4 --repeats 3     # random weights

Left out: memory, and more than one process or GPU.

Try it alone:  python -m tests.speed --data chain-4 --problems 4 --samples 2 --repeats 1
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python tests/speed.py`

from data.driver import run_programs  # noqa: E402
from data.policies import load_policy  # noqa: E402
from data.tasks import load_problems  # noqa: E402
from data.verifiers import DELIMITER  # noqa: E402
from localize import by_self  # noqa: E402
from loss import backward, set_advantages, weigh  # noqa: E402
from rollout import (  # noqa: E402
    HFEngine,
    Rollout,
    Task,
    make_engine,
    make_tasks,  # noqa: E402
    resets,
)
from srpo import parse  # noqa: E402


@dataclass
class Workload:
    """What is measured, and on what."""

    model: torch.nn.Module
    tokenizer: object
    engine: object  # what --engine chose
    tasks: list[Task]
    samples: int  # responses for each task
    longest: int = 0  # generated tokens of the longest response so far: the limit of `generate`


def open_workload(args) -> Workload:
    """Loads or makes the policy, builds the engine and the tasks."""
    with tempfile.TemporaryDirectory() as folder:
        source = args.model
        if args.layers:
            save_random_policy(folder, args.model, args.layers, args.width, args.vocabulary)
            source = folder
        model, tokenizer = load_policy(source)
        context = model.config.max_position_embeddings
        engine = make_engine(args.engine, source, model, tokenizer, context, max_rows=256)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.eval()
    problems = load_problems(args.data, seed=1)[: args.problems]
    settings = {
        "base": 4,
        "prefixes": 1,
        "suffixes": 4,
        "seed_source": "base",
        "max_seed_draws": 8,
        "localize_tokens": 256,
        "max_tokens_per_thought": 16,
    }
    tasks = make_tasks(problems, engine, context, localize=by_self, **settings)
    return Workload(model, tokenizer, engine, tasks, args.samples)


def save_random_policy(folder, tokenizer_source: str, layers: int, width: int, vocabulary: int):
    """Saves a Llama with random weights and the tokenizer of another policy."""
    _, tokenizer = load_policy(tokenizer_source)
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), vocabulary),
        hidden_size=width,
        intermediate_size=int(2.75 * width),
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------- contenders; each returns tokens it handled


def sample_base_groups(work: Workload, engine) -> int:
    """Samples every task's base group with an engine."""
    groups = engine.sample([task.request("base", work.samples) for task in work.tasks])
    lengths = []
    for group in groups:
        lengths += [rollout.generated for rollout in group]
    work.longest = max(lengths)
    return sum(lengths)


def sample_with_hf(work: Workload) -> int:
    # A new engine each time: it sets its attention, which `generate_plainly` sets back.
    return sample_base_groups(work, HFEngine(work.model, work.tokenizer))


def padded_prompts(work: Workload) -> torch.Tensor:
    """The prompt of each response, padded on the left: [rows, width]."""
    pad_id = work.tokenizer.pad_token_id
    prompts = []
    for task in work.tasks:
        prompts += [task.prompt_ids] * work.samples
    width = max(map(len, prompts))
    padded = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
    return torch.tensor(padded, device=work.model.device)


def generate_plainly(work: Workload, prompts: torch.Tensor) -> int:
    """Samples the same base groups with transformers' generate; prompts [rows, width]."""
    pad_id = work.tokenizer.pad_token_id
    end = [work.tokenizer.convert_tokens_to_ids(word) for word in ("}", DELIMITER)]
    end = torch.tensor(end, device=work.model.device)

    def answered(ids, scores, **_):  # [rows] bool
        return (ids[:, -2:] == end).all(1)

    work.model.set_attn_implementation("sdpa")  # transformers' usual one
    out = work.model.generate(
        prompts,
        attention_mask=(prompts != pad_id).long(),
        max_new_tokens=work.longest,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        stopping_criteria=StoppingCriteriaList([answered]),
    )
    return int((out[:, prompts.shape[1] :] != pad_id).sum())


def srpo_step(work: Workload, engine) -> int:
    """Samples one step of SRPO; the same random numbers each time."""
    for i, task in enumerate(work.tasks):
        task.rng = np.random.default_rng(i)
    if engine.name == "vllm":
        engine.llm.reset_prefix_cache()
    sampled = run_programs([resets(task) for task in work.tasks], engine)
    return sum(rollout.generated for rollout in sampled.generated)


def with_barrier(engine):
    """A vLLM engine that gives nothing back until everything under way is finished."""

    def finished():
        answers = []
        while engine.under_way:
            answers += engine.finished()
        return answers

    slow = copy.copy(engine)
    slow.finished = finished
    return slow


def step_to_train(work: Workload) -> list[Rollout]:
    """The rollouts of one SRPO step, with rewards such that every group has variance."""
    engine = HFEngine(work.model, work.tokenizer)
    rollouts = []
    for buffer in run_programs([resets(task) for task in work.tasks], engine).results:
        rollouts += buffer
    for i, rollout in enumerate(rollouts):
        rollout.reward = i % 2
    set_advantages(rollouts)
    return rollouts


def gradient(work: Workload, rollouts: list[Rollout], share_states: bool) -> int:
    """Gradient of one step. Prompts and reset states run once for a group, or once for each row."""
    cfg = parse(["--micro_batch", "16"])
    items = [item for item in weigh(rollouts, cfg) if any(item.weights)]
    work.model.zero_grad()
    sharing = nullcontext()
    if not share_states:  # loss.py runs whole rows where it cannot share contexts
        sharing = patch("loss.can_share", never)
    with sharing:
        backward(work.model, items, work.tokenizer.pad_token_id, cfg)
    return sum(item.rollout.generated for item in items)


def never(model) -> bool:
    return False


def plain_loop(work: Workload, rollouts: list[Rollout]) -> int:
    """The same gradient without any of loss.py: whole rows, log_softmax and gather, all at once."""
    model, pad_id = work.model, work.tokenizer.pad_token_id
    model.zero_grad()
    items = [item for item in weigh(rollouts, parse([])) if any(item.weights)]
    for at in range(0, len(items), 16):
        rows, weights = [], []
        for item in items[at : at + 16]:
            rows.append(torch.tensor(item.rollout.prompt_ids + item.rollout.token_ids))
            masked = [0.0] * len(item.rollout.prompt_ids)
            weights.append(torch.tensor(masked + item.weights))
        ids = pad_sequence(rows, True, pad_id, "left").to(model.device)  # [rows, tokens]
        real = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
        weights = pad_sequence(weights, True, 0.0, "left").to(model.device)
        longest = max(len(item.rollout.token_ids) for item in items[at : at + 16])
        logits = model(
            ids,
            attention_mask=real.to(ids.device),
            position_ids=(real.cumsum(1) - 1).clamp(min=0).to(ids.device),
            use_cache=False,
            logits_to_keep=longest + 1,
        ).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(2, ids[:, -longest:, None])[..., 0]
        (-(weights[:, -longest:] * logps).sum()).backward()
    return sum(item.rollout.generated for item in items)


# --------------------------------------------------------------------------------------- measuring


@dataclass
class Timings:
    """One number for each repeat."""

    speeds: dict[str, list[float]]  # tokens/s by contender
    syncs: list[float]  # seconds

    def ratio(self, a: str, b: str) -> str:
        """Median and range of the ratios of two contenders, turn by turn."""
        ratios = np.array(self.speeds[a]) / np.array(self.speeds[b])
        median = np.median(ratios)
        return f"{a} / {b}: {median:.2f} (range {ratios.min():.2f}-{ratios.max():.2f})"


# Seconds of this process's cores, so that other work on the machine counts less; of a GPU, of time.
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


def take_turns(work: Workload, contenders: dict[str, Callable], repeats: int) -> Timings:
    """Times all contenders and a weight sync, in turns, after one round of warm-up."""
    timings = Timings({name: [] for name in contenders}, [])
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            start = clock()
            tokens = contender()
            seconds = clock() - start
            if repeat > 0:
                timings.speeds[name].append(tokens / seconds)
        start = time.perf_counter()
        work.engine.sync(work.model.named_parameters())
        if repeat > 0:
            timings.syncs.append(time.perf_counter() - start)
    return timings


def speed(args) -> None:
    """Times all contenders and prints their medians and ratios."""
    work = open_workload(args)
    rollouts = step_to_train(work)
    # In this order: `generate` stops at the longest response that the engine before it sampled.
    contenders = {
        "hf engine": partial(sample_with_hf, work),
        "generate": partial(generate_plainly, work, padded_prompts(work)),
        "gradient of a srpo step": partial(gradient, work, rollouts, share_states=True),
        "gradient, states not shared": partial(gradient, work, rollouts, share_states=False),
        "gradient, plain loop": partial(plain_loop, work, rollouts),
    }
    pairs = [
        ("hf engine", "generate"),
        ("gradient of a srpo step", "gradient, states not shared"),
        ("gradient of a srpo step", "gradient, plain loop"),
    ]
    if work.engine.name == "vllm":
        barrier = with_barrier(work.engine)
        contenders["vllm engine"] = partial(sample_base_groups, work, work.engine)
        contenders["srpo step"] = partial(srpo_step, work, work.engine)
        contenders["srpo step, with barriers"] = partial(srpo_step, work, barrier)
        pairs.append(("vllm engine", "hf engine"))
        pairs.append(("srpo step", "srpo step, with barriers"))
    timings = take_turns(work, contenders, args.repeats)

    parameters = sum(parameter.numel() for parameter in work.model.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, {len(work.tasks) * work.samples} rows, "
        f"{work.model.device}, {torch.get_num_threads()} threads, "
        f"medians of {args.repeats} in turns"
    )
    for name, speeds in timings.speeds.items():
        print(f"{name}: {np.median(speeds):.0f} tokens/s")
    for a, b in pairs:
        print(timings.ratio(a, b))
    if work.engine.name == "vllm":
        print(f"weight sync: {1000 * np.median(timings.syncs):.0f} ms")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Speed of the engines beside transformers' generate."
    )
    option = parser.add_argument
    option("--model", default=str(ROOT / "data" / "policy"), help="folder or hub id")
    engines = ["auto", "hf", "vllm"]
    option("--engine", choices=engines, default="auto", help="vllm or auto: measure vLLM too")
    help = "layers of a random policy to measure instead (0: --model itself)"
    option("--layers", type=int, default=0, help=help)
    option("--width", type=int, default=512, help="width of the random policy, a multiple of 64")
    option("--vocabulary", type=int, default=0, help="of the random policy (0: the tokenizer's)")
    option("--data", default="chain-12", help="JSON-lines file or chain-K")
    option("--problems", type=int, default=32, help="prompts in the batch")
    option("--samples", type=int, default=8, help="responses of each")
    option("--repeats", type=int, default=5, help="timed repeats, in turns")
    speed(parser.parse_args(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
