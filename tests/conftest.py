"""What the tests share: the embedded policy, usual settings, and a policy that can be enumerated.

`Enumerable` is a real tiny transformer whose responses can all be listed. On it a test computes an
expectation over ALL outcomes of a program, and needs no tolerance for sampling noise.

Left out: fixtures that only one test file needs; they are in that file.
"""

import math
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import product
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
from data.sandbox import isolation  # noqa: E402
from data.thoughts import Vocabulary  # noqa: E402
from localize import LOCALIZERS  # noqa: E402
from rollout import HFEngine, Request, Rollout, Task  # noqa: E402

POLICY = ROOT / "data" / "policy"

# One thread, here and in what the tests start: for models this small two threads mostly wait for
# each other, and beside other work that takes ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def no_sandbox() -> str | None:
    """Why programs cannot be isolated here, or None."""
    try:
        isolation()
    except OSError as fault:
        return f"programs cannot be isolated here: {fault}"
    return None


needs_sandbox = pytest.mark.skipif(no_sandbox() is not None, reason=str(no_sandbox()))


# A method of somebody else, in a file of its own: VinePPO, credit for each thought.
IDEA = """
from localize import prefix_values

def vine(task):
    (base,) = yield [task.request("base", 4)]
    values = yield from prefix_values(task, base, "value")
    for rollout, v in zip(base, values):
        rollout.advantages = [after - before for before, after in zip(v, v[1:])]
    return task.in_group(0, base)

def two_turns(task):
    (base,) = yield [task.request("base", 2)]
    (reviews,) = yield [task.ask("review", task.reply(base[0], "so +8 now"))]
    (again,) = yield [task.request("retry", 2, prompt_ids=task.reply(base[0], "so +9 now"))]
    reviews[0].advantages = [1.0]
    return task.in_group(0, base) + task.in_group(1, again) + task.in_group(2, reviews)

def only_reviews(task):
    reviews = yield [task.ask("review", task.prompt_ids) for _ in range(2)]
    for (review,) in reviews:
        review.advantages = [0.0]
    return task.in_group(0, [review for (review,) in reviews])

def returns_nothing(task):
    yield [task.request("base", 2)]

def no_generator(task):
    return []

def of_two(task, other):
    yield []

not_even_a_function = 1
"""


def settings(**changed):
    """The settings that programs, localizers and the loss read."""
    usual = dict(
        base=4,
        prefixes=1,
        suffixes=4,
        seed_source="base",
        max_seed_draws=8,
        rounds=12,
        correct=1.0,
        temperature=1.0,
        top_p=1.0,
        max_thoughts=20,
        max_tokens_per_thought=256,
        localize_fallback="random",
        localize_temperature=0.3,
        localize_tokens=256,
        oracle_samples=4,
        oracle_tau=0.1,
        mask_prefix=True,
        length="trained",
        clip=0.0,
        off_policy_shape=0.0,
        micro_batch=64,
        chunk=4096,
    )
    return SimpleNamespace(**(usual | changed))


class Policy:
    """The embedded policy with its engine."""

    def __init__(self):
        self.model, self.tokenizer = load_policy(POLICY)
        self.engine = HFEngine(self.model, self.tokenizer)

    def tasks(self, steps, n, localizer="verifier", seed=0, **changed):
        """n tasks on chains of this many steps. seed: as in generate_chains."""
        tasks = []
        for slot, problem in enumerate(generate_chains(steps, n, seed)):
            task = Task(
                problem=problem,
                prompt_ids=encode_question(self.tokenizer, problem),
                slot=slot,
                cfg=settings(**changed),
                vocabulary=self.engine.vocabulary,
                localize=LOCALIZERS[localizer],
                rng=np.random.default_rng([seed, slot]),
                context=384,
            )
            tasks.append(task)
        return tasks


@pytest.fixture(scope="session")
def policy():
    return Policy()


@pytest.fixture(autouse=True)
def fresh_counters():
    counters.clear()


# ------------------------------------------------------------------------------- enumerable policy


class Letters:
    """A tokenizer of given pieces: decoding is joining."""

    chat_template = None
    added_tokens_decoder = {}
    unk_token_id = None

    def __init__(self, pieces, eos=None):
        self.pieces = pieces
        self.eos_token_id = eos
        self.pad_token_id = 0

    def get_vocab(self):
        return {piece: i for i, piece in enumerate(self.pieces)}

    def convert_tokens_to_ids(self, token):
        return self.get_vocab().get(token)

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)


