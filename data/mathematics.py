r"""Mathematics: whether two answers in LaTeX are equal.

    1. Answers with the same text are equal; no library is asked.
    2. `tidy` writes both in one form: Unicode signs, e-notation, mixed numbers, final periods.
    3. `parts_of` takes away a name before the value (x = 5) and a unit or base after it (3 cm,
       25_8). Either side may leave them out; where both have them, they must agree.
    4. The library math-verify parses both values and compares them with sympy.

A model may write anything, so steps 2 to 4 run in a worker process, with a limit of CPU time: a
busy machine turns no right answer into a timeout. Workers import math-verify and nothing of the
trainer. They end when the process that started them is gone, or else at their limit.

Limits, of the library and of these steps:
  - A list without brackets has no order, unless it has an item twice: `2, 3` equals `3, 2`. Where
    the order matters, write the reference as `(2, 3)`.
  - `(1, 2)` is the pair and also the open interval, `[1, 2]` only the closed one. Longer lists may
    stand in either brackets.
  - A decimal equals a number with the same six decimals: 1/3 equals 0.333333. Of numbers below 0.1
    six significant digits count.
  - Units are compared, not converted: `3 cm` is not `30 mm`. A unit that is not in UNITS counts for
    nothing. A single letter, lb, mg and ml are variables where they are not in \text: `5 m` is not
    5. Degrees are not radians, and functions of degrees are not computed; `5 million` is not
    5000000.
  - Bases are compared, not computed: `100_2` is not 4. One in words is not read.
  - Inequalities that are joined by "or" are no union of intervals.
  - An equation equals its multiples, and no other one with the same solutions. Beside a reference
    that is a value, its right side alone is read: `2x = 5` is 5, `5\pi \approx 15.7` is 15.7.

Left out: what only a judge could decide, such as how far a question lets one round.

Try it alone:  python -m data.mathematics        # compares some answers, in a worker
"""

import json
import re
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, floor, log10
from multiprocessing.connection import wait
from pathlib import Path
from queue import LifoQueue
from time import process_time

from data.faults import UserError

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2  # processes, each of about 70 MiB; most comparisons take a hundredth of a second
SECONDS = 5.0  # CPU time of one comparison
MEMORY = 4 << 30  # bytes of address space of one worker


# ------------------------------------------------------------------------------ one form of writing

