"""Shared parts: the embedded policy, settings for tasks, and a policy small enough to enumerate."""

import itertools
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.chains import generate_chains  # noqa: E402
from data.faults import counters  # noqa: E402
from data.policies import encode_question, load_policy  # noqa: E402
from data.problems import Problem  # noqa: E402
from data.thoughts import Vocabulary  # noqa: E402
from localize import LOCALIZERS  # noqa: E402
from rollout import HFEngine, Rollout, Task  # noqa: E402

POLICY = ROOT / "data" / "policy"

os.environ["OMP_NUM_THREADS"] = (
    "1"  # of what the tests start; here too: for models this small two threads mostly wait for each other, and beside other work that takes ten times as long
)
torch.set_num_threads(1)


def settings(**changed):
    """The settings that programs, localizers and the loss read."""
    usual = dict(
        base=4, prefixes=1, suffixes=4, seed_source="base", seed_choice="first", max_seed_draws=8, correct=1.0, temperature=1.0, top_p=1.0, max_thoughts=20,
        max_tokens_per_thought=256, localize_fallback="random", localize_temperature=0.3, localize_tokens=256, oracle_samples=4, oracle_tau=0.1, mask_prefix=True, length="trained",
        clip=0.0, micro_batch=64, chunk=4096,
    )  # fmt: skip
    return SimpleNamespace(**(usual | changed))


class Policy:
    """The embedded policy with its engine."""

    def __init__(self):
        self.model, self.tokenizer = load_policy(POLICY)
        self.engine = HFEngine(self.model, self.tokenizer)

    def tasks(self, steps, n, localizer="verifier", seed=0, **changed):
        cfg = settings(**changed)
        return [
            Task(
                p,
                encode_question(self.tokenizer, p),
                slot,
                cfg,
                self.engine.vocabulary,
                LOCALIZERS[localizer],
                np.random.default_rng([seed, slot]),
                384,
            )
            for slot, p in enumerate(generate_chains(steps, n, seed))
        ]


@pytest.fixture(scope="session")
def policy():
    return Policy()


@pytest.fixture(autouse=True)
def fresh_counters():
    counters.clear()


# --------------------------------------------------------------------------------------------------------- enumerable policy


class Letters:
    """A tokenizer of given pieces: decoding is joining."""

    chat_template = None
    added_tokens_decoder = {}
    unk_token_id = None

    def __init__(self, pieces, eos=None):
        self.pieces, self.eos_token_id, self.pad_token_id = pieces, eos, 0

    def get_vocab(self):
        return {piece: i for i, piece in enumerate(self.pieces)}

    def convert_tokens_to_ids(self, token):
        return self.get_vocab().get(token)

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)


class Enumerable:
    """A real tiny transformer over V letters whose responses are exactly H one-letter thoughts: all V^H of them can be listed.

    `correct` holds the responses (tuples of letters) that earn 1."""

    def __init__(self, V, H, correct, seed=0):
        self.V, self.H, self.correct = V, H, correct
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=16, tie_word_embeddings=False,
            pad_token_id=0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)
        with torch.no_grad():
            self.model.lm_head.weight.mul_(40)  # far from uniform
        self.tokenizer = Letters("abcdef"[:V])
        self.engine = HFEngine(self.model, self.tokenizer)
        self.prompt = [0]
        self.responses = list(itertools.product(range(V), repeat=H))

    def logps(self, response, prompt=None):
        """Log-probs [len(response)] with gradient, one plain forward."""
        prompt = prompt or self.prompt
        ids = torch.tensor([prompt + list(response)])
        logits = self.model(ids).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]

    def value(self, prefix=()):
        """Pass rate from a state, with gradient: sum of the probabilities of the right continuations."""
        total = torch.zeros(())
        for response in self.responses:
            if response[: len(prefix)] == tuple(prefix) and response in self.correct:
                total = total + self.logps(response)[len(prefix) :].sum().exp()
        return total

    def task(self, localize=None, rng=None, **changed):
        cfg = settings(max_thoughts=self.H, max_tokens_per_thought=1, **changed)
        letters = {"".join(self.tokenizer.pieces[i] for i in response) for response in self.correct}
        problem = Problem(0, "", "", "integer")
        problem.grade = lambda text: float(text in letters)
        return Task(
            problem,
            self.prompt,
            0,
            cfg,
            Vocabulary(self.tokenizer),
            localize,
            rng or np.random.default_rng(0),
            16,
        )

    def outcomes(self, request):
        """Every way a request can come out: [(n rollouts, probability)]."""
        prefix = tuple(request.prefix_ids)
        singles = []
        for response in self.responses:
            if response[: len(prefix)] == prefix:
                logps = self.all_logps[response]
                singles.append((response, logps, math.exp(sum(logps[len(prefix) :]))))
        for chosen in itertools.product(singles, repeat=request.n):
            rollouts = [
                Rollout(0, request.purpose, self.prompt, list(response), list(logps), list(range(1, self.H + 1)), "thoughts",
                        text=self.tokenizer.decode(response), prefix_len=len(prefix))
                for response, logps, _ in chosen
            ]  # fmt: skip
            for rollout in rollouts:
                rollout.reward = request.grade(rollout.text)
            yield rollouts, math.prod(p for _, _, p in chosen)

    @property
    def all_logps(self):
        if not hasattr(self, "_logps"):
            with torch.no_grad():
                self._logps = {
                    response: self.logps(response).tolist() for response in self.responses
                }
        return self._logps

    def run_all(self, program_of):
        """Every way a whole program can come out: yields (buffer, probability). `program_of()` starts it afresh."""

        def walk(answers, probability):
            program = program_of()
            try:
                requests = program.send(None)
                for answer in answers:
                    requests = program.send(copied(answer))
            except StopIteration as done:
                yield done.value, probability
                return
            for combination in itertools.product(*(list(self.outcomes(r)) for r in requests)):
                yield from walk(
                    answers + [[rollouts for rollouts, _ in combination]],
                    probability * math.prod(p for _, p in combination),
                )

        def copied(answer):  # programs write groups and seeds into the records they are sent
            return [[Rollout(**vars(r)) for r in group] for group in answer]

        yield from walk([], 1.0)
