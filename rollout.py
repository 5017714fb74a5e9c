"""Sampling: the record, the methods as programs, and the two engines (the driver is in data/).

Implements steps 1, 2 and 4 of SRPO ("Credit Assignment with Resets in Language Model Reasoning",
arXiv 2605.25507): base group, seed, reset state, suffix group. Step 3 is in localize.py.

From a problem to its trained rollouts, in one step:

    Problem -> Task -> its program yields Requests -> `run_programs` gives the requests of ALL
    problems to one engine -> it samples token ids, cut into thoughts (data/thoughts.py) -> graded
    `Rollout`s go back into the program -> the program returns the rollouts to train on

A method is a generator for ONE problem that reads like the paper's algorithm box: see `grpo` and
`resets`. An idea of your own is one such function in a file of its own (`--method FILE.py:NAME`).
State is token ids from end to end: text is decoded for graders, localizers and people, and is never
encoded again.

Departures from the authors' release: the base group stays i.i.d. (a seed is read from it, not taken
out of it), reset groups are never topped up from another state, every generated token is kept and
counted, and all randomness is a function of the run's seed.
Left out: speculative decoding, and keeping a seed's KV cache for its suffixes beyond what vLLM's
prefix cache does.

Try it alone:  python rollout.py    # samples a base group from the embedded policy
"""

import copy
import os
from collections import Counter
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from time import perf_counter
from types import SimpleNamespace
from typing import Callable, Generator, Iterable

import numpy as np
import torch
from transformers import DynamicCache

from data.chains import generate_chains
from data.contexts import keep_rows, sampling_cache, use_attend
from data.driver import run_programs
from data.faults import UserError, counters
from data.parallel import gather, processes, rank
from data.policies import (
    encode_question,
    encode_turn,
    eos_of,
    load_policy,
    policy_source,
    save_adapters,
)
from data.problems import Problem
from data.thoughts import ThoughtTracker, Vocabulary, decode

# ------------------------------------------------------------------------------------------ record


@dataclass
class Rollout:
    """One sampled response. The loss, the metrics and rollouts.jsonl are computed from it.

    Thought h (1-based) is token_ids[thought_ends[h-2] : thought_ends[h-1]], from 0 where h = 1; the
    last end is len(token_ids). Example with two shared thoughts of 3 tokens each and two new ones
    of 4 and 2: thought_ends == [3, 6, 10, 12], prefix_len == 6, reset == 3, generated == 6.
    """

    problem: int  # Problem.index
    purpose: str  # what its tokens were spent on: base, more, seed, suffix, localization, walk, ...
    prompt_ids: list[int]
    token_ids: list[int]  # the response, shared prefix included
    logps: list[float]  # of token_ids, at the sampling temperature; before top_p (vLLM: after it)
    thought_ends: list[int]
    finish: str  # answer | eos | thoughts | length: why it ended
    text: str = ""  # of all token_ids, shared prefix included
    prefix_len: int = 0  # tokens shared with the seed: sampling started after them (cost)
    # Training starts at this token (credit); None: at prefix_len. --mask_prefix false: at 0.
    trained_from: int | None = None
    trained_prompt: list[int] | None = None  # off-policy: trained under this prompt instead
    reward: float | None = None  # in [0, 1]; None for localization answers
    group: tuple[int, int] | None = None  # (slot in the step, k): k = 0 is the base group
    seed: "Rollout | None" = field(default=None, repr=False)  # whose prefix it shares
    reset: int | None = None  # h*: the first thought that is sampled again
    localized: str | None = None  # how h* was found, see localize.py
    localization: "Rollout | None" = field(default=None, repr=False)  # seeds: the policy's review
    advantages: list[float] | None = None  # A of each thought; None: loss.py compares its group

    @property
    def generated(self) -> int:
        """Tokens that were sampled for it: the response without the shared prefix."""
        return len(self.token_ids) - self.prefix_len

    def prefix(self, h: int) -> list[int]:
        """Tokens of thoughts 1..h-1: the response part of the reset state s_{h-1}."""
        H = len(self.thought_ends)
        if not 1 <= h <= H + 1:
            raise ValueError(f"h = {h}: a response of {H} thoughts has reset states 1 to {H + 1}")
        return self.token_ids[: self.thought_ends[h - 2]] if h > 1 else []

    def masked(self, mask_prefix: bool = True) -> int:
        """How many tokens at the beginning of the response are not trained."""
        if not mask_prefix:
            return 0
        return self.prefix_len if self.trained_from is None else self.trained_from

    @property
    def searched(self) -> bool:
        """Whether it is trained as a sample of a state that it was not sampled from.

        Its first tokens are an earlier rollout's, chosen because that one was wrong after them, so
        rollouts.jsonl calls it off-policy. loss.Tokens does not: this step's policy sampled these
        tokens, too, so `gap_prefix` compares the engines on them.
        """
        return self.trained_from is not None and self.trained_from < self.prefix_len

    def trained_state(self) -> tuple[list[int], list[int]]:
        """(prompt, response tokens) before its first trained token: what its group shares."""
        return self.trained_prompt or self.prompt_ids, self.token_ids[: self.masked()]

    def thoughts(self, tokenizer) -> list[str]:
        """Texts of its H thoughts."""
        starts = [0, *self.thought_ends[:-1]]
        return [decode(tokenizer, self.token_ids[a:b]) for a, b in zip(starts, self.thought_ends)]

    def to_json(self, step: int, task: "Task", line_of: dict[int, int]) -> dict:
        """Its line in rollouts.jsonl. line_of: {id(rollout): its number in the step}.

        A seed that was not sampled in this step, such as a given solution, has no number.
        """
        names = (
            "problem purpose group reward advantages finish thought_ends prefix_len trained_from "
            "reset localized"
        )
        tokenizer = task.vocabulary.tokenizer
        record = {name: getattr(self, name) for name in names.split()}
        record["step"] = step
        record["id"] = line_of[id(self)]
        record["question"] = task.problem.question
        record["answer"] = task.problem.answer
        if self.prompt_ids != task.prompt_ids:
            record["prompt"] = decode(tokenizer, self.prompt_ids)
        record["off_policy"] = self.trained_prompt is not None or self.searched
        record["thoughts"] = self.thoughts(tokenizer)
        record["first_wrong"] = task.first_wrong(self) if self.reward is not None else None
        record["seed"] = line_of.get(id(self.seed))
        record["localization"] = line_of.get(id(self.localization))
        return record


