"""Baselines that the paper compares with, each as one program for `--method`.

  vineppo        VinePPO (arXiv 2410.01679): a Monte-Carlo value before and after every thought
  spo_tree       SPO-tree (arXiv 2505.23564): values of a tree of segments
  critique_grpo  Critique-GRPO (arXiv 2506.03106): refinements that saw a critique, off-policy
  corrections    iterated corrections, an option of the SRPO release (not of its paper)
  score_stage1   SCoRe (arXiv 2409.12917): two turns, only the second one is trained
  score_stage2   SCoRe: both turns are trained, the second one with a bonus for progress

A program says what is sampled and what each thought is worth. The loss, the optimizer and the
settings stay this project's, so that methods differ in their credit and in nothing else.
tests/test_methods.py checks the credit of each on a policy whose outcomes can all be listed.

Departures that all share: sampling at T = 1 and top_p = 1 (VinePPO and SPO: T = 0.6, VinePPO also
top_p = 0.9), one step on each buffer (the releases: several mini-batches, VinePPO two epochs, of
clipped PPO), no KL term and no whitening of advantages over the batch (VinePPO and SPO have both),
thoughts instead of their steps or tokens, and prefixes of token ids (there text, encoded again).
Left out: SPO-chain, critiques by another model, and SCoRe with more than two turns.
Not shown: that critique_grpo and score learn. The embedded policy cannot answer a second turn, so
their tests run an untrained model with a chat template: the credit and the machinery, no more.

Try it alone:  python srpo.py --method tests/methods.py:spo_tree --length step
"""

from dataclasses import dataclass
from itertools import chain

from data.faults import UserError
from data.policies import INSTRUCTION, encode_prompt, locate_token
from data.verifiers import DELIMITER, KINDS
from localize import prefix_values
from rollout import Program, Rollout, Task, locate

# ----------------------------------------------------------------------------------------- VinePPO


def vineppo(task: Task) -> Program:
    """VinePPO: A of thought h is V(s_h) - V(s_{h-1}), values by `oracle_samples` continuations.

    Source: "VinePPO: Refining Credit Assignment in RL Training of LLMs", arXiv 2410.01679, release
    McGill-NLP/VinePPO (MATH: 8 rollouts of a problem, 9 continuations of a state).
    As there: the question's value has continuations of its own, and the last value is the reward.
    Departures: values before all thoughts, where the release can stop at the 25th step (GSM8K); a
    state that rollouts share is sampled once; a token weighs 1/|T| of its rollout, there all tokens
    of a batch weigh the same.

        python srpo.py --method tests/methods.py:vineppo --base 4 --oracle_samples 2
    """
    (base,) = yield [task.request("base", task.cfg.base)]
    values = yield from prefix_values(task, base, purpose="value")
    for rollout, v in zip(base, values):
        rollout.advantages = [after - before for before, after in zip(v, v[1:])]
    return task.in_group(0, base)


# ---------------------------------------------------------------------------------------- SPO-tree

BRANCHES = (4, 2, 2)  # children of a node, from the prompt downwards; release: (6, 6, 6)
SEGMENT = 4  # thoughts in a segment; the last one goes on to the end. Release: 66 or 100 tokens


@dataclass
class Branching:
    """A node of the tree: the state after `depth` segments of its first child."""

    depth: int
    children: list[Rollout]


def spo_tree(task: Task) -> Program:
    """SPO-tree: A of a segment is its node's value minus the value of the node that it starts from.

    Source: "Segment Policy Optimization", arXiv 2505.23564, release AIFrameResearch/SPO. A node's
    value is the mean value of its children, a leaf's is its reward. As there: a response that ends
    early is a leaf, and advantages are not divided by a std.
    Departures: a node is a whole response whose next segments are its first child, so every segment
    is sampled and trained once, behind the masked prefix of its rollout; segments are thoughts; all
    tokens are trained, where the release masks those of probability above 0.9 and leaves out
    segments of advantage 0; the whole tree is trained at once, where the release takes 32 random
    segments of it and keeps the others for later iterations.
    `--length step`: every token has the same say. Else a short leaf is louder than a long one.

        python srpo.py --method tests/methods.py:spo_tree --length step
    """
    (leaves,) = yield [task.request("base", BRANCHES[0])]
    tree = [Branching(0, leaves)]
    for depth, n in enumerate(BRANCHES[1:], 1):
        h = depth * SEGMENT + 1
        nodes = [leaf for leaf in leaves if len(leaf.thought_ends) >= h]
        groups = yield [task.request("segment", n - 1, node, h, "tree") for node in nodes]
        tree += [Branching(depth, [node, *group]) for node, group in zip(nodes, groups)]
        leaves = leaves + list(chain(*groups))
    set_segment_advantages(tree, leaves)
    return task.in_group(0, leaves)


