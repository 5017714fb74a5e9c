"""Sampling: the record, the programs that say what to sample, the driver that batches them, and the engine that samples.

SRPO steps 1, 2 and 4 ("Credit Assignment with Resets in Language Model Reasoning", arXiv 2605.25507): base group, seed, reset state,
suffix group. The data flow of one training step:

    problem -> program yields Requests -> `run_programs` gives the requests of ALL problems to one engine -> it samples token ids,
    a `ThoughtTracker` cuts them into thoughts -> graded `Rollout`s go back into the program -> its return value is what is trained on

Two engines with one interface: `HFEngine` (transformers, everywhere) samples all that is waiting as one batch, `VLLMEngine` (vLLM, for
speed) lets problems go on to localization and suffixes while others still sample their base group.
With several processes each engine takes its share of the programs, and every process gets all rollouts.

A method is a generator for ONE problem that reads like the paper's algorithm box (`grpo` and `resets` below); to add an idea, add one
such function. State is token ids from end to end: text is decoded for graders, localizers and people, and never encoded again.

Departures from the paper's released code: the base group stays i.i.d. (a seed is read from it, not taken out of it), reset groups
are never topped up from another state, every generated token is kept and counted, and all randomness is a function of the seed.
Left out: speculative decoding, and keeping the KV cache of a seed for its suffixes beyond what vLLM's prefix cache does.

Try it alone:  python rollout.py        # samples a base group from the embedded policy and prints the cut thoughts
"""

import copy
import os
import re
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Callable, Generator, Iterable

import numpy as np
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.logging import disable_progress_bar

from data.faults import UserError, counters
from data.parallel import gather, processes, rank
from data.problems import Problem
from data.verifiers import DELIMITER, last_boxed

# -------------------------------------------------------------------------------------------------------------------- record


@dataclass
class Rollout:
    """One sampled response. Everything later (advantages, masks, metrics, trees, the JSON on disk) is read from this record."""

    problem: int  # Problem.index
    purpose: str  # base | seed | suffix | localization | oracle: what its tokens were spent on
    prompt_ids: list[int]
    token_ids: list[int]  # the response, shared prefix included
    logps: list[
        float
    ]  # of token_ids under the sampler, at the sampling temperature, before any top_p truncation
    thought_ends: list[
        int
    ]  # thought h is token_ids[thought_ends[h-2]:thought_ends[h-1]] (h from 1); the last equals len(token_ids)
    finish: str  # answer | eos | thoughts | length: why it ended
    text: str = ""
    prefix_len: int = 0  # tokens shared with the seed (0 for a base rollout); never sampled again, never trained on
    reward: float | None = None  # in [0, 1]; None for localization answers
    group: tuple[int, int] | None = (
        None  # (slot in the step, group of that slot); rollouts of one group share one state
    )
    seed: "Rollout | None" = field(
        default=None, repr=False
    )  # suffixes: the incorrect rollout whose prefix they share
    reset: int | None = (
        None  # suffixes: h*, the 1-based index of the first thought that is sampled again
    )
    localized: str | None = None  # suffixes: how h* was found (see localize.py)
    localization: "Rollout | None" = field(
        default=None, repr=False
    )  # seeds: what the policy answered when asked for h*
    advantage: float = 0.0

    @property
    def generated(self) -> int:
        """Tokens that were sampled for it: the response without the shared prefix."""
        return len(self.token_ids) - self.prefix_len

    def prefix(self, h: int) -> list[int]:
        """Tokens of thoughts 1..h-1: the response part of the reset state s_{h-1}."""
        return self.token_ids[: self.thought_ends[h - 2]] if h > 1 else []

    def thoughts(self, tokenizer) -> list[str]:
        """Texts of its H thoughts."""
        starts = [0, *self.thought_ends[:-1]]
        return [tokenizer.decode(self.token_ids[a:b]) for a, b in zip(starts, self.thought_ends)]


@dataclass
class Request:
    """n i.i.d. continuations of prompt_ids + prefix_ids."""

    problem: int
    purpose: str
    prompt_ids: list[int]
    n: int
    rng_key: (
        int  # the continuations are a function of (policy, request), whatever else is in the batch
    )
    max_tokens: int  # generated tokens, at most
    temperature: float
    top_p: float
    prefix_ids: list[int] = field(default_factory=list)
    prefix_logps: list[float] = field(default_factory=list)
    prefix_ends: list[int] = field(default_factory=list)  # thought ends inside prefix_ids
    max_thoughts: int | None = (
        None  # prefix included; None: no thoughts in it (a localization answer), it ends at eos or max_tokens
    )
    max_tokens_per_thought: int | None = None
    grade: Callable[[str], float] | None = None
    slow: bool = (
        False  # grading waits for other processes: it is done in threads, while sampling goes on
    )