SIGNS = {
    "−": "-",
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": "/",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≈": r"\approx ",
    "∞": r"\infty ",
    "∅": r"\emptyset ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "π": r"\pi ",
    "√": r"\surd ",
    "°": r"^\circ ",
    "±": r"\pm ",
    "²": "^2",
    "³": "^3",
    "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
}
NESTED = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"  # braces in braces in braces
GREEK = (
    r"(\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|pi|rho|sigma|tau|(?:var)?phi|omega)"
    r"(?![a-z]))"
)
REWRITES = [  # (pattern, replacement), in this order
    # The space between two rows: \\[6pt].
    (r"\\\\ ?\[ ?-?[\d.]+ ?(?:pt|em|ex|mm|cm)\]", r"\\\\ "),
    # Dollars, \( \), sizes and styles, degrees, and blanks of every width.
    (r"\\?\$|[€£]|(?<!\\)\\[()\[\]]|\\displaystyle", ""),
    (r"\\(?:left|right|[bB]igg?[lmr]?)(?![a-zA-Z])", ""),
    (r"\^ ?\{? ?\\circ ?\}? ?(?=\d)", " "),
    (r"\^ ?\{? ?\\circ ?\}?(?: ?[CF]$)?", ""),
    (r"(?<!\\)\\! ?", ""),
    # A thin space between thousands.
    (r"(?<=\d)\\,(?=\d{3}(?!\d))", ""),
    # Commas between thousands: 20{,}000 but not 0{,}125, and \frac{20,000}{3}.
    (r"(?<=\d)(?<!\b0)\{,\}(?=\d{3}(?!\d))", ""),
    (r"(?<=[^\\_]\{)(\d{1,3}),(\d{3})(?=\})", r"\1\2"),
    (r"(?:~|(?<!\\)\\[ ,;:>]|\\q?quad(?![a-z])|\s)+", " "),
    (r"\{([,:])\}", r"\1"),
    # Bold or underlined as a whole; = or \approx at the beginning.
    (r"^\\(?:boldsymbol|bm|mathbf|underline) ?\{(" + NESTED + r")\}$", r"\1"),
    (r"^(?:\\approx|=) ?", ""),
    (r"\\approx", "="),
    # Fonts. Text that is no word is the value itself: \text{A, D}, \text{5}.
    (r"\\(?:text|math)(?:rm|bf|it|normal) ?\{|\\mbox ?\{|\\text \{", r"\\text{"),
    (r"(^|,) ?\\text\{([^{}a-z]*)\}|\\text\{(i)\}", r"\1\2\3"),
    (r",? ?\\text\{ ?(?:and|or) ?\}", ","),
    (r"^\\text\{ ?(-?[\d.,]*\d) ([a-z][^{}]*)\}$", r"\1 \\text{\2}"),
    (r" ?(?:\\text\{ ?percent ?\}|percent$)", r"\\%"),
    # The end of a sentence.
    (r"[ .,;]+$", ""),
    # Greek letters without braces in fractions: \frac\pi2, \frac{1}\pi.
    (r"(\\[dtc]?frac) ?" + GREEK, r"\1{\2}"),
    (r"(\\[dtc]?frac) ?(\w|\{" + NESTED + r"\}) ?" + GREEK, r"\1{\2}{\3}"),
    # Numbers: 4.7e-34; 3 1/2; i apart from its factor, as 2i would be a name; a \pm b.
    (r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]\+?(-?)0*(\d+)(?![\w.])", r"\1 \\times 10^{\2\3}"),
    (r"(?<![\w.])(\d+) (\d+)/(\d+)(?![\w.])", r"\1\\frac{\2}{\3}"),
    (r"(?<=\d)i(?![a-z])", " i"),
    (r"\\surd ?(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}"),
    (r"^([^,=]*=)?([^,=]*)\\pm([^,=]*)$", r"\1\2+\3, \2-\3"),
    # Sets: the one without elements; {x | x > 3} is x > 3; x \in A is A.
    (r"\\varnothing|\\\{ ?\\\}", r"\\emptyset"),
    (r"^\\\{ ?[a-z] ?(?:\||:|\\mid|\\vert)(?![a-z])(.*)\\\}$", r"\1"),
    (r"^[a-z] ?\\in(?![a-z])", ""),
]
REPEATING = r"(\d+)\.(\d*)\\(?:overline|bar|dot) ?\{?(\d+)\}?"


def tidy(text: str) -> str:
    r"""Writes an answer as this file does.

    >>> [tidy(text) for text in ("$4.7e-34$.", "3 1/2", r"\text{A,D}", "√2", r"0.\overline{3}")]
    ['4.7 \\times 10^{-34}', '3\\frac{1}{2}', 'A,D', '\\sqrt{2}', '\\frac{3}{9}']
    """
    text = text.translate(str.maketrans(SIGNS))
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text).strip()
    return re.sub(REPEATING, repeating_decimal, text)


def repeating_decimal(found: re.Match) -> str:
    """0.1\\overline{6} -> \\frac{15}{90}, from 16 - 1 and 100 - 10."""
    whole, fixed, repeated = found.groups()
    above = int(whole + fixed + repeated) - int(whole + fixed)
    below = 10 ** len(fixed + repeated) - 10 ** len(fixed)
    return rf"\frac{{{above}}}{{{below}}}"


def undressed(text: str) -> str:
    r"""Returns a text without text commands, dollars, a final period, and blanks at commas.

    >>> undressed(r"$\text{ A, D }$.")
    'A,D'
    """
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf) ?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\?\$", "", text).strip().removesuffix(".")
    return re.sub(r"\s*([,()\[\]]|\s)\s*", r"\1", text.strip())