def set_segment_advantages(tree: list[Branching], leaves: list[Rollout]) -> None:
    """Writes the advantage of every segment into its thoughts. tree: parents before children."""
    value = {id(leaf): leaf.reward for leaf in leaves}
    advantage = {}  # by rollout and number of its segment; none: of a masked prefix
    for branching in reversed(tree):
        mean = sum(value[id(child)] for child in branching.children) / len(branching.children)
        for child in branching.children:
            advantage[id(child), branching.depth] = value[id(child)] - mean
        value[id(branching.children[0])] = mean
    for leaf in leaves:
        leaf.advantages = []
        for thought in range(len(leaf.thought_ends)):
            segment = min(thought // SEGMENT, len(BRANCHES) - 1)
            leaf.advantages.append(advantage.get((id(leaf), segment), 0.0))


# ----------------------------------------------------------------------------------- Critique-GRPO

CRITIQUE = """\
The solution below was written for the problem below. Its final answer is WRONG.

Problem:
{question}

Solution:
{solution}

Say for each step whether it is right, and what is wrong in it. Do not solve the problem again."""
REFINE = "Use what you found, and solve the problem again.\n\n"


def critique_grpo(task: Task) -> Program:
    """Critique-GRPO: the best of the refinements joins the base group under the plain prompt.

    Source: "Critique-GRPO: Advancing LLM Reasoning with Natural Language and Numerical Feedback",
    arXiv 2506.03106, release zhangxy-2019/critique-GRPO (7 responses and 1 refinement). As there:
    one refinement of each critique, the first best one is kept, and it is trained with the weight
    p / (p + 0.1) as if it answered the plain prompt.
    Departures: the policy itself writes the critiques (the release has them from GPT-4o, or only
    "wrong, the answer is ..."), without the reference answer; right responses have none, so a
    prompt without a failure is plain GRPO; the refinement is a second turn after the critique, not
    a new prompt that quotes it; advantages are divided by the group's std.
    Needs a model that can talk: a chat template, and no terse policy like the embedded one.

        python srpo.py --method tests/methods.py:critique_grpo --base 7 --off_policy_shape 0.1 \\
            --model Qwen/Qwen2.5-0.5B-Instruct --train_data a.jsonl --eval_data b.jsonl
    """
    check_turns(task)
    (base,) = yield [task.request("base", task.cfg.base)]
    failures = [rollout for rollout in base if task.failed(rollout)]
    critiques = yield [task.ask("critique", critique_prompt(task, r)) for r in failures]
    ending = KINDS[task.problem.kind].ending
    text = REFINE + INSTRUCTION.format(question=task.problem.question, ending=ending)
    prompts = [task.reply(critique, text) for critique in chain(*critiques)]
    refined = yield [task.request("refinement", 1, prompt_ids=ids) for ids in prompts]
    refinements = list(chain(*refined))
    if refinements:
        best = max(refinements, key=lambda rollout: rollout.reward)
        best.trained_prompt = task.prompt_ids  # off-policy: it was sampled with a critique in view
        base = base + [best]
    return task.in_group(0, base)


def critique_prompt(task: Task, rollout: Rollout) -> list[int]:
    tokenizer = task.vocabulary.tokenizer
    thoughts = [thought.replace(DELIMITER, "") for thought in rollout.thoughts(tokenizer)]
    text = CRITIQUE.format(question=task.problem.question, solution="\n".join(thoughts))
    return encode_prompt(tokenizer, text)


def check_turns(task: Task) -> None:
    """Raises UserError where the policy cannot answer a second turn."""
    if locate_token(task.vocabulary.tokenizer) is not None:
        raise UserError(
            "a terse policy, as the embedded one, cannot answer a second turn; "
            "give --model an instruction-tuned model, with --train_data and --eval_data"
        )


# ---------------------------------------------------------------------------- iterated corrections


def corrections(task: Task) -> Program:
    """Fresh responses and the iterated corrections of each wrong one fill `base` slots of a group.

    Source: the authors' release of SRPO, its agent loop "thought_ics_agent" (ICS: iterative self
    correction). As there: a wrong response is corrected until it is right, or until the slots are
    full; every correction takes a slot, right or wrong, and is trained as a whole; then a fresh
    response follows. `rollout.walk` is near to it, but walks only where a base group is flat, may
    go on for more rounds than a group has slots, and trains none of its failed attempts.
    Departures: one step on each buffer, no clipping; the localizer is not trained.

        python srpo.py --method tests/methods.py:corrections --base 8
    """
    slots = []
    in_hand = None  # the last response, if it is wrong: the next one corrects it
    for _ in range(task.cfg.base):
        found = []
        if in_hand is not None:
            found = yield from locate(task, [in_hand])
        if found:
            reset = found[0]
            request = task.request("correction", 1, reset.seed, reset.h, reset.how)
        else:
            request = task.request("base", 1)
        ((response,),) = yield [request]
        response.trained_from = 0
        slots.append(response)
        in_hand = response if task.failed(response) else None
    return task.in_group(0, slots)


# ------------------------------------------------------------------------------------------- SCoRe

ALPHA = 10.0  # weight of the progress bonus
CORRECT = "There might be an error above. Please correct it, and write the whole solution again."


def score_stage1(task: Task) -> Program:
    """SCoRe, stage I: trains only the second turn, on its own reward. See `score_stage2`.

    Left out: the KL term that ties the first turn to the model before training, which is half of
    this stage. A program gives credit to sampled tokens, and a KL term is a part of the loss. So
    the first turn may drift here, through the weights that both turns share.

        python srpo.py --method tests/methods.py:score_stage1 --base 4 --model ... --out_dir runs/s1
    """
    firsts, seconds = yield from two_turns(task)
    set_by_mean(seconds, [second.reward for second in seconds])
    return task.in_group(0, seconds)


def score_stage2(task: Task) -> Program:
    """SCoRe, stage II: trains both turns; the second one is worth r2 + alpha (r2 - r1).

    Source: "Training Language Models to Self-Correct via Reinforcement Learning", arXiv 2409.12917.
    It has no official release; read: BY571/SCoRe (alpha 10) and VityaVitalich/SCoRe (alpha 0.5).
    As in the first of them, the first turn is worth r1 alone: the bonus does not pull it downwards.
    Then -alpha r1 is a baseline of the second turn: in expectation (a test) the bonus only makes
    the second turn 1 + alpha times as loud.
    The mean over the pairs of a prompt is the baseline. It crosses states, because each second turn
    has a prompt of its own, and stays unbiased: the other pairs do not depend on this one.
    Departures: no KL terms (see stage I). Neither of the two has a baseline; VityaVitalich gives
    both turns the sum r1 + r2 + alpha (r2 - r1). Each stage is a run, on the same data:

        python srpo.py --method tests/methods.py:score_stage2 --base 4 \\
            --model runs/s1/checkpoints/step_80 ...
    """
    firsts, seconds = yield from two_turns(task)
    worths = [s.reward + ALPHA * (s.reward - f.reward) for f, s in zip(firsts, seconds)]
    set_by_mean(firsts, [first.reward for first in firsts])
    set_by_mean(seconds, worths)
    return task.in_group(0, firsts + seconds)


def two_turns(task: Task):
    """Samples pairs of a first response and one attempt to correct it: returns two lists."""
    check_turns(task)
    (firsts,) = yield [task.request("base", task.cfg.base)]
    prompts = [task.reply(first, CORRECT) for first in firsts]
    answers = yield [task.request("second_turn", 1, prompt_ids=ids) for ids in prompts]
    pairs = [(first, *answer) for first, answer in zip(firsts, answers) if answer]  # []: no room
    return [first for first, _ in pairs], [second for _, second in pairs]


def set_by_mean(rollouts: list[Rollout], worths: list[float]) -> None:
    """Advantages of whole responses: worth minus the mean worth."""
    for rollout, worth in zip(rollouts, worths):
        advantage = worth - sum(worths) / len(worths)
        rollout.advantages = [advantage] * len(rollout.thought_ends)
