"""Thought boundaries: where a sampled response is cut into thoughts, and when it is over.

State is token ids, but a delimiter is text: it may be several tokens, start or end inside a token,
or merge with what follows. So both engines find ends in text and map them to token positions.

Left out: cutting at line breaks or sentences. The mark is DELIMITER in data/verifiers.py.

Try it alone:  python -m data.thoughts    # cuts a sample response into thoughts
"""

from data.verifiers import DELIMITER, last_boxed


def decode(tokenizer, ids: list[int]) -> str:
    """The text of sampled ids as it is: special tokens shown, no blank taken out."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(ids, **options)


class Vocabulary:
    """What thought boundaries need of a tokenizer: decoding, and three sets of token ids."""

    def __init__(self, tokenizer, eos: set[int] = frozenset(), delimiter: str = DELIMITER):
        self.tokenizer = tokenizer
        self.delimiter = delimiter
        self.eos = set(eos)
        if tokenizer.eos_token_id is not None:
            self.eos.add(tokenizer.eos_token_id)
        # closers: only after one of these tokens the text is searched for a delimiter. A token with
        # a part of a character decodes to U+FFFD; it may end a delimiter that is not ASCII.
        pieces = {token: self.decode([token]) for token in tokenizer.get_vocab().values()}
        partial = "\N{REPLACEMENT CHARACTER}"
        self.closers = {t for t, text in pieces.items() if delimiter[-1] in text or partial in text}
        self.braces = {t for t, text in pieces.items() if "}" in text}

    def decode(self, ids: list[int]) -> str:
        return decode(self.tokenizer, ids)


class ThoughtTracker:
    """Follows a response token by token.

    A thought ends after the token that completes the delimiter, or after `max_tokens_per_thought`
    tokens. The response ends ("answer") with the thought in which a `\\boxed{...}` has been closed.

    Example, tokens "a", "</thou", "ght>b", "c", <eos>:  thought_ends == [3, 5], finish == "eos".
    """

    def __init__(self, vocabulary: Vocabulary, request):
        self.vocabulary = vocabulary
        self.request = request  # rollout.Request: the prefix and the limits
        self.ids = list(request.prefix_ids)
        self.thought_ends = list(request.prefix_ends)
        self.finish: str | None = None  # answer | eos | thoughts | length
        self.brace = False  # a "}" in this thought? Only then is the response searched for a box
        # Every token has at least one byte: so many always hold a delimiter and a token before it.
        self.window = len(vocabulary.delimiter.encode()) + 1

    def push(self, token: int) -> None:
        """Takes the next token; `finish` is set when the response is over with it."""
        self.ids.append(token)
        if token in self.vocabulary.eos:
            self.finish = "eos"
        elif self.request.max_thoughts is not None:
            self.brace |= token in self.vocabulary.braces
            if self.ends_thought(token):
                self.end_thought()
        generated = len(self.ids) - len(self.request.prefix_ids)
        if self.finish is None and generated >= self.request.max_tokens:
            self.finish = "length"
        if self.finish and self.last_end() < len(self.ids):
            self.thought_ends.append(len(self.ids))

    def last_end(self) -> int:
        return self.thought_ends[-1] if self.thought_ends else 0

    def ends_thought(self, token: int) -> bool:
        if token in self.vocabulary.closers and self.completes_delimiter():
            return True
        return len(self.ids) - self.last_end() >= self.request.max_tokens_per_thought

    def completes_delimiter(self) -> bool:
        """Whether the newest token completes a delimiter."""
        recent = self.ids[-self.window :]
        delimiter = self.vocabulary.delimiter
        before = self.vocabulary.decode(recent[:-1]).count(delimiter)
        return self.vocabulary.decode(recent).count(delimiter) > before

    def end_thought(self) -> None:
        self.thought_ends.append(len(self.ids))
        # An empty `\boxed{}`, copied from the instruction, is no answer.
        if self.brace and last_boxed(self.vocabulary.decode(self.ids)):
            self.finish = "answer"
        elif len(self.thought_ends) >= self.request.max_thoughts:
            self.finish = "thoughts"
        self.brace = False


def demo() -> None:
    from types import SimpleNamespace

    from data.policies import load_policy

    _, tokenizer = load_policy("embedded")
    text = r"1: +7 = 48 </thought> 2: *3 = 47 </thought> \boxed{ 48 47 } </thought>"
    ids = tokenizer(text)["input_ids"]
    request = SimpleNamespace(prefix_ids=[], prefix_ends=[], max_tokens=999)
    request.max_thoughts, request.max_tokens_per_thought = 20, 256
    tracker = ThoughtTracker(Vocabulary(tokenizer), request)
    for token in ids:
        tracker.push(token)
    print(f"{len(ids)} tokens, thoughts end at {tracker.thought_ends}, finish: {tracker.finish}")


if __name__ == "__main__":
    demo()