# ---------------------------------------------------------------------- names, units and bases

UNITS = {  # a unit and its other names
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inche",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram",
    "kg": "kilogram",
    "oz": "ounce",
    "lb": "pound",
    "ml": "milliliter millilitre",
    "gal": "gallon",
    "s": "sec second",
    "min": "minute",
    "h": "hr hour",
    "day": "",
    "week": "",
    "year": "",
    "mph": "",
    "km/h": "kph",
    "m/s": "",
    "am": "a.m.",
    "pm": "p.m.",
}
UNIT_OF = {}
for unit, names in UNITS.items():
    for name in (unit, *names.split()):
        UNIT_OF[name] = unit

# Words that change a number, and so are no unit.
FACTOR = (
    r"(?:dozens?|(?:hundred|thousand|(?:m|b|tr)illion)(?:th)?s?|tenths?|half|halves|thirds?|"
    r"squared|cubed|factorial|and|or)\b"
)
# \text{...} with a unit, a bare word of UNITS, and other words behind a number.
TEXT = rf"\\text\{{(?! ?{FACTOR})(?:[^{{}}]|\{{[^{{}}]*\}})*\}}"
WORDS = rf"(?<=[\d}}i]) (?!{FACTOR})[a-z]{{3,}}(?: [a-z]+)*$"
PRODUCTS = ("lb", "mg", "ml")  # of variables, where they are not in \text
WORD = "|".join(re.escape(name) for name in UNIT_OF if len(name) > 1 and name not in PRODUCTS)
UNIT = rf"(?:{TEXT}|(?:{WORD})s?(?![a-zA-Z]))(?: ?\^ ?\{{?-?\d\}}?)?"
# Units joined by a slash, a dot or a blank, up to the end of an item: `3 \text{m} / \text{s}^2`.
UNIT_OF_ITEM = rf"(?<=[\d}})i]) ?({UNIT}(?: ?(?:(?:/|\\cdot) ?)?{UNIT})*) ?(?=[,)\]]|$)"
# 25_8, (25)_{8}; and x =, x_1 =, \alpha =, f(x) =, (x, y) = before a value.
BASE = r"\(?(-?\d[\dA-Z.]*)\)?_\{?\(?(\d+)\)?\}?"
NAME = r"((?:\\?[a-zA-Z]+|\([a-z](?:, ?[a-z])*\))(?:_\w|_\{[^{}]*\})?(?:\([a-z]\))?) ?= ?([^=<>]+)"


@dataclass(frozen=True)
class Parts:
    """An answer, and what may be left out of it."""

    value: str
    name: str
    """before the value, or "" """

    units: list[str]
    """unit or base of every item that has one; "" for words that are not in UNITS"""


def parts_of(text: str) -> Parts:
    """Takes a tidy answer apart.

    >>> parts_of("v = 30 mph, 40 mph")
    Parts(value='30, 40', name='v', units=['mph', 'mph'])
    """
    named = re.fullmatch(NAME, text)
    name, value = named.groups() if named else ("", text)
    based = re.fullmatch(BASE, value)
    if based:
        return Parts(based[1], undressed(name), [f"base {based[2]}"])
    units = [unit_name(found[1]) for found in re.finditer(UNIT_OF_ITEM, value)]
    return Parts(re.sub(UNIT_OF_ITEM, "", value).strip(), undressed(name), units)


def unit_name(text: str) -> str:
    r"""Returns a unit's first name with its power, or "": `\text{inches}^2` -> `in^2`."""
    word, _, power = re.sub(r"\\text|[{} ]", "", text).partition("^")
    if len(word) > 1:
        word = word.lower()  # AM; but M is no meter
    unit = UNIT_OF.get(word) or UNIT_OF.get(word.removesuffix("s"))
    return f"{unit}^{power}" if unit and power else unit or ""


def differ(units: list[str], others: list[str]) -> bool:
    return any(one and other and one != other for one, other in zip(units, others))