@dataclass
class Outcome:
    """One way in which a request, or a whole program, comes out."""

    rollouts: list[Rollout]
    probability: float


class Enumerable:
    """A real tiny transformer over V letters whose responses are exactly H one-letter thoughts.

    All V^H responses can be listed. `correct` holds those (tuples of letters) that earn 1.
    """

    def __init__(self, V, H, correct, rng_key=0):
        self.V = V
        self.H = H
        self.correct = correct
        torch.manual_seed(rng_key)
        config = LlamaConfig(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=16,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = LlamaForCausalLM(config)
        with torch.no_grad():
            self.model.lm_head.weight.mul_(40)  # far from uniform
        self.tokenizer = Letters("abcdef"[:V])
        self.engine = HFEngine(self.model, self.tokenizer)
        self.prompt = [0]
        self.responses = list(product(range(V), repeat=H))

    def logps(self, response, prompt=None):
        """Log-probs [len(response)] with gradient, by one plain forward."""
        prompt = prompt or self.prompt
        ids = torch.tensor([prompt + list(response)])
        logits = self.model(ids).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]

    @cached_property
    def all_logps(self):
        """The log-probs of every response, as lists."""
        with torch.no_grad():
            return {response: self.logps(response).tolist() for response in self.responses}

    def value(self, prefix=()):
        """V(prefix) with gradient: the summed probability of its correct continuations."""
        total = torch.zeros(())
        for response in self.responses:
            if response[: len(prefix)] == tuple(prefix) and response in self.correct:
                total = total + self.logps(response)[len(prefix) :].sum().exp()
        return total

    def task(self, localize=None, **changed):
        texts = {self.tokenizer.decode(response) for response in self.correct}

        def grade(text):
            return float(text in texts)

        problem = Problem(0, "", "", "integer")
        problem.grade = grade
        return Task(
            problem=problem,
            prompt_ids=self.prompt,
            slot=0,
            cfg=settings(max_thoughts=self.H, max_tokens_per_thought=1, **changed),
            vocabulary=Vocabulary(self.tokenizer),
            localize=localize,
            rng=np.random.default_rng(0),
            context=16,
        )

    def outcomes(self, request: Request):
        """Every way a request can come out: yields Outcomes of n rollouts."""
        prefix = tuple(request.prefix_ids)
        possible = [response for response in self.responses if response[: len(prefix)] == prefix]
        for responses in product(possible, repeat=request.n):
            probability = 1.0
            for response in responses:
                probability *= math.exp(sum(self.all_logps[response][len(prefix) :]))
            yield Outcome([self.rollout(request, response) for response in responses], probability)

    def rollout(self, request: Request, response) -> Rollout:
        """The graded record that the engine would make of this response."""
        text = self.tokenizer.decode(response)
        return Rollout(
            problem=0,
            purpose=request.purpose,
            prompt_ids=self.prompt,
            token_ids=list(response),
            logps=list(self.all_logps[response]),
            thought_ends=list(range(1, self.H + 1)),
            finish="thoughts",
            text=text,
            prefix_len=len(request.prefix_ids),
            reward=request.grade(text),
            seed=request.seed,
            reset=request.reset,
            localized=request.localized,
        )

    def run_all(self, start_program):
        """Every way a whole program can come out: yields an Outcome for each buffer it returns.

        start_program() starts the program afresh.
        """
        yield from self.continue_all(start_program, [], 1.0)

    def continue_all(self, start_program, answers, probability):
        """The same, given the answers to the program's first yields and their probability."""
        program = start_program()
        try:
            requests = program.send(None)
            for answer in answers:
                requests = program.send(copied(answer))
        except StopIteration as done:
            yield Outcome(done.value, probability)
            return
        possible = [list(self.outcomes(request)) for request in requests]
        for outcomes in product(*possible):
            answer = [outcome.rollouts for outcome in outcomes]
            p = math.prod(outcome.probability for outcome in outcomes)
            yield from self.continue_all(start_program, [*answers, answer], probability * p)


def copied(answer):
    """Copies of an answer's rollouts: programs write groups into the records that they are sent."""
    copies = []
    for group in answer:
        copies.append([Rollout(**vars(rollout)) for rollout in group])
    return copies