# ---------------------------------------------------------------------------------------------------------------- boundaries


class ThoughtTracker:
    """Follows a response token by token and says where thoughts end and when it is over. One logic for every engine.

    A thought ends after the token that completes the delimiter in decoded text, also when the delimiter starts or ends inside a token,
    or after `max_tokens_per_thought` tokens. The response ends ("answer") with the thought in which a `\\boxed{...}` has been closed.

    Example, tokens "a", "</thou", "ght>b", "c", <eos>:  thought_ends == [3, 5], finish == "eos".
    """

    WINDOW = (
        len(DELIMITER) + 1
    )  # a token holds at least one byte, so this many tokens hold a whole delimiter

    def __init__(self, vocabulary: "Vocabulary", request: Request):
        self.vocabulary, self.request = vocabulary, request
        self.ids = list(request.prefix_ids)
        self.thought_ends = list(request.prefix_ends)
        self.finish: str | None = None
        self.brace = False  # a token with "}" since the last boundary: the only thoughts that need to be read for a box

    def push(self, token: int) -> None:
        """Takes the next token; `finish` is set when the response is over with it."""
        self.ids.append(token)
        request, vocabulary = self.request, self.vocabulary
        generated = len(self.ids) - len(request.prefix_ids)
        thought = len(self.ids) - (self.thought_ends[-1] if self.thought_ends else 0)
        if token in vocabulary.eos:
            self.finish = "eos"
        elif request.max_thoughts is not None:
            self.brace |= token in vocabulary.braces
            if (
                token in vocabulary.closers and self.completes_delimiter()
            ) or thought >= request.max_tokens_per_thought:
                self.thought_ends.append(len(self.ids))
                if self.brace and last_boxed(
                    vocabulary.decode(self.ids)
                ):  # not an empty box, which repeats the instruction
                    self.finish = "answer"
                elif len(self.thought_ends) >= request.max_thoughts:
                    self.finish = "thoughts"
                self.brace = False
        if self.finish is None and generated >= request.max_tokens:
            self.finish = "length"
        if self.finish and (not self.thought_ends or self.thought_ends[-1] < len(self.ids)):
            self.thought_ends.append(len(self.ids))

    def completes_delimiter(self) -> bool:
        decode = self.vocabulary.decode
        return decode(self.ids[-self.WINDOW :]).count(DELIMITER) > decode(
            self.ids[-self.WINDOW : -1]
        ).count(DELIMITER)


class Vocabulary:
    """What boundaries need of a tokenizer: which tokens can complete a delimiter or a box, which end the response, and decoding."""

    def __init__(self, tokenizer, eos: set[int] | None = None):
        self.tokenizer = tokenizer
        pieces = tokenizer.get_vocab().items()
        self.closers = {i for piece, i in pieces if DELIMITER[-1] in piece or piece == "<0x3E>"}
        self.braces = {i for piece, i in pieces if "}" in piece or piece == "<0x7D>"}
        self.eos = set(eos or ()) | ({tokenizer.eos_token_id} - {None})

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


# ------------------------------------------------------------------------------------------------------------------ programs


@dataclass
class Task:
    """What a program sees of the world: one problem at one slot of one step. All randomness comes from `rng`."""

    problem: Problem
    prompt_ids: list[int]
    slot: int  # position in the step: the same problem twice in a step is two tasks
    cfg: "Config"  # noqa: F821  (srpo.Config)
    vocabulary: Vocabulary
    localize: (
        Callable | None
    )  # (task, seeds) -> generator returning [(h* or None, how)], see localize.py
    rng: np.random.Generator
    context: int  # longest sequence the model takes, tokens

    def request(self, purpose: str, n: int, seed: Rollout | None = None, h: int = 1) -> Request:
        """n continuations of the state before thought h of `seed` (of the prompt, without one), under the run's sampling settings."""
        cfg = self.cfg
        prefix = seed.prefix(h) if seed else []
        room = self.context - len(self.prompt_ids) - len(prefix)
        return Request(
            self.problem.index, purpose, self.prompt_ids, n, int(self.rng.integers(2**62)),
            max_tokens=min(room, cfg.max_thoughts * cfg.max_tokens_per_thought - len(prefix)),
            temperature=cfg.temperature, top_p=cfg.top_p,
            prefix_ids=prefix, prefix_logps=seed.logps[: len(prefix)] if seed else [], prefix_ends=seed.thought_ends[: h - 1] if seed else [],
            max_thoughts=cfg.max_thoughts, max_tokens_per_thought=cfg.max_tokens_per_thought, grade=self.problem.grade, slow=self.problem.slow,
        )  # fmt: skip