# --------------------------------------------------------------------------- comparing, in a worker


def compare(boxed: str, reference: str) -> str:
    """Returns "equal", "different" or "unparsable" (no mathematics in the box)."""
    given, wanted = tidy(boxed), tidy(reference)
    if not re.search("[a-z]", re.sub(r"\\[a-z]+", "", wanted)):
        given = re.sub(WORDS, "", given)  # no variables, where the reference has none: 18 apples
    one, other = parts_of(given), parts_of(wanted)
    if differ(one.units, other.units):
        return "different"
    is_equation = "=" in one.value or "=" in other.value
    names_differ = one.name and other.name and one.name != other.name  # y = 2x and x = y/2
    if is_equation or names_differ:
        return compare_values(given, wanted)
    return compare_values(one.value, other.value)


def compare_values(given: str, wanted: str) -> str:
    if undressed(given) == undressed(wanted):
        return "equal"
    is_time = r"\d{1,2}:\d\d"
    if re.fullmatch(is_time, given) or re.fullmatch(is_time, wanted):
        return "different"
    if repeats(given) or repeats(wanted):
        given, wanted = sequence(given), sequence(wanted)
    verdict = compare_parsed(given, wanted)
    if verdict != "equal" and "%" in given + wanted:  # 17.5% is 0.175 and also 17.5
        return compare_parsed(re.sub(r" ?\\?%", "", given), re.sub(r" ?\\?%", "", wanted))
    return verdict


def repeats(text: str) -> bool:
    """True for a list without brackets that has an item twice: to the library a set, without it."""
    items = re.split(r",(?!\d{3}(?!\d)) ?", text)  # not at the comma of 1,000
    return len(set(items)) < len(items) and not re.search(r"[()\[\]]|\\\{", text)


def sequence(text: str) -> str:
    """Writes a list in round brackets."""
    inside = re.sub(r"^[(\[](.*)[)\]]$", r"\1", text)
    return f"({inside})"


def compare_parsed(given: str, wanted: str) -> str:
    """Compares by math-verify. Its own time limits are off: the worker has one."""
    from math_verify import verify
    from sympy import Eq

    given_forms, wanted_forms = parsed(given), parsed(wanted)
    if all(isinstance(form, str) for form in given_forms):
        return "unparsable"
    one, other = given_forms[0], wanted_forms[0]
    if isinstance(one, Eq) and isinstance(other, Eq):
        return "equal" if is_multiple(one, other) else "different"
    decimals, digits = precision(other)
    equal = verify(
        wanted_forms,
        given_forms,
        float_rounding=decimals,
        numeric_precision=digits,
        allow_set_relation_comp=True,
        timeout_seconds=None,
    )
    return "equal" if equal else "different"


def parsed(text: str) -> list:
    """Returns what math-verify reads, with i as the imaginary unit, and then its text.

    It may read LaTeX only. Else it would take any number out of a text that it cannot read, and no
    unit: it would take the letters of variables for units.
    """
    from math_verify import LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig
    from sympy import Basic, I

    config = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    latex = LatexExtractionConfig(normalization_config=config)
    forms = []
    for form in parse(f"\\boxed{{{text}}}", extraction_config=[latex], parsing_timeout=None):
        if isinstance(form, Basic):
            form = form.subs({s: I for s in form.free_symbols if s.name == "i"})
        forms.append(form)
    return forms


def is_multiple(one, other) -> bool:
    """True if one equation is the other times a number: x - y = 1 and 2y = 2x - 2.

    math-verify compares solutions: to it, all equations without a real solution are equal.
    """
    from sympy import simplify

    ratio = simplify((one.lhs - one.rhs) / (other.lhs - other.rhs))
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


def precision(reference) -> tuple[int, int]:
    """Returns decimals and digits for math-verify, by the smallest number of a reference.

    It rounds to 6 decimals and looks at 15 digits after the point: 1e-19 would be 0.
    """
    sizes = [size for size in numbers(reference) if 0 < size < 1]
    places = -floor(log10(min(sizes, default=1)))  # 1 for 0.5, 19 for 1.6e-19
    return 5 + max(1, places), max(15, 12 + places)


