"""Problems and their verifiers: where a rollout's reward comes from.

A `Problem` is a question, a reference answer, and the kind of verifier that grades it. Two sources:
  - a JSON-lines file, one object a line with `question`, `answer` and `kind`, as `data/prepare.py` writes them for public sets;
  - the embedded task `chain-K`: K steps of arithmetic modulo 97, generated, with the exact truth of every step; `english-K-L`, the like
    in English, is in data/english.py.

The reward of a response is 1.0 or 0.0, from the content of its LAST `\\boxed{}`; for kind "code" it is the share of tests that its last
fenced program passes. One function per kind (GRADERS):
  integer  the same integer                        choice   the same letter                    text  the reference is contained in the box
  math     equal for the `math-verify` library     yes_no   yes or true, no or false           code  tests, in data/sandbox.py
Model-written text is never evaluated in this process: mathematics goes to a separate process that is killed at its time limit (the
library's own limit uses SIGALRM, which only works on the main thread), programs to the sandbox. A timeout or an unparsable answer is
a 0 with a name in `counters`, never a hang and never an exception.

Left out: rewards from a judge model, and partial credit outside code.

Try it alone:  python -m data.problems        # prints one problem, its true thoughts, and grades a right and a wrong answer
"""

from dataclasses import dataclass
from typing import Callable

from data.faults import count
from data.verifiers import GRADERS, grade_code, last_boxed


@dataclass
class Problem:
    """One question with its verifier.

    index: position in its data set, the problem's only key (texts may repeat); question: str; answer: reference answer, str;
    kind: a key of GRADERS, or "code"; tests: of kind "code", see `sandbox.share_passed`; check_steps: optional, list of H thought texts -> 1-based index of the first wrong one, or None
    where all are right (exact step-level truth; only `--localizer verifier` and measurements look at it)."""

    index: int
    question: str
    answer: str
    kind: str
    check_steps: Callable[[list[str]], int | None] | None = None
    tests: dict | None = None

    @property
    def slow(self) -> bool:
        """Whether grading waits for another process: then several responses are graded at once, while sampling goes on."""
        return self.kind in ("code", "math")

    def grade(self, response: str) -> float:
        """Reward of a response, in [0, 1]: 1.0 if the content of its last box is the answer, else 0.0; code: the share of tests passed."""
        if self.kind == "code":
            return grade_code(response, self.tests)
        boxed = last_boxed(response)
        if boxed is None:
            count("no_box")
            return 0.0
        return GRADERS[self.kind](boxed, self.answer)


# ---------------------------------------------------------------------------------------------------------------- verifiers


# ------------------------------------------------------------------------------------------------------------- the chain task


# ------------------------------------------------------------------------------------------------------------------- loading
