"""Recall tasks on models whose answer is known: perfect recall, a copying one, a blind one.

pytest tests/test_recall.py
"""

from __future__ import annotations

import itertools
import random
import re

import pytest

import recall
from config import UserError
from recall import TASKS, WITH_DEPTH, answer_all, is_answer, questions, rates
from tokenizer import load_tokenizer

BYTES = load_tokenizer("byte")
SELECTION = dict(lengths=(768, 1280), depths=(0.0, 0.5, 1.0), samples=3)


def oracle(asked):
    """Answers everything right, and goes on talking."""
    known = {tuple(q.prompt): q.answer for q in asked}
    return lambda prompts, most: [
        BYTES.encode(f" {known[tuple(p)]}, and then")[:most] for p in prompts
    ]


def copier(prompts, most):
    """An induction head: goes on with what followed the last earlier place that ends alike."""
    found = []
    for p in prompts:
        text = BYTES.decode(p)
        for size in range(40, 0, -1):
            at = text.rfind(text[-size:], 0, len(text) - 1)
            if at >= 0:
                break
        found.append(BYTES.encode(text[at + size :])[:most])
    return found


def blind(prompts, most):
    """The same digits or word, whatever the prompt."""
    return [BYTES.encode(" 12345 apple")[:most] for _ in prompts]


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_as_long_as_asked_for(task):
    for q in questions(BYTES, tasks=[task], **SELECTION):
        need = len(q.prompt) + len(BYTES.encode(" " + q.answer))
        assert 0.5 * q.length < need <= q.length
        assert (q.depth is not None) == (task in WITH_DEPTH)


@pytest.mark.parametrize("task", WITH_DEPTH)
def test_depth_is_where_the_answer_stands(task):
    for q in questions(BYTES, tasks=[task], lengths=(2048,), depths=(0.0, 0.5, 1.0), samples=4):
        text = BYTES.decode(q.prompt)
        assert text.count(q.answer) == {"passkey": 2, "key_value": 1}[task]
        assert text.index(q.answer) / len(text) == pytest.approx(q.depth, abs=0.1)


def test_the_text_around_the_answer():
    (q,) = questions(BYTES, tasks=["key_value"], lengths=(600,), depths=(0.5,), samples=1)
    text = BYTES.decode(q.prompt)
    *lines, last = text.split("\n")
    codes = dict(re.fullmatch(r"The code of (.+) is (\d+)\.", line).groups() for line in lines)
    assert len(codes) == len(lines) > 10  # no key twice
    assert codes[re.fullmatch(r"The code of (.+) is", last)[1]] == q.answer


def test_mqar_asks_several_keys_with_earlier_answers_given():
    asked = questions(BYTES, tasks=["mqar"], lengths=(1100,), samples=1)
    assert len(asked) == recall.QUERIES
    for before, after in itertools.pairwise(asked):
        given = BYTES.decode(before.prompt) + f" {before.answer}.\n"
        assert BYTES.decode(after.prompt).startswith(given)
    text = BYTES.decode(asked[0].prompt)
    pairs = dict(re.findall(r"The code of the (\w+) is (\d+)\.", text))
    assert len(pairs) == recall.PAIRS
    assert text.count(recall.FILLER) >= recall.PAIRS // 2  # pairs are spread over it
    for q in asked:
        key = re.fullmatch(r"The code of the (\w+) is", BYTES.decode(q.prompt).split("\n")[-1])
        assert pairs[key[1]] == q.answer


def test_questions_depend_on_seed_and_sample_only():
    base = questions(BYTES, **SELECTION)
    assert questions(BYTES, **SELECTION) == base
    some = questions(BYTES, tasks=["mqar"], lengths=(1280,), samples=2)
    assert {q.answer for q in some} and all(q in base for q in some)
    other = questions(BYTES, seed=1, **SELECTION)
    assert [q.answer for q in other] != [q.answer for q in base]


def test_known_models():
    asked = questions(BYTES, **SELECTION)
    random.Random(0).shuffle(asked)
    right = {
        "oracle": answer_all(asked, BYTES, oracle(asked)),
        "blind": answer_all(asked, BYTES, blind),
        "copier": answer_all(asked, BYTES, copier),
    }
    rows = rates(asked, right)
    counts = {"passkey": 6, "key_value": 6, "mqar": 2, "copy": 2}
    assert {t: sum(r["task"] == t for r in rows) for t in TASKS} == counts
    assert sum(r["samples"] for r in rows) == len(asked)
    assert all(r["oracle"] == 1 for r in rows)
    # Of 80 words one is the blind model's; numbers and lists are not to be guessed.
    assert all(r["blind"] == 0 for r in rows if r["task"] != "mqar")
    assert sum(right["blind"]) / len(asked) < 0.1
    # An induction head recalls all but the copy of words that were not copied before.
    for row in rows:
        assert row["copier"] == (0 if row["task"] == "copy" else 1), row


def test_batches_hold_so_many_tokens_and_keep_the_order():
    asked = questions(BYTES, tasks=["passkey", "copy"], lengths=(512, 1024), samples=2)
    answer, sizes = oracle(asked), []

    def complete(prompts, most):
        sizes.append([len(p) for p in prompts])
        return answer(prompts, most)

    wrong = asked[3]
    asked[3] = recall.Question("passkey", 512, 0.0, wrong.prompt, "never")
    right = answer_all(asked, BYTES, complete, batch_tokens=2048)
    assert right == [i != 3 for i in range(len(asked))]
    assert all(sum(s) <= 2048 or len(s) == 1 for s in sizes) and len(sizes) > 3
    assert max(map(len, sizes)) > 1


def test_what_counts_as_an_answer():
    assert is_answer(" 4812.", "4812") and is_answer("4812", "4812")
    assert not is_answer(" 48123", "4812") and not is_answer(" 481", "4812")
    assert not is_answer("the 4812", "4812") and not is_answer("", "4812")


def test_refusals():
    with pytest.raises(UserError, match="--recall_tasks: chess found"):
        questions(BYTES, tasks=["chess"])
    with pytest.raises(UserError, match=r"--recall_lengths: .* passkey needs at least"):
        questions(BYTES, tasks=["passkey"], lengths=(64,))
    for depth in (-0.5, 50, float("nan")):
        with pytest.raises(UserError, match=f"--recall_depths: {depth:g} found"):
            questions(BYTES, tasks=["passkey"], depths=(0.5, depth))
    with pytest.raises(UserError, match="--recall_samples: -1 found"):
        questions(BYTES, samples=-1)
