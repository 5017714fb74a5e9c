"""Tokens per second of the engines, beside transformers' own generate, and of a step's gradient, beside one that shares no states. Not a
test: machines and their neighbours differ, so read the ratios.

    python tests/speed.py --repeats 5                                            # the embedded policy
    python tests/speed.py --layers 8 --problems 16 --samples 4 --repeats 3       # a policy with random weights
"""

import argparse
import copy
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.tasks import load_problems  # noqa: E402
from data.verifiers import DELIMITER  # noqa: E402
from eval import make_tasks  # noqa: E402
from loss import backward, set_advantages  # noqa: E402
from rollout import HFEngine, load_policy, make_engine, resets, run_programs  # noqa: E402
from srpo import parse  # noqa: E402


def speed(args) -> None:
    """Generated tokens per second of the engines and of transformers' generate: same prompts, same stops (of the embedded policy), in turns.
    Trained tokens per second of the gradient of a step of SRPO, whose prompts and reset states are run once for a group, or for each row.
    With vLLM also: a step of SRPO with and without a barrier between its phases, and the time of a weight sync."""
    with tempfile.TemporaryDirectory() as folder:
        if args.layers:
            save_random_policy(folder, args.model, args.layers, args.width)
        model, tokenizer = load_policy(folder if args.layers else args.model)
        context = model.config.max_position_embeddings
        engine = make_engine(
            args.engine,
            folder if args.layers else args.model,
            model,
            tokenizer,
            context,
            max_rows=256,
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tasks = make_tasks(load_problems(args.data, seed=1)[: args.problems], tokenizer, engine, context, base=4, prefixes=1, suffixes=4, seed_source="base",
                       seed_choice="first", max_seed_draws=8, localize_tokens=256, max_tokens_per_thought=16)  # fmt: skip
    prompts = [t.prompt_ids for t in tasks for _ in range(args.samples)]
    width = max(map(len, prompts))
    ids = torch.tensor(
        [[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts], device=model.device
    )
    mask = (ids != tokenizer.pad_token_id).long()
    end = torch.tensor(
        [tokenizer.convert_tokens_to_ids(word) for word in ("}", DELIMITER)], device=model.device
    )
    sampling = dict(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        stopping_criteria=StoppingCriteriaList([lambda ids, _, **kw: (ids[:, -2:] == end).all(1)]),
    )
    longest = 0

    def sample(engine):
        nonlocal longest
        rollouts = [
            r
            for group in engine.sample([t.request("base", args.samples) for t in tasks])
            for r in group
        ]
        longest = max(r.generated for r in rollouts)
        return sum(r.generated for r in rollouts)

    def generate():
        model.set_attn_implementation("sdpa")  # as transformers has it; an HFEngine sets its own
        out = model.generate(ids, attention_mask=mask, max_new_tokens=longest, **sampling)
        return int((out[:, width:] != tokenizer.pad_token_id).sum())

    def step(engine):
        for i, task in enumerate(tasks):
            task.rng = np.random.default_rng(i)  # the same step each time
        if engine.name == "vllm":
            engine.llm.reset_prefix_cache()
        return sum(r.generated for r in run_programs([resets(t) for t in tasks], engine).generated)

    def gradient(rows):
        model.zero_grad()
        with (
            patch("loss.DynamicCache", lambda config: SimpleNamespace(layers=["not shared"]))
            if rows == "whole"
            else nullcontext()
        ):
            return backward(
                model, buffer, len(buffer), tokenizer.pad_token_id, parse(["--micro_batch", "16"])
            )["tokens"]

    hf = HFEngine(model, tokenizer)
    buffer = [r for group in run_programs([resets(t) for t in tasks], hf).results for r in group]
    for i, rollout in enumerate(buffer):
        rollout.reward = i % 2  # every group has variance
    set_advantages(buffer)
    contenders = {"hf engine": lambda: sample(HFEngine(model, tokenizer)), "generate": generate,
                  "gradient of a srpo step": lambda: gradient("shared"), "gradient, states not shared": lambda: gradient("whole")}  # fmt: skip
    if engine.name == "vllm":
        barrier = copy.copy(engine)
        barrier.finished = lambda: [
            answer
            for _ in iter(lambda: bool(engine.under_way), False)
            for answer in engine.finished()
        ]
        contenders |= {
            "vllm engine": lambda: sample(engine),
            "srpo step": lambda: step(engine),
            "srpo step, with barriers": lambda: step(barrier),
        }
    speeds, syncs = {name: [] for name in contenders}, []
    model.eval()
    for repeat in range(args.repeats + 1):  # the first is a warm-up
        for name, contender in contenders.items():
            start = time.perf_counter()
            tokens = contender()
            speeds[name] += [tokens / (time.perf_counter() - start)] if repeat else []
        start = time.perf_counter()
        engine.sync(model.named_parameters())
        syncs += [time.perf_counter() - start] if repeat else []

    def ratio(a, b):
        ratios = np.array(speeds[a]) / np.array(speeds[b])
        return f"{a} / {b}: {np.median(ratios):.2f} (range {ratios.min():.2f}-{ratios.max():.2f})"

    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(prompts)} rows, {model.device}, {torch.get_num_threads()} threads, "
          f"medians of {args.repeats} in turns")  # fmt: skip
    for name in contenders:
        print(f"{name}: {np.median(speeds[name]):.0f} tokens/s")
    print(
        f"{ratio('hf engine', 'generate')}\n{ratio('gradient of a srpo step', 'gradient, states not shared')}"
    )
    if engine.name == "vllm":
        print(
            f"{ratio('vllm engine', 'hf engine')}\n{ratio('srpo step', 'srpo step, with barriers')}\nweight sync: {1000 * np.median(syncs):.0f} ms"
        )


def save_random_policy(folder: str, tokenizer: str, layers: int, width: int) -> None:
    """A Llama with random weights and the tokenizer of another policy: of a size to measure, and with nothing to say."""
    words = load_policy(tokenizer)[1]
    ends = dict(
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
    )
    config = LlamaConfig(vocab_size=len(words), hidden_size=width, intermediate_size=int(2.75 * width), num_hidden_layers=layers, num_attention_heads=width // 64,
                         head_dim=64, max_position_embeddings=1024, tie_word_embeddings=False, **ends)  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Speed of the engines beside transformers' generate."
    )
    parser.add_argument("--model", default=str(ROOT / "data" / "policy"), help="folder or hub id")
    parser.add_argument(
        "--engine",
        choices=["auto", "hf", "vllm"],
        default="auto",
        help="vllm or auto: measure it too",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=0,
        help="measure a random policy of so many layers instead (0: --model itself)",
    )
    parser.add_argument("--width", type=int, default=512, help="its width, a multiple of 64")
    parser.add_argument("--data", default="chain-12", help="JSON-lines file or chain-K")
    parser.add_argument("--problems", type=int, default=32, help="prompts in the batch")
    parser.add_argument("--samples", type=int, default=8, help="responses of each")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats, in turns")
    speed(parser.parse_args(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
