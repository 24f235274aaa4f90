"""Tasks whose answer stands in the prompt: the model has to generate it, word for word.

    passkey    one number, said once in a long filler
    key_value  one line of a list of codes
    mqar       several of the pairs that a filler holds, asked after one another (multi-query
               associative recall, Arora et al. 2023, arXiv 2312.04927); every answer is generated,
               earlier ones are given right
    copy       a list of words once more, after examples of the same

Prompts are text, built for a tokenizer and a seed, so a model of any tokenizer can be asked, and
two models are asked the same. A likelihood would flatter: hybrids that score well by it can be far
worse when they have to generate (arXiv 2603.26556).

Check: `pytest tests/test_recall.py`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from config import UserError
from tokenizer import Tokenizer

# Common words, one token each for most vocabularies, none the beginning of another.
WORD_LIST = """
apple river stone cloud horse paper green silver window garden mountain doctor music winter
summer table bottle letter station market forest island castle bridge engine mirror pocket
basket candle dragon feather hammer jacket kitchen ladder magnet needle ocean pencil rabbit
saddle tunnel valley wagon yellow zebra anchor butter carpet desert eagle finger guitar
helmet insect jungle lemon meadow number orange planet quarter rocket shadow tiger uncle
village whale copper velvet marble pepper thunder lantern compass harbor cotton turtle
"""
WORDS = WORD_LIST.split()
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PAIRS, QUERIES = 8, 4  # of one mqar context: told, and asked for
COPIED = 8  # words of a copy


@dataclass(frozen=True)
class Question:
    """One thing to generate."""

    task: str
    length: int  # tokens that prompt and answer may have together
    depth: float | None  # where in the prompt the answer stands: 0 = start, 1 = end
    prompt: list[int]
    answer: str


def _fill(parts: Callable[[int], list[list[int]]], room: int, what: str) -> list[int]:
    """The tokens of parts(n), flat, for the largest n whose parts fit in `room`."""
    size = lambda n: sum(map(len, parts(n)))  # noqa: E731
    if size(1) > room:
        raise UserError(f"--recall_lengths: {room} tokens found, {what} needs at least {size(1)}")
    low, high = 1, 2
    while size(high) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle)
    return [token for part in parts(low) for token in part]  # the last call: parts may note low


def passkey(encode, rng: random.Random, length: int, depth: float) -> list[Question]:
    key = str(rng.randrange(10_000, 100_000))
    first = encode("There is a pass key hidden in a long text. Find it and remember it.\n")
    filler = encode(FILLER + "\n")
    needle = encode(f"The pass key is {key}. Remember it. {key} is the pass key.\n")
    last = encode("What is the pass key? The pass key is")

    def parts(n: int) -> list[list[int]]:
        before = round(depth * n)
        return [first, *[filler] * before, needle, *[filler] * (n - before), last]

    prompt = _fill(parts, length - len(encode(" " + key)), "passkey")
    return [Question("passkey", length, depth, prompt, key)]


def key_value(encode, rng: random.Random, length: int, depth: float) -> list[Question]:
    lines: dict[str, tuple[str, list[int]]] = {}  # key -> value and tokens of its line
    ask, count = "The code of {} is", 0

    def grow(n: int) -> list[tuple[str, tuple[str, list[int]]]]:
        while len(lines) < n:
            # The number in it keeps names apart in lists of any length.
            key = f"{rng.choice(WORDS)} {rng.choice(WORDS)} {rng.randrange(1000)}"
            value = str(rng.randrange(1000, 10_000))
            if key not in lines:
                lines[key] = value, encode(f"The code of {key} is {value}.\n")
        return list(lines.items())[:n]

    def parts(n: int) -> list[list[int]]:
        nonlocal count
        count = n
        some = grow(n)
        return [*(tokens for _, (_, tokens) in some), encode(ask.format(some[asked()][0]))]

    def asked() -> int:
        return min(count - 1, int(depth * count))

    prompt = _fill(parts, length - 8, "key_value")
    return [Question("key_value", length, depth, prompt, grow(count)[asked()][1][0])]


def mqar(encode, rng: random.Random, length: int, depth: None = None) -> list[Question]:
    keys = rng.sample(WORDS, PAIRS)
    pairs = [(key, str(rng.randrange(1000, 10_000))) for key in keys]
    told = [encode(f"The code of the {key} is {value}.\n") for key, value in pairs]
    ask, filler = "The code of the {} is", encode(FILLER + "\n")
    asked = rng.sample(range(PAIRS), QUERIES)

    def parts(n: int) -> list[list[int]]:
        found = []
        for i, tokens in enumerate(told):
            found += [tokens, *[filler] * ((i + 1) * n // PAIRS - i * n // PAIRS)]
        return found

    prompt = _fill(parts, length - sum(len(told[i]) for i in asked), "mqar")
    found = []
    for i in asked:
        key, value = pairs[i]
        found.append(Question("mqar", length, None, prompt + encode(ask.format(key)), value))
        prompt = prompt + told[i]
    return found


def copy(encode, rng: random.Random, length: int, depth: None = None) -> list[Question]:
    texts: list[str] = []

    def words(i: int) -> str:
        while len(texts) <= i:
            texts.append(" ".join(rng.choices(WORDS, k=COPIED)))
        return texts[i]

    def parts(n: int) -> list[list[int]]:
        shown = [encode(f"Text: {words(i)}\nCopy: {words(i)}\n") for i in range(1, n)]
        return [*shown, encode(f"Text: {words(0)}\nCopy:")]

    prompt = _fill(parts, length - len(encode(" " + words(0))), "copy")
    return [Question("copy", length, None, prompt, words(0))]


TASKS = {"passkey": passkey, "key_value": key_value, "mqar": mqar, "copy": copy}
WITH_DEPTH = ("passkey", "key_value")


def questions(
    tokenizer: Tokenizer,
    *,
    tasks: Iterable[str] = TASKS,
    lengths: Iterable[int] = (512, 1024, 2048),
    depths: Iterable[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 8,
    seed: int = 0,
) -> list[Question]:
    """All of them. Each (task, length, depth, sample) has a seed of its own, so a smaller
    selection asks some of the same questions. UserError for an unknown task, a depth that is none,
    or a length that is too small for one."""
    found, depths = [], list(depths)
    for depth in depths:
        if not 0 <= depth <= 1:
            raise UserError(f"--recall_depths: {depth:g} found, 0 (start) to 1 (end) expected")
    if samples < 0:
        raise UserError(f"--recall_samples: {samples} found, 0 or more expected")
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--recall_tasks: {task} found, some of {','.join(TASKS)} expected")
        for length in lengths:
            for depth in depths if task in WITH_DEPTH else (None,):
                for sample in range(samples):
                    rng = random.Random(f"{seed}/{task}/{length}/{depth}/{sample}")
                    found += TASKS[task](tokenizer.encode, rng, length, depth)
    for question in found:
        question.prompt[:0] = tokenizer.starts
    return found


Complete = Callable[[list[list[int]], int], list[list[int]]]


def answer_all(
    asked: list[Question], tokenizer: Tokenizer, complete: Complete, *, batch_tokens: int = 65_536
) -> list[bool]:
    """Whether each was answered right: what is generated has to begin with the answer. complete
    continues prompts greedily: (prompts, new tokens at most) -> new tokens. Prompts are asked
    together up to batch_tokens, the shortest first."""
    right = [False] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: (len(asked[i].prompt), i))
    while order:
        together, tokens = [], 0
        while order and (not together or tokens + len(asked[order[0]].prompt) <= batch_tokens):
            tokens += len(asked[order[0]].prompt)
            together.append(order.pop(0))
        # An answer may be split into more tokens than the tokenizer itself would.
        most = max(len(tokenizer.encode(" " + asked[i].answer)) for i in together) + 2
        new = complete([asked[i].prompt for i in together], most)
        for i, ids in zip(together, new, strict=True):
            right[i] = is_answer(tokenizer.decode(ids), asked[i].answer)
    return right


def is_answer(text: str, answer: str) -> bool:
    """Word for word, and no longer word or number: 123 does not answer 12."""
    text = text.lstrip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def rates(asked: list[Question], right: dict[str, list[bool]]) -> list[dict]:
    """A row for each task, length and depth: samples, and for each model of `right` the share of
    right answers."""
    groups = defaultdict(list)
    for i, q in enumerate(asked):
        groups[q.task, q.length, q.depth].append(i)
    return [
        {"task": task, "length": length, "depth": depth, "samples": len(group)}
        | {name: sum(found[i] for i in group) / len(group) for name, found in right.items()}
        for (task, length, depth), group in groups.items()
    ]