def numbers(expression) -> list[float]:
    """Returns the absolute values of the largest parts of an expression that are numbers."""
    if getattr(expression, "is_number", False):
        return [float(abs(expression.doit().evalf()))]
    found = []
    for part in getattr(expression, "args", ()):
        found += numbers(part)
    return found


# ----------------------------------------------------------------------------------- the workers


class Worker:
    """A process that compares answers, one at a time, started at its first use."""

    def __init__(self):
        self.process = None

    def ask(self, boxed: str, reference: str, seconds: float) -> str:
        """Returns the verdict of `compare`, or "timeout" or "crash"."""
        if self.process is None or self.process.poll() is not None:
            self.start()  # about half a second
        with suppress(BrokenPipeError):  # it has ended just now: then it says nothing
            self.process.stdin.write(json.dumps([boxed, reference, seconds]).encode() + b"\n")
            self.process.stdin.flush()
        # It ends by itself at its limit of CPU time; 20 times that is for a machine that hangs.
        if not wait([self.process.stdout], timeout=20 * seconds):
            self.process.kill()
            self.process.wait()
            return "timeout"
        verdict = self.process.stdout.readline().decode().strip()
        if verdict:
            return verdict
        return "timeout" if self.process.wait() == -signal.SIGXCPU else "crash"

    def start(self) -> None:
        # A session of its own: Ctrl-C goes to the trainer, which may still end its step.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data.mathematics", "worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self.process.stdout.readline() != b"ready\n":
            raise UserError(
                "answers of kind math cannot be compared: math-verify does not start here; "
                "try python -c 'import math_verify', and pip install -r requirements.txt"
            )


idle: LifoQueue[Worker] = LifoQueue()  # workers that have nothing to do
for _ in range(WORKERS):
    idle.put(Worker())


def ask_worker(boxed: str, reference: str, seconds: float = SECONDS) -> str:
    """Compares two answers in a worker; waits for one that is idle. Works on any thread.

    Returns "equal", "different", "unparsable", "timeout" (`seconds` of CPU time) or "crash".
    """
    if undressed(boxed) == undressed(reference):
        return "equal"
    worker = idle.get()
    try:
        return worker.ask(boxed, reference, seconds)
    finally:
        idle.put(worker)


def work() -> None:
    """Answers the questions on standard input until it is closed, as it is when the asker ends.

    The kernel ends this process at its limit, even inside a power such as 9^{9^{9^9}}.
    """
    import logging

    import math_verify  # noqa: F401  # before it says that it is ready

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off
    if sys.platform == "linux":  # others do not have it, or do not keep to it
        limit(resource.RLIMIT_AS, MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    print("ready", flush=True)
    for line in sys.stdin:
        boxed, reference, seconds = json.loads(line)
        limit(resource.RLIMIT_CPU, ceil(process_time() + seconds))
        print(compare(boxed, reference), flush=True)


def limit(resource_kind: int, value: int) -> None:
    """Sets a limit of this process, within the one that it may not raise."""
    _, highest = resource.getrlimit(resource_kind)
    if highest != resource.RLIM_INFINITY:
        value = min(value, highest)
    resource.setrlimit(resource_kind, (value, highest))


def demo() -> None:
    for boxed, reference in [
        (r"\frac{1}{2}", "0.5"),
        (r"4.7 \times 10^{-34}", "4.7e-34"),
        ("(2, 3]", r"2 < x \le 3"),
        ("3 cm", "3 km"),
        ("?", "1"),
        ("9^{9^{9^9}}", "1"),
    ]:
        print(f"{boxed:20} {reference:14} {ask_worker(boxed, reference, seconds=1.0)}")


if __name__ == "__main__":
    work() if sys.argv[1:] == ["worker"] else demo()