def records_of(step: int, generated: list[Rollout], tasks: list["Task"]) -> list[dict]:
    """The lines of rollouts.jsonl for one step: every rollout that was sampled, trained or not."""
    line_of = {id(rollout): i for i, rollout in enumerate(generated)}
    task_of = {task.problem.index: task for task in tasks}
    return [rollout.to_json(step, task_of[rollout.problem], line_of) for rollout in generated]


def grouped(rollouts: list[Rollout]) -> dict[tuple[int, int], list[Rollout]]:
    """Rollouts by group, in order of appearance."""
    groups: dict[tuple[int, int], list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return groups


@dataclass
class Request:
    """n i.i.d. continuations of prompt_ids + prefix_ids."""

    problem: int
    purpose: str
    prompt_ids: list[int]
    n: int
    rng_key: int  # with the weights it fixes the continuations, up to rounding (transformers)
    max_tokens: int  # generated tokens, at most
    temperature: float
    top_p: float
    prefix_ids: list[int] = field(default_factory=list)
    prefix_logps: list[float] = field(default_factory=list)
    prefix_ends: list[int] = field(default_factory=list)  # thought ends inside prefix_ids
    max_thoughts: int | None = None  # prefix included; None: the answer is not cut into thoughts
    max_tokens_per_thought: int | None = None
    grade: Callable[[str], float] | None = None
    slow: bool = False  # grading waits for another process: it runs in threads, beside sampling
    seed: Rollout | None = None  # whose prefix it is, with h* and how h* was found: for the record
    reset: int | None = None
    localized: str | None = None


# ---------------------------------------------------------------------------------------- programs


@dataclass
class Task:
    """All that a program sees: one problem at one slot of one step."""

    problem: Problem
    prompt_ids: list[int]  # x0: the token ids of the question's prompt
    slot: int  # position in the step: the same problem twice in a step is two tasks
    cfg: object  # settings: srpo.Config, or anything with the fields that the program reads
    vocabulary: Vocabulary
    localize: Callable | None  # a localizer of localize.py
    rng: np.random.Generator  # all randomness of the program
    context: int  # length in tokens of the longest sequence that the model takes

    def request(
        self,
        purpose: str,
        n: int,
        seed: Rollout | None = None,
        h: int = 1,
        how: str | None = None,
        prompt_ids: list[int] | None = None,
    ) -> Request:
        """n continuations of the state before thought h of `seed`, or of the prompt without a seed.

        how: how h was found. Seed, h and how are passed on to the rollouts. h = H + 1 continues the
        whole response, after its end-of-text if it has one. prompt_ids: of a later turn, as `reply`
        makes them (default: the seed's prompt, or x0). A request without room is answered by []
        (counter no_room).
        Raises ValueError if h is outside 1..H+1, or given without a seed.
        """
        if seed is None and (h != 1 or how is not None):
            raise ValueError("h and how belong to a seed; give the seed, too")
        cfg = self.cfg
        if prompt_ids is None:
            prompt_ids = self.prompt_ids if seed is None else seed.prompt_ids
        request = Request(
            problem=self.problem.index,
            purpose=purpose,
            prompt_ids=prompt_ids,
            n=n,
            rng_key=int(self.rng.integers(2**62)),
            max_tokens=cfg.max_thoughts * cfg.max_tokens_per_thought,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            max_thoughts=cfg.max_thoughts,
            max_tokens_per_thought=cfg.max_tokens_per_thought,
            grade=self.problem.grade,
            slow=self.problem.slow,
        )
        if seed is not None:
            request.prefix_ids = seed.prefix(h)
            request.prefix_logps = seed.logps[: len(request.prefix_ids)]
            request.prefix_ends = seed.thought_ends[: h - 1]
            request.seed, request.reset, request.localized = seed, h, how
        room = self.context - len(prompt_ids)
        request.max_tokens = min(room, request.max_tokens) - len(request.prefix_ids)
        return request

    def ask(self, purpose: str, prompt_ids: list[int]) -> Request:
        """One answer about a response, at the settings of localization: not cut, not graded."""
        cfg = self.cfg
        return Request(
            problem=self.problem.index,
            purpose=purpose,
            prompt_ids=prompt_ids,
            n=1,
            rng_key=int(self.rng.integers(2**62)),
            max_tokens=min(cfg.localize_tokens, self.context - len(prompt_ids)),
            temperature=cfg.localize_temperature,
            top_p=1.0,
        )

    def reply(self, rollout: Rollout, text: str) -> list[int]:
        """Prompt ids of the next turn: the response without its end-of-text, then a user message.

        The sampled ids are never encoded again.
        """
        said = rollout.token_ids
        if said and said[-1] in self.vocabulary.eos:
            said = said[:-1]
        turn = encode_turn(self.vocabulary.tokenizer, text)
        return rollout.prompt_ids + said + turn

    def failed(self, rollout: Rollout) -> bool:
        return rollout.reward < self.cfg.correct

    def in_group(self, k: int, rollouts: list[Rollout]) -> list[Rollout]:
        """Puts rollouts into group k of this prompt; in `resets` 0 is the base group."""
        if not all(isinstance(rollout, Rollout) for rollout in rollouts):
            raise TypeError("in_group wants rollouts; one request is (base,) = yield [...]")
        for rollout in rollouts:
            rollout.group = (self.slot, k)
        return rollouts

    def first_wrong(self, rollout: Rollout) -> int | None:
        """h of the true first wrong thought; None if the task cannot tell, or if none is wrong."""
        if self.problem.check_steps is None:
            return None
        return self.problem.check_steps(rollout.thoughts(self.vocabulary.tokenizer))


USUAL = dict(  # settings of tasks outside a training run: srpo.py's defaults, except the last
    temperature=1.0,
    top_p=1.0,
    max_thoughts=20,
    max_tokens_per_thought=256,
    correct=1.0,
    localize_temperature=0.3,
    localize_tokens=4096,
    localize_fallback="skip",  # measurements drop such a seed; srpo.py resets it at random
)


def make_tasks(
    problems: list[Problem],
    engine: "Engine",
    context: int,
    run_seed: int = 0,
    localize: Callable | None = None,
    **settings,
) -> list[Task]:
    """Tasks for measuring a policy, with the usual settings unless told otherwise."""
    cfg = SimpleNamespace(**(USUAL | settings))
    tasks = []
    for slot, problem in enumerate(problems):
        prompt_ids = encode_question(engine.vocabulary.tokenizer, problem)
        rng = np.random.default_rng([run_seed, slot])
        task = Task(problem, prompt_ids, slot, cfg, engine.vocabulary, localize, rng, context)
        tasks.append(task)
    return tasks


# A program yields requests, is sent n rollouts for each, and returns the rollouts to train on.
Program = Generator[list[Request], list[list[Rollout]], list[Rollout]]


def grpo(task: Task) -> Program:
    """GRPO: one i.i.d. group from the prompt."""
    # One request is yielded, so one list of rollouts comes back.
    (base,) = yield [task.request("base", task.cfg.base)]
    return task.in_group(0, base)


def resets(task: Task) -> Program:
    """SRPO, and RRPO with the random localizer: paper steps 1 to 4."""
    cfg = task.cfg
    # 1. Base group: i.i.d. rollouts from the prompt.
    base = []
    if cfg.base:
        (base,) = yield [task.request("base", cfg.base)]
    # 2. Seeds: incorrect rollouts.
    seeds = yield from find_seeds(task, base)
    # 3. Reset index h* of each seed.
    found = yield from locate(task, seeds)
    # 4. Reset state: the thoughts before h*. Suffix group: i.i.d. continuations of it.
    suffix_requests = []
    for reset in found:
        request = task.request("suffix", cfg.suffixes, reset.seed, reset.h, reset.how)
        suffix_requests.append(request)
    missing = cfg.prefixes - len(found)
    if missing == 0:
        groups = yield suffix_requests
    else:
        # A missing seed, or one that localization dropped, gives its rollouts back to the base
        # group. With no reset at all this is plain GRPO.
        counters["no_reset"] += missing
        *groups, more = yield [*suffix_requests, task.request("more", missing * cfg.suffixes)]
        base = base + more
    # The buffer: all rollouts of this problem that are trained.
    buffer = task.in_group(0, base)
    for k, group in enumerate(groups, 1):
        buffer += task.in_group(k, group)
    return buffer


SEED_ROUND = 4  # fresh draws asked for at once


def find_seeds(task: Task, base: list[Rollout]) -> Generator:
    """Paper step 2: returns up to `prefixes` incorrect rollouts.

    They are failures of the base group, which stay in it, so it stays i.i.d. With `--seed_source
    fresh`, or where the base group has too few failures, at most `max_seed_draws` fresh rollouts
    are drawn; they cost tokens and are not trained on.
    """
    cfg = task.cfg
    seeds = []
    if cfg.seed_source == "base":
        seeds = [rollout for rollout in base if task.failed(rollout)]
    draws = 0
    while len(seeds) < cfg.prefixes and draws < cfg.max_seed_draws:
        n = min(SEED_ROUND, cfg.max_seed_draws - draws)
        (fresh,) = yield [task.request("seed", n)]
        seeds += [rollout for rollout in fresh if task.failed(rollout)]
        draws += n
    return seeds[: cfg.prefixes]


@dataclass
class Reset:
    """A reset state: thoughts 1..h-1 of a seed. h is h*, Rollout.reset; how: how it was found."""

    seed: Rollout
    h: int
    how: str


def locate(task: Task, seeds: list[Rollout]) -> Generator:
    """Paper step 3: returns a Reset for each seed that the localizer gives an h* for."""
    if not seeds:
        return []
    answers = yield from task.localize(task, seeds)
    found = []
    for seed, (h, how) in zip(seeds, answers):
        if h is not None:  # None: --localize_fallback skip
            found.append(Reset(seed, h, how))
    return found


def walk(task: Task) -> Program:
    """The walk (ours): from a failure to a success by resets; the success joins the base group.

    The idea builds on the iterated corrections of the authors' release (tests/methods.py). Here
    only flat groups are walked from, and of a walk's continuations only the success is trained, as
    a whole response of the prompt and without an importance weight. Partial rewards: a walk starts
    where all are alike and below --correct, and ends at --correct.
    """
    cfg = task.cfg
    (base,) = yield [task.request("base", cfg.base)]
    # Rewards that differ teach already: one GRPO group of twice the size.
    if len({rollout.reward for rollout in base}) > 1:
        (more,) = yield [task.request("more", cfg.base)]
        return task.in_group(0, base + more)
    # All alike. While the response in hand is wrong: locate, reset, ONE continuation.
    in_hand, rounds = base[0], 0
    while task.failed(in_hand) and rounds < cfg.rounds:
        found = yield from locate(task, [in_hand])
        if not found:  # --localize_fallback skip
            break
        reset = found[0]
        (group,) = yield [task.request("walk", 1, reset.seed, reset.h, reset.how)]
        in_hand = group[0]
        rounds += 1
    if task.failed(in_hand):
        counters["walk_failed"] += 1
    elif rounds:
        in_hand.trained_from = 0  # the prefix too: it is a whole response of this prompt
        base = base + [in_hand]
    return task.in_group(0, base)


PROGRAMS = {"grpo": grpo, "rrpo": resets, "srpo": resets, "walk": walk}

# ----------------------------------------------------------------------------------------- engines


class Row:
    """One response while it is sampled."""

    def __init__(self, request: Request, vocabulary: Vocabulary):
        self.request = request
        self.tracker = ThoughtTracker(vocabulary, request)
        self.logps = list(request.prefix_logps)

    def push(self, token: int, logp: float) -> None:
        self.tracker.push(token)
        self.logps.append(logp)

    @property
    def over(self) -> bool:
        return self.tracker.finish is not None

    def rollout(self) -> Rollout:
        request, tracker = self.request, self.tracker
        return Rollout(
            problem=request.problem,
            purpose=request.purpose,
            prompt_ids=request.prompt_ids,
            token_ids=tracker.ids,
            logps=self.logps,
            thought_ends=tracker.thought_ends,
            finish=tracker.finish,
            text=tracker.vocabulary.decode(tracker.ids),
            prefix_len=len(request.prefix_ids),
            seed=request.seed,
            reset=request.reset,
            localized=request.localized,
        )


class Engine:
    """A sampler: `start` takes a request and returns a ticket, and `finished` does the sampling.

    `finished` samples until at least one request is complete; it returns (ticket, rollouts), not
    yet graded. A method whose body is `...` does nothing; an engine overrides those that it needs.
    """

    streams = False  # True: `finished` returns some requests while it still samples others
    share, shares = 0, 1  # it runs every `shares`-th program, from number `share` on
    reports = True  # False: another process of its --tp group hands in the results of both
    lockstep = False  # True: several processes share it, and run the same programs

    def __init__(self):
        self.tickets = 0
        self.seconds = Counter()  # of sampling, by purpose; the driver clears it
        self.at = 0.0  # the time up to which they are counted

    def spend(self, purposes: Counter) -> None:
        """Shares the time since `at` between purposes. Counter: of rows, or of tokens read."""
        if purposes.total():
            now = perf_counter()
            for purpose, n in purposes.items():
                self.seconds[purpose] += (now - self.at) * n / purposes.total()
            self.at = now

    def ticket(self) -> int:
        self.tickets += 1
        return self.tickets

    def start(self, request: Request) -> int: ...

    def finished(self) -> list[tuple[int, list[Rollout]]]: ...

    def agreed(self, rewards: list) -> list: ...  # in lockstep: those of the process that reports

    def sleep(self) -> None: ...  # before training: gives memory back

    # After a step: takes the trained parameters, all of them or those of LoRA adapters.
    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def sample(self, requests: list[Request]) -> list[list[Rollout]]:
        """request.n rollouts for each request, ungraded."""
        tickets = [self.start(request) for request in requests]
        answers = {}
        while len(answers) < len(tickets):
            answers.update(self.finished())
        return [answers[ticket] for ticket in tickets]


def copy_of(model, device: torch.device, dtype: torch.dtype):
    """A copy of a model, with weights of type `dtype`.

    Buffers keep their type, as in the sharded trainer: a rounded rotary frequency would turn far
    positions by other angles than in training.
    """
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype)
    return copied.to(device)  # last: the device then needs no room for float32