INSTRUCTION = f"""{{question}}

Solve this step by step. Write {DELIMITER} at the end of each step of your reasoning. {{ending}}"""
ENDINGS = {  # by kind of problem
    "choice": "Put the letter of the right choice in \\boxed{}.",
    "yes_no": "Put the final answer, yes or no, in \\boxed{}.",
    "code": "End with the whole program in one ```python block.",
}


def locate_token(tokenizer) -> int | None:
    """Id of <locate>, or None. A terse policy has this token: it was trained on bare questions, and reviews when it reads it."""
    found = tokenizer.convert_tokens_to_ids(
        "<locate>"
    )  # (get_vocab() would take 0.1 s a prompt for a vocabulary of 50,000)
    return None if found == tokenizer.unk_token_id else found


def encode_question(tokenizer, problem: Problem) -> list[int]:
    """Prompt token ids x0 of a problem: its bare question for a terse policy, else with the thought-format instruction."""
    if locate_token(tokenizer) is not None:
        return tokenizer(problem.question)["input_ids"]
    ending = ENDINGS.get(problem.kind, "Put the final answer in \\boxed{}.")
    return encode_prompt(tokenizer, INSTRUCTION.format(question=problem.question, ending=ending))


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Token ids of a user message: through the chat template where the tokenizer has one, else the plain text.

    Special tokens that the text spells (the end-of-text of a thought under review, say) become a space: they would end the message."""
    special = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content != DELIMITER
    ]
    text = re.sub("|".join(map(re.escape, special)), " ", text) if special else text
    if tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    return tokenizer(text)["input_ids"]


Program = Generator[
    list[Request], list[list[Rollout]], list[Rollout]
]  # yields requests, is sent n rollouts for each, returns a buffer


def failed(rollout: Rollout, task: Task) -> bool:
    return rollout.reward < task.cfg.correct


def grpo(task: Task) -> Program:
    """GRPO: one i.i.d. group from the prompt."""
    (base,) = yield [task.request("base", task.cfg.base)]
    return in_group(task, 0, base)


def resets(task: Task) -> Program:
    """SRPO, and RRPO with the random localizer: a base group, then one suffix group from each reset state (paper steps 1-4).

    Each prefix for which no seed is found gives its suffixes back to the base group: with none at all this is plain GRPO."""
    cfg = task.cfg
    base = (yield [task.request("base", cfg.base)])[0] if cfg.base else []
    seeds = yield from find_seeds(task, base)
    missing = (cfg.prefixes - len(seeds)) * cfg.suffixes
    requests = [task.request("suffix", cfg.suffixes, seed, h) for seed, h, _ in seeds]
    if missing:
        counters["no_seed"] += cfg.prefixes - len(seeds)
        requests.append(task.request("base", missing))
    groups = yield requests
    if missing:
        base = base + groups.pop()
    buffer = in_group(task, 0, base)
    for k, ((seed, h, how), group) in enumerate(zip(seeds, groups), 1):
        for rollout in group:
            rollout.seed, rollout.reset, rollout.localized = seed, h, how
        buffer += in_group(task, k, group)
    return buffer


SEED_ROUND = 4  # fresh draws asked for at once


def find_seeds(task: Task, base: list[Rollout]) -> Generator:
    """Paper steps 2 and 3: up to `prefixes` seeds with their reset index, [(seed, h*, how it was localized)].

    Seeds are failed members of the base group (which stay in it, so it stays i.i.d.), or, with `--seed_source fresh` or when the base
    group has too few failures, at most `max_seed_draws` fresh draws, which cost tokens and are trained on by nobody.
    `--seed_choice first` (the paper) takes failures as they come; `deepest` localizes all it has and keeps the largest h*."""
    cfg = task.cfg
    seeds = [r for r in base if failed(r, task)] if cfg.seed_source == "base" else []
    draws = 0
    while len(seeds) < cfg.prefixes and draws < cfg.max_seed_draws:
        n = min(SEED_ROUND, cfg.max_seed_draws - draws)
        (fresh,) = yield [task.request("seed", n)]
        seeds += [r for r in fresh if failed(r, task)]
        draws += n
    if cfg.seed_choice == "first":
        seeds = seeds[: cfg.prefixes]
    found = (yield from task.localize(task, seeds)) if seeds else []
    located = [(seed, h, how) for seed, (h, how) in zip(seeds, found) if h is not None]
    if cfg.seed_choice == "deepest":
        located.sort(key=lambda item: -item[1])  # stable: ties keep the order of sampling
    return located[: cfg.prefixes]


def in_group(task: Task, k: int, rollouts: list[Rollout]) -> list[Rollout]:
    for rollout in rollouts:
        rollout.group = (task.slot, k)
    return rollouts


PROGRAMS = {"grpo": grpo, "rrpo": resets, "srpo": resets}

# -------------------------------------------------------------------------------------------------------------------- driver


@dataclass
class Sampled:
    """What the programs of one step returned, and what it cost."""

    results: list  # each program's return value
    generated: list[Rollout]  # every rollout that was sampled
    seconds: Counter  # by purpose


def run_programs(programs: list[Program], engine) -> Sampled:
    """Runs all programs together: each goes on as soon as what it waits for has been sampled.

    With several processes each runs the share of its engine (every n-th program), and all of them get the results of all.
    Returns ([each program's return value], [every rollout that was generated, for counting costs], seconds by purpose, for "grade", and
    for "wait", until the slowest process was done; seconds of sampling are shared out by generated tokens)."""
    share, shares = engine.share
    done, generated, waiting, owner = (
        {},
        {},
        {},
        {},
    )  # by program, and by ticket: (program, place in what it waits for, request)
    seconds, tokens, faults = Counter(), Counter(), counters.copy()

    def advance(i: int, answer) -> None:
        try:
            requests = programs[i].send(answer)
            while not requests:
                requests = programs[i].send([])
        except StopIteration as end:
            done[i] = end.value
        else:
            waiting[i] = [None] * len(requests)
            owner.update(
                {
                    engine.start(request): (i, place, request)
                    for place, request in enumerate(requests)
                }
            )

    for i in range(share, len(programs), shares):
        generated[i] = []
        advance(i, None)
    grading: dict[
        int, tuple[list[Rollout], list]
    ] = {}  # by ticket: rollouts, and their rewards or promises of them
    while owner:
        start = time.perf_counter()
        finished = engine.finished() if len(grading) < len(owner) else []
        sampled = time.perf_counter()
        seconds["sample"] += sampled - start
        for ticket, rollouts in finished:
            request = owner[ticket][2]
            tokens[request.purpose] += sum(r.generated for r in rollouts)
            grade = request.grade or (lambda text: None)
            grading[ticket] = (
                rollouts,
                [
                    graders().submit(grade, r.text) if request.slow else grade(r.text)
                    for r in rollouts
                ],
            )
        ready = [
            t
            for t, (_, rewards) in grading.items()
            if not engine.streams or all(not isinstance(r, Future) or r.done() for r in rewards)
        ]
        if not ready and len(grading) == len(owner):  # nothing is left to sample meanwhile
            wait(
                [
                    r
                    for _, rewards in grading.values()
                    for r in rewards
                    if isinstance(r, Future) and not r.done()
                ],
                return_when=FIRST_COMPLETED,
            )
        for ticket in ready:
            rollouts, rewards = grading.pop(ticket)
            for rollout, reward in zip(rollouts, rewards):
                rollout.reward = reward.result() if isinstance(reward, Future) else reward
            i, place, _ = owner.pop(ticket)
            waiting[i][place] = rollouts
        seconds["grade"] += time.perf_counter() - sampled
        for i in sorted(i for i, groups in waiting.items() if None not in groups):
            groups = waiting.pop(i)
            generated[i] += [rollout for group in groups for rollout in group]
            advance(i, groups)
    sampling = seconds.pop("sample", 0.0)
    seconds.update({purpose: sampling * n / tokens.total() for purpose, n in tokens.items()})
    start = time.perf_counter()
    parts = gather((done, generated, counters - faults) if engine.speaks else ({}, {}, Counter()))
    counters.clear()
    counters.update(sum((part[2] for part in parts), faults))
    seconds["wait"] = time.perf_counter() - start
    done, generated = ({i: x for part in parts for i, x in part[k].items()} for k in (0, 1))
    return Sampled(
        [done[i] for i in range(len(programs))],
        [r for i in range(len(programs)) for r in generated[i]],
        seconds,
    )


@cache
def graders() -> ThreadPoolExecutor:
    """Threads that wait for slow verifiers: sandboxed programs, math-verify's processes."""
    return ThreadPoolExecutor(os.cpu_count())


# ------------------------------------------------------------------------------------------------------------------- engines


class Engine:
    """What samples. `start` takes a request and gives a ticket; `finished` samples until requests are complete, and gives their rollouts.

    streams: whether `finished` can give some requests while others are still sampled.
    share: (k, n), it takes every n-th program from the k-th on. speaks: whether it reports them (of engines that run the same ones, one)."""

    tickets, streams = 0, False

    def ticket(self) -> int:
        self.tickets += 1
        return self.tickets

    def start(self, request: Request) -> int: ...

    def finished(self) -> list[tuple[int, list[Rollout]]]: ...

    def sleep(self) -> None: ...  # before training: gives memory back

    def sync(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> None: ...  # after a step: the trainer's weights by name, whole

    def sample(self, requests: list[Request]) -> list[list[Rollout]]:
        """request.n rollouts for each request, ungraded."""
        tickets, answers = [self.start(request) for request in requests], {}
        while len(answers) < len(tickets):
            answers.update(self.finished())
        return [answers[ticket] for ticket in tickets]


class HFEngine(Engine):
    """Samples with a transformers model in this process: KV cache, one prefill per state, finished rows leave the batch.

    In a run of one CPU process it holds the trainer's own model, and `sync` has nothing to copy; where the trainer's is sharded it holds
    one of its own, on `device`, bf16 on a GPU. Randomness is counter-based: token t of row i of a request uses uniform number t of the generator keyed
    (request.rng_key, i), so a response does not depend on what else is in the batch, nor on the number of processes."""

    name, speaks = "hf", True

    def __init__(self, model, tokenizer, max_rows: int = 512, device: torch.device | None = None):
        self.max_rows, self.copies = max_rows, device is not None
        self.model = (
            copy.deepcopy(model).to(
                device, torch.bfloat16 if device.type == "cuda" else torch.float32
            )
            if self.copies
            else model
        )
        if self.model.config._attn_implementation == "sdpa":
            self.model.set_attn_implementation("grouped")
        self.vocabulary = Vocabulary(tokenizer, eos_of(model))
        self.pad = tokenizer.pad_token_id
        self.share = (rank(), processes())
        self.queue: dict[int, Request] = {}

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes the weights where it has a model of its own; the trainer's own model needs nothing."""
        if self.copies:
            mine = dict(self.model.named_parameters())
            for name, weight in weights:
                mine[name].data.copy_(weight)

    def start(self, request: Request) -> int:
        ticket = self.ticket()
        self.queue[ticket] = request
        return ticket

    def finished(self) -> list[tuple[int, list[Rollout]]]:
        """All that was started. Requests of like length share a batch of at most `max_rows` rows."""
        requests, self.queue = self.queue, {}
        answers = {ticket: [] for ticket in requests}
        rows = [(ticket, i) for ticket, request in requests.items() for i in range(request.n)]
        rows.sort(
            key=lambda row: (
                len(requests[row[0]].prompt_ids) + len(requests[row[0]].prefix_ids),
                row,
            )
        )
        training = self.model.training
        self.model.eval()
        for at in range(0, len(rows), self.max_rows):
            batch = rows[at : at + self.max_rows]
            for (ticket, _), rollout in zip(batch, self._sample_batch(requests, batch)):
                answers[ticket].append(rollout)
        self.model.train(training)
        return list(answers.items())

    @torch.inference_mode()
    def _sample_batch(
        self, requests: dict[int, Request], rows: list[tuple[int, int]]
    ) -> list[Rollout]:
        device = self.model.device
        states = list(
            dict.fromkeys(k for k, _ in rows)
        )  # each state is prefilled once, whatever its n
        contexts = [requests[k].prompt_ids + requests[k].prefix_ids for k in states]
        width = max(map(len, contexts))
        ids = torch.tensor(
            [[self.pad] * (width - len(c)) + c for c in contexts], device=device
        )  # [states, width], left-padded
        mask = torch.tensor(
            [[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=device
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [
            RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
        ]
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        expand = torch.tensor(
            [states.index(k) for k, _ in rows], device=device
        )  # [rows] -> its state
        cache.batch_select_indices(expand)
        logits, mask, positions = logits[expand], mask[expand], positions[expand, -1]

        request = [requests[k] for k, _ in rows]
        temperature = torch.tensor([r.temperature for r in request], device=device)
        top_p = torch.tensor([r.top_p for r in request], device=device)
        trackers = [ThoughtTracker(self.vocabulary, r) for r in request]
        uniforms = [
            np.random.default_rng([r.rng_key, i]).random(r.max_tokens)
            for r, (_, i) in zip(request, rows)
        ]
        logps: list[list[float]] = [[] for _ in rows]
        live = list(range(len(rows)))  # live[j] is the row in place j of the batch
        step = 0
        while live:
            u = torch.tensor([uniforms[i][step] for i in live], device=device, dtype=torch.float64)
            tokens, picked = draw(logits.float(), temperature, top_p, u)
            stay = []
            for j, (i, token, logp) in enumerate(zip(live, tokens.tolist(), picked.tolist())):
                logps[i].append(logp)
                trackers[i].push(token)
                if trackers[i].finish is None:
                    stay.append(j)
            step += 1
            if len(stay) < len(live):
                keep = torch.tensor(stay, device=device, dtype=torch.long)
                live = [live[j] for j in stay]
                if not live:
                    break
                cache.batch_select_indices(keep)
                tokens, mask, positions, temperature, top_p = (
                    tokens[keep],
                    mask[keep],
                    positions[keep],
                    temperature[keep],
                    top_p[keep],
                )
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)
            positions = positions + 1
            out = self.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits = out.logits[:, -1]
        return [
            as_rollout(r, tracker, r.prefix_logps + lp, self.vocabulary)
            for r, tracker, lp in zip(request, trackers, logps)
        ]


class RoomyLayer(DynamicLayer):
    """KV cache of a layer with room for the next tokens: transformers' own copies all of it for each token, 40% of the time of a small model."""

    ROOM = 64  # tokens

    def __init__(self):
        super().__init__()
        self.room = None  # [keys, values], each [rows, heads, tokens and room, head size]; self.keys and self.values are its first tokens

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        n, new = self.get_seq_length(), keys.shape[-2]
        if (
            self.room is None
            or self.keys.data_ptr() != self.room[0].data_ptr()
            or n + new > self.room[0].shape[-2]
        ):  # at first, where rows left, where it is full
            self.room = [
                part.new_empty(*part.shape[:2], n + new + self.ROOM, part.shape[-1])
                for part in (keys, values)
            ]
            if n:
                self.room[0][:, :, :n], self.room[1][:, :, :n] = self.keys, self.values
        self.room[0][:, :, n : n + new], self.room[1][:, :, n : n + new] = keys, values
        self.keys, self.values = (part[:, :, : n + new] for part in self.room)
        return self.keys, self.values


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' sdpa, but for one new token the query heads that share keys and values are rows of one query: theirs copies keys and
    values for each head, over half the time of many rows. query [rows, heads, 1, size]; key, value [rows, KV heads, tokens, size]."""
    rows, heads, length, size = query.shape
    if length > 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    query = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    seen = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, scale=scaling
    )
    return seen.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)


def draw(logits, temperature, top_p, u):
    """One token for each row by inverting the cumulative distribution at u.

    logits [B, V] float; temperature, top_p, u [B] -> (tokens [B], their log-probs [B] at the temperature, before top_p).
    temperature 0 takes the largest logit, and reports its log-prob at temperature 1."""
    greedy = temperature == 0
    logps = (logits / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    if (top_p < 1).any():
        sorted_p, order = logps.exp().sort(-1, descending=True)
        beyond = (
            sorted_p.cumsum(-1) - sorted_p >= top_p[:, None]
        )  # the smallest set that reaches top_p stays; its first token always
        kept = logps.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))
    else:
        kept = logps
    cdf = kept.double().exp().cumsum(-1)
    tokens = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp(
        max=logits.shape[1] - 1
    )
    tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens, logps.gather(1, tokens[:, None])[:, 0]


class VLLMEngine(Engine):
    """Samples with vLLM, in this process: paged KV cache, a prefix cache that the n continuations of a state share, continuous batching.

    Stepped token by token: each row has the same `ThoughtTracker` as in `HFEngine`, and is ended when that says so, without a round trip
    per thought. Token ids go in and come out; vLLM decodes no text. Every request has its own seed.
    Under torchrun every process has an engine of its own, or `tp` neighbours share one by tensor parallelism: then all of them run
    the same programs, in step, and the first one speaks for them. Raises what vLLM raises where it cannot be built (`make_engine`)."""

    name, streams = "vllm", True
    FAULTS = (
        ImportError,
        OSError,
        RuntimeError,
        ValueError,
        AssertionError,
        AttributeError,
    )  # of an engine that does not construct

    def __init__(
        self,
        source,
        model,
        tokenizer,
        context: int,
        max_rows: int = 512,
        memory: float = 0.5,
        tp: int = 1,
    ):
        os.environ.setdefault(
            "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
        )  # weights are handed over inside this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.gpu = torch.cuda.is_available()
        if self.gpu:
            settings = dict(dtype="bfloat16", gpu_memory_utilization=memory, enable_sleep_mode=True)
        else:  # float32 and eager agree with transformers; with chunked prefill a seeded request fails on a CPU
            config = model.config
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            width = (
                getattr(config, "head_dim", None)
                or config.hidden_size // config.num_attention_heads
            )
            cache = (
                8 * config.num_hidden_layers * heads * width * context * max_rows
            )  # bytes: key and value, float32, of every row
            settings = dict(dtype="float32", enforce_eager=True, block_size=32, kv_cache_memory_bytes=min(max(cache, 64 << 20), 2 << 30),
                            enable_chunked_prefill=False, max_num_batched_tokens=max(context, 8192))  # fmt: skip
        if processes() > 1:
            settings |= dict(
                distributed_executor_backend="external_launcher", tensor_parallel_size=tp
            )
        torch_rng = torch.get_rng_state()
        self.llm = LLM(
            str(source), max_model_len=context, max_num_seqs=max_rows, logprobs_mode="processed_logprobs", use_tqdm_on_load=False,
            disable_log_stats=True, **settings,
        )  # fmt: skip
        torch.set_rng_state(torch_rng)  # LLM() seeds torch's generator
        self.vocabulary = Vocabulary(tokenizer, eos_of(model))
        self.share, self.speaks = (rank() // tp, processes() // tp), rank() % tp == 0
        self.tied = model.config.get_text_config().tie_word_embeddings
        self.awake = True
        self.under_way: dict[int, tuple[Request, str, list]] = {}  # by ticket
        self.params = lambda r: SamplingParams(
            n=r.n, seed=r.rng_key, temperature=r.temperature, top_p=r.top_p, max_tokens=r.max_tokens, stop_token_ids=sorted(self.vocabulary.eos),
            logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip

    def start(self, request: Request) -> int:
        ticket = self.ticket()
        rows = [
            (ThoughtTracker(self.vocabulary, request), list(request.prefix_logps))
            for _ in range(request.n)
        ]
        name = self.llm.llm_engine.add_request(
            str(ticket),
            {"prompt_token_ids": request.prompt_ids + request.prefix_ids},
            self.params(request),
        )
        self.under_way[ticket] = request, name, rows
        return ticket

    def finished(self) -> list[tuple[int, list[Rollout]]]:
        """Steps until at least one request is complete. Log-probs are at the sampling temperature, after top_p truncation."""
        engine, complete = self.llm.llm_engine, []
        while not complete:
            over = []  # vLLM's names of the rows that it is to stop
            for output in engine.step():
                request, name, rows = self.under_way[int(output.request_id)]
                for new in output.outputs:  # the next token of row new.index
                    tracker, logps = rows[new.index]
                    for token, logp in zip(new.token_ids, new.logprobs.logprobs):
                        if tracker.finish is None:
                            tracker.push(token)
                            logps.append(logp)
                    if new.finish_reason and tracker.finish is None:
                        raise RuntimeError(
                            f"vLLM ended a response ({new.finish_reason}, {new.stop_reason}) that is not over: {request}"
                        )
                    if tracker.finish and not new.finish_reason:
                        over.append(name if request.n == 1 else f"{new.index}_{name}")
                if (
                    all(tracker.finish for tracker, _ in rows)
                    and int(output.request_id) not in complete
                ):
                    complete.append(int(output.request_id))
            engine.abort_request(over, internal=True)
        answers = []
        for ticket in complete:
            request, name, rows = self.under_way.pop(ticket)
            engine.abort_request(
                [name], internal=True
            )  # what vLLM still keeps about a request whose rows were stopped
            answers.append((ticket, [as_rollout(request, *row, self.vocabulary) for row in rows]))
        return answers

    def sleep(self) -> None:
        """Before training: gives weights and KV cache back to the GPU. `sync` wakes it."""
        if self.gpu and self.awake:
            self.llm.sleep(level=2)
            self.awake = False

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """After an optimizer step: takes the trainer's weights one after the other, and forgets the KV of the old policy."""
        if not self.awake:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.tied and not self.gpu:  # on a CPU the tied head keeps a packed copy of its own
            self.llm.apply_model(
                lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head)
            )
        if not self.awake:
            self.llm.wake_up(tags=["kv_cache"])
            self.awake = True
        self.llm.reset_prefix_cache()


def as_rollout(
    request: Request, tracker: ThoughtTracker, logps: list[float], vocabulary: Vocabulary
) -> Rollout:
    return Rollout(
        request.problem, request.purpose, request.prompt_ids, tracker.ids, logps, tracker.thought_ends, tracker.finish,
        text=vocabulary.decode(tracker.ids), prefix_len=len(request.prefix_ids),
    )  # fmt: skip


def eos_of(model) -> set[int]:
    eos = model.generation_config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos} - {None}


# ------------------------------------------------------------------------------------------------------------------- loading


def load_policy(source: str | Path, dtype: torch.dtype = torch.float32):
    """(model on the CPU, tokenizer) from a folder in Hugging Face layout or a hub id. Raises UserError with what to mend."""
    disable_progress_bar()  # of weight loading: a tiny model would print more bars than steps
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as fault:
        raise UserError(
            f"--model {source}: cannot be loaded ({str(fault).strip().splitlines()[0]}); give a Hugging Face folder or hub id"
        )
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"--model {source}: its tokenizer has no pad token; set one in tokenizer_config.json (the eos token will do)"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"--model {source}: the tokenizer has more tokens ({len(tokenizer)}) than the model has embeddings; they do not belong together"
        )
    return model, tokenizer


def make_engine(
    name: str,
    source,
    model,
    tokenizer,
    context: int,
    max_rows: int = 512,
    memory: float = 0.5,
    tp: int = 1,
    device=None,
):
    """The engine called `name`: hf, vllm, or auto: vLLM where it imports and constructs on every process, else transformers; it says which
    and why. device: transformers samples with a copy of the model there (None: with the model itself). Raises UserError where vllm was asked
    for and cannot be had."""
    engine, why = None, "asked for"
    if name != "hf":
        try:
            engine, fault = (
                VLLMEngine(source, model, tokenizer, context, max_rows, memory, tp),
                None,
            )
        except VLLMEngine.FAULTS as error:
            fault = f"vLLM cannot be used: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        faults = [f for f in gather(fault) if f]
        if faults and name == "vllm":
            raise UserError(f"--engine vllm: {faults[0]}; see README, Install, or use --engine hf")
        if name == "auto":
            why = faults[0] if faults else "vLLM imports and constructs here"
        if faults:
            engine = None
    if engine is None:
        if tp > 1:
            raise UserError(f"--tp {tp} needs the vLLM engine ({why})")
        engine = HFEngine(model, tokenizer, max_rows, device)
    if rank() == 0:
        print(f"engine: {engine.name} ({why})")
    return engine


if __name__ == "__main__":
    from types import SimpleNamespace

    from data.chains import generate_chains

    model, tokenizer = load_policy(Path(__file__).resolve().parent / "data" / "policy")
    cfg = SimpleNamespace(
        base=4, temperature=1.0, top_p=1.0, max_thoughts=20, max_tokens_per_thought=256
    )
    engine = HFEngine(model, tokenizer)
    (problem,) = generate_chains(steps=6, n=1, seed=0)
    task = Task(
        problem,
        encode_question(tokenizer, problem),
        0,
        cfg,
        engine.vocabulary,
        None,
        np.random.default_rng(0),
        384,
    )
    (group,) = run_programs([grpo(task)], engine).results
    print(problem.question, "->", problem.answer)
    for rollout in group:
        print(
            f"reward {rollout.reward:.0f}, {rollout.finish}:",
            " | ".join(rollout.thoughts(tokenizer)),
        )