class HFEngine(Engine):
    """Samples with a transformers model in this process: KV cache, one prefill for each request,
    and finished rows leave the batch.

    In a float32 run of one CPU process it holds the trainer's own model, and `sync` has nothing to
    copy. Else it holds a copy on `device`, of type `dtype`.

    Randomness is keyed: token t of row i of a request uses uniform number t of the generator keyed
    (rng_key, i), so a response does not depend on what else is in the batch, nor on the number of
    processes, up to rounding.
    """

    name = "hf"
    FULL = 0.85  # finished rows leave the batch when at most this share of it is unfinished

    def __init__(
        self,
        model,
        tokenizer,
        max_rows: int = 512,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.max_rows = max_rows
        self.has_copy = device is not None
        use_attend(model)  # the copy then does, too
        self.model = copy_of(model, device, dtype) if self.has_copy else model
        self.vocabulary = Vocabulary(tokenizer, eos_of(model))
        self.pad = tokenizer.pad_token_id
        self.share, self.shares = rank(), processes()
        self.queue: dict[int, Request] = {}  # by ticket: started, not sampled yet

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self.has_copy:
            mine = self.model.state_dict()
            for name, weight in weights:
                mine[name].copy_(weight)

    def start(self, request: Request) -> int:
        ticket = self.ticket()
        self.queue[ticket] = request
        return ticket

    def finished(self) -> list[tuple[int, list[Rollout]]]:
        """Samples all requests, shortest contexts first; at most `max_rows` rows at once."""
        self.at = perf_counter()
        requests, self.queue = self.queue, {}
        answers = {ticket: [] for ticket in requests}

        def length(ticket):
            return len(requests[ticket].prompt_ids) + len(requests[ticket].prefix_ids)

        rows = []  # (ticket, number among the request's n)
        for ticket in sorted(requests, key=length):
            rows += [(ticket, i) for i in range(requests[ticket].n)]
        was_training = self.model.training
        self.model.eval()
        for at in range(0, len(rows), self.max_rows):
            batch = rows[at : at + self.max_rows]
            for (ticket, _), rollout in zip(batch, self.sample_batch(requests, batch)):
                answers[ticket].append(rollout)
        self.model.train(was_training)
        return list(answers.items())

    @torch.inference_mode()
    def sample_batch(self, requests: dict[int, Request], batch) -> list[Rollout]:
        """Samples rows (ticket, i) together, one token of each row at a time."""
        rows = [Row(requests[ticket], self.vocabulary) for ticket, _ in batch]
        rngs = [np.random.default_rng([row.request.rng_key, i]) for row, (_, i) in zip(rows, batch)]
        decoding = self.prefill(rows, [ticket for ticket, _ in batch])
        active = list(range(len(rows)))  # for each place in the decoding batch: the row's number
        while True:
            u = [rngs[number].random() for number in active]
            tokens, logps = decoding.draw(torch.tensor(u, dtype=torch.float64))
            for number, token, logp in zip(active, tokens.tolist(), logps.tolist()):
                if not rows[number].over:
                    rows[number].push(token, logp)
            self.spend(Counter(rows[number].request.purpose for number in active))
            places = [place for place, number in enumerate(active) if not rows[number].over]
            if not places:
                return [row.rollout() for row in rows]
            # A finished row costs a little; to take it out copies the cache of all others.
            if len(places) <= self.FULL * len(active):
                active = [active[place] for place in places]
                tokens = decoding.keep(torch.tensor(places, device=tokens.device), tokens)
            decoding.step(self.model, tokens)

    def prefill(self, rows: list[Row], states: list[int]) -> "Decoding":
        """Runs the state of each request once. states: for each row, the ticket of its request."""
        device = self.model.device
        place_of = {}  # state -> its place in the prefill
        contexts = []
        read = Counter()  # tokens, by purpose
        for row, state in zip(rows, states):
            if state not in place_of:
                place_of[state] = len(contexts)
                contexts.append(row.request.prompt_ids + row.request.prefix_ids)
                read[row.request.purpose] += len(contexts[-1])
        W = max(map(len, contexts))
        padded = [[self.pad] * (W - len(c)) + c for c in contexts]
        ids = torch.tensor(padded, device=device)  # [states, W], left-padded
        mask = torch.tensor([[0] * (W - len(c)) + [1] * len(c) for c in contexts], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = sampling_cache(self.model.config)
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.spend(read)
        of_row = torch.tensor([place_of[state] for state in states], device=device)  # [rows]
        cache.reorder_cache(of_row)
        return Decoding(
            cache=cache,
            logits=out.logits[:, -1][of_row],
            mask=mask[of_row],
            positions=positions[of_row, -1],
            temperature=torch.tensor([row.request.temperature for row in rows], device=device),
            top_p=torch.tensor([row.request.top_p for row in rows], device=device),
        )


@dataclass
class Decoding:
    """The tensors of R rows that are sampled together; T tokens so far, padding included."""

    cache: DynamicCache
    logits: torch.Tensor  # [R, V] of the next token
    mask: torch.Tensor  # [R, T] 1 on real tokens
    positions: torch.Tensor  # [R] of the last token
    temperature: torch.Tensor  # [R]
    top_p: torch.Tensor  # [R]

    def draw(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u = u.to(self.logits.device)
        return draw(self.logits.float(), self.temperature, self.top_p, u)

    def keep(self, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Keeps only the rows at `places`; returns their tokens. `step` renews the logits."""
        self.mask = keep_rows(self.cache, self.mask, places)
        self.positions = self.positions[places]
        self.temperature = self.temperature[places]
        self.top_p = self.top_p[places]
        return tokens[places]

    def step(self, model, tokens: torch.Tensor) -> None:
        """Runs the model on one more token of each row, tokens [R]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        # A finished row may be at the end of the model's context.
        last = model.config.get_text_config().max_position_embeddings - 1
        self.positions = (self.positions + 1).clamp(max=last)
        out = model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = out.logits[:, -1]


def draw(logits, temperature, top_p, u) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row, by inverting the cumulative distribution at u.

    logits [R, V] float; temperature, top_p, u [R] -> (tokens [R], their log-probs [R] at the
    temperature, before top_p). temperature 0 takes the largest logit, and reports its log-prob at
    temperature 1.
    """
    greedy = temperature == 0
    logps = (logits / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    kept = logps
    if (top_p < 1).any():
        sorted_p, order = logps.exp().sort(-1, descending=True)
        # The smallest set that reaches top_p stays; the most probable token always does.
        beyond = sorted_p.cumsum(-1) - sorted_p >= top_p[:, None]
        dropped = torch.zeros_like(beyond).scatter(1, order, beyond)
        kept = logps.masked_fill(dropped, float("-inf"))
    cdf = kept.double().exp().cumsum(-1)
    tokens = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    tokens = tokens.clamp(max=logits.shape[1] - 1)
    tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens, logps.gather(1, tokens[:, None])[:, 0]


class VLLMEngine(Engine):
    """Samples with vLLM, in this process: paged KV cache, continuous batching, and a prefix cache
    that the n continuations of a state share.

    It is stepped token by token: each row has the same `ThoughtTracker` as in `HFEngine`, which
    says when to stop the row, so a new thought needs no new request. Token ids go in and come out;
    vLLM decodes no text. Every request has its own random key. Under torchrun each process has an
    engine of its own, or `tp` neighbours share one by tensor parallelism and run the same programs
    in lockstep. Raises one of FAULTS where vLLM cannot be built (see `make_engine`).
    """

    name = "vllm"
    streams = True
    # What vLLM raises where it is missing, or does not fit the machine, the model or torch.
    FAULTS = (ImportError, OSError, RuntimeError, ValueError, AssertionError, AttributeError)

    def __init__(
        self,
        source,
        model,
        tokenizer,
        context: int,
        max_rows: int = 512,
        memory: float = 0.5,
        tp: int = 1,
        dtype: torch.dtype = torch.float32,
        lora_rank: int = 0,
    ):
        super().__init__()
        # Weights are handed over inside this process.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        self.gpu = torch.cuda.is_available()
        settings = vllm_settings(model.config, context, max_rows, memory, dtype)
        if lora_rank:
            settings |= vllm_adapters(lora_rank, dtype)
        if processes() > 1:
            settings["distributed_executor_backend"] = "external_launcher"
            settings["tensor_parallel_size"] = tp
        torch_rng = torch.get_rng_state()
        self.llm = LLM(
            str(source),
            max_model_len=context,
            max_num_seqs=max_rows,
            logprobs_mode="processed_logprobs",  # at the sampling temperature
            use_tqdm_on_load=False,
            disable_log_stats=True,
            **settings,
        )
        torch.set_rng_state(torch_rng)  # LLM() seeds torch's generator
        self.vocabulary = Vocabulary(tokenizer, eos_of(model))
        self.share, self.shares = rank() // tp, processes() // tp
        self.reports = rank() % tp == 0
        self.lockstep = tp > 1
        self.tied = model.config.get_text_config().tie_word_embeddings
        self.awake = True
        self.lora_rank = lora_rank
        self.adapters = None  # vLLM's LoRARequest of the newest ones; None: they are still zero
        self.under_way: dict[int, tuple[str, list[Row]]] = {}  # by ticket: vLLM's id, rows

    def sampling_params(self, request: Request):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=request.n,
            seed=request.rng_key,
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=request.max_tokens,
            stop_token_ids=sorted(self.vocabulary.eos),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def start(self, request: Request) -> int:
        ticket = self.ticket()
        rows = [Row(request, self.vocabulary) for _ in range(request.n)]
        state = {"prompt_token_ids": request.prompt_ids + request.prefix_ids}
        params = self.sampling_params(request)
        vllm_id = self.llm.llm_engine.add_request(
            str(ticket), state, params, lora_request=self.adapters
        )
        self.under_way[ticket] = vllm_id, rows
        return ticket

    def finished(self) -> list[tuple[int, list[Rollout]]]:
        """Steps until at least one request is complete.

        Log-probs are at the sampling temperature, after top_p truncation.
        """
        self.at = perf_counter()
        complete = []
        while not complete:
            stopped = []  # vLLM's ids of the rows that it must stop
            in_step = Counter()  # rows, by purpose
            for output in self.llm.llm_engine.step():
                ticket = int(output.request_id)
                stopped += self.take(ticket, output)
                _, rows = self.under_way[ticket]
                in_step[rows[0].request.purpose] += len(output.outputs)
                if all(row.over for row in rows) and ticket not in complete:
                    complete.append(ticket)
            self.llm.llm_engine.abort_request(stopped, internal=True)
            self.spend(in_step)  # a step without output is shared with the next one
        answers = []
        for ticket in complete:
            vllm_id, rows = self.under_way.pop(ticket)
            # vLLM still has an entry for a request whose rows were stopped.
            self.llm.llm_engine.abort_request([vllm_id], internal=True)
            answers.append((ticket, [row.rollout() for row in rows]))
        return answers

    def agreed(self, rewards: list) -> list:
        from vllm.distributed import get_tp_group

        return get_tp_group().broadcast_object(rewards)

    def take(self, ticket: int, output) -> list[str]:
        """Takes the new tokens of a request; returns vLLM's ids of the rows to stop."""
        vllm_id, rows = self.under_way[ticket]
        stopped = []
        for new in output.outputs:
            row = rows[new.index]
            for token, logp in zip(new.token_ids, new.logprobs.logprobs):
                if not row.over:
                    row.push(token, logp)
            if new.finish_reason and not row.over:
                raise RuntimeError(
                    f"vLLM ended a response ({new.finish_reason}, {new.stop_reason}) "
                    f"that is not over: {row.request}"
                )
            if row.over and not new.finish_reason:
                # vLLM's id of one of several continuations: its number, then the request's id.
                stopped.append(vllm_id if len(rows) == 1 else f"{new.index}_{vllm_id}")
        return stopped

    def sleep(self) -> None:
        """Before training: gives weights and KV cache back to the GPU. `sync` wakes it."""
        if self.gpu and self.awake:
            # 1 keeps the weights in host memory, 2 forgets them: sync brings new ones.
            self.llm.sleep(level=1 if self.lora_rank else 2)
            self.awake = False

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes the trained parameters, and forgets the old policy's KV."""
        if not self.awake:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        if self.lora_rank:
            self.take_adapters(weights)
        else:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.tied and not self.gpu:
            self.llm.apply_model(pack_head)
        if not self.awake:
            self.llm.wake_up(tags=["kv_cache"])
            self.awake = True
        self.llm.reset_prefix_cache()

    def take_adapters(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Gives vLLM new LoRA adapters, which it adds to its own weights' outputs.

        They are not merged: bf16 weights would round a small change away.
        """
        from vllm.lora.request import LoRARequest

        number = 1 + (self.adapters.lora_int_id if self.adapters else 0)
        with TemporaryDirectory() as folder:
            save_adapters(weights, self.lora_rank, folder)
            self.adapters = LoRARequest(f"update {number}", number, folder)
            self.llm.llm_engine.add_lora(self.adapters)


def vllm_adapters(lora_rank: int, dtype: torch.dtype) -> dict:
    """Settings for adapters. Raises ValueError where vLLM cannot have them."""
    room = [rank for rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) if rank >= lora_rank]
    if not room:
        raise ValueError("its LoRA adapters have a rank of 512 at most")
    if torch.cuda.is_available() and dtype == torch.float32:
        raise ValueError("its LoRA adapters compute in bfloat16 on a GPU, not in float32")
    return {"enable_lora": True, "max_lora_rank": room[0]}


def pack_head(model) -> None:
    """Renews the packed copy that a tied head has on a CPU; vLLM packs it only when it loads."""
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def vllm_settings(config, context: int, max_rows: int, memory: float, dtype) -> dict:
    """How vLLM is built on this machine. memory: its share of a GPU's memory."""
    if torch.cuda.is_available():
        return {
            "dtype": dtype,
            "gpu_memory_utilization": memory,
            "enable_sleep_mode": True,
        }
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    # 8 bytes: 2 (key, value) x 4 (float32), for each layer and token of each row
    cache = 8 * config.num_hidden_layers * heads * head_size * context * max_rows
    return {
        "dtype": dtype,  # float32 with eager agrees with transformers
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": min(max(cache, 64 << 20), 2 << 30),
        "enable_chunked_prefill": False,  # with it a seeded request fails on a CPU
        "max_num_batched_tokens": max(context, 8192),
    }


def make_engine(
    name: str,
    source,
    model,
    tokenizer,
    context: int,
    max_rows: int = 512,
    memory: float = 0.5,
    tp: int = 1,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    lora_rank: int = 0,
) -> Engine:
    """The engine called `name`: hf, vllm, or auto; prints which one it is, and why.

    auto: vLLM where it imports and constructs on every process, else transformers. device:
    transformers samples with a copy of the model there (None: with the model itself). dtype: of
    the copy, and of vLLM. lora_rank: of adapters that the model has. Raises UserError where vllm
    was asked for and cannot be had.
    """
    engine, why = None, "asked for"
    if name != "hf":
        arguments = (policy_source(source), model, tokenizer, context, max_rows, memory, tp)
        engine, fault = try_vllm(*arguments, dtype, lora_rank)
        if fault and name == "vllm":
            raise UserError(f"--engine vllm: {fault}; see README, Run it, or use --engine hf")
        if name == "auto":
            why = fault or "vLLM imports and constructs here"
    if engine is None:
        if tp > 1:
            raise UserError(f"--tp {tp} needs the vLLM engine ({why})")
        engine = HFEngine(model, tokenizer, max_rows, device, dtype)
    if rank() == 0:
        print(f"engine: {engine.name} ({why})")
    return engine


def try_vllm(*arguments) -> tuple["VLLMEngine | None", str | None]:
    """(engine, None), or on every process (None, why not) where one cannot use vLLM."""
    engine = fault = None
    try:
        engine = VLLMEngine(*arguments)
    except VLLMEngine.FAULTS as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        fault = f"vLLM cannot be used: {type(error).__name__}: {reason}"
    for told in gather(fault):
        if told:
            return None, told
    return engine, None


def demo() -> None:
    model, tokenizer = load_policy("embedded")
    engine = HFEngine(model, tokenizer)
    (task,) = make_tasks(generate_chains(steps=6, n=1, seed=0), engine, context=384, base=4)
    (group,) = run_programs([grpo(task)], engine).results
    print(task.problem.question, "->", task.problem.answer)
    for rollout in group:
        thoughts = " | ".join(rollout.thoughts(tokenizer))
        print(f"reward {rollout.reward:.0f}, {rollout.finish}: {thoughts}")


if __name__ == "__main__":
    demo()
