r"""A byte-level BPE tokenizer.json run by tiktoken: the same ids, several times as fast.

    python -m pytest tests/test_fast_tokenizer.py

tiktoken knows ranks instead of merges: of all neighbours that together are a token it merges those
of the lowest rank. With the place of a token's merge as its rank that gives what the merges give
if every token comes out whole when it is encoded alone: within the bytes of that token the same
merges then happened as would alone, so the neighbours are the pair that is merged there. This is
checked for every token. How text is split before that is compared between the two libraries: on
texts that are hard to split, and class by class (`\p{L}`) on every character there is, since they
may know different versions of Unicode. Whoever fails a check stays with the `tokenizers` library.
"""

from __future__ import annotations

import functools
import json
import re

import numpy as np

LACKING = 2**32 - 1
NEVER = "<|in no text|>"  # without special tokens tiktoken looks for an empty one at every place

PROBE = (
    "It's we'll I'M they'Ve 'Twas don\u2019t o'clock '' 's 'S '\u017f",
    "0 12 345 6789 3.14159 1e-5 0x1F x1y22 1,234,567 \u00b2\u00bd\u2167 \u0663\u0664 \U0001d7d8",
    "def f(x):\n    return {'a': x[0]**2}  # note\n\n\n\tif x != y:\r\n\t\tpass\r\n#!/bin/sh\n",
    " a  b   c    \n d \n\n e\t\tf \t g\u00a0h\u3000\u3000i\u2003 j\u0085k\u2028l\x0b\x0c m  ",
    "   7  8\n9 \n 0 \u00a05  \t 4.  \n\n   5 x  5 \u200b n",
    "<|endoftext|> <|im_start|>user <s></s> [INST] <think> <|fim_prefix|>a<|endoftext|>",
    "antidisestablishmentarianism" * 8 + " " + "ab" * 700 + "!" * 900 + " " * 800 + "\n" * 500,
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4",
    "\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 \u05e2\u05d1 \u0627\u0644\u0639",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f1!",
    "nai\u0308ve cafe\u0301 A\u030a \u1e9b\u0323 \ufb01 \u212b \u0130 \u00df \u0345 \uac00\u11a8",
    'https://example.org/a_b-c?d=e&f=%20#g C++ A/B $5.00 50% ~/.x \\n "q" (a)[b]{c} me@example.org',
    "CamelCaseHTTPServer snake_case SCREAMING aB Ab \u01c5a \u00c9t\u00e9 \u02b0x \u201cq\u201d",
    "\ufeff\ufffd\x00\x01\x04\x7f\u00ad \ue000\U000f0000\U0010ffff",
)


class Unsupported(ValueError):
    """Why tiktoken cannot stand in for a tokenizer."""


class FastEncoder:
    """From a `tokenizers.Tokenizer` that takes special tokens as text. Raises `Unsupported`.
    `checked`: another one of the same tokenizer exists, so the libraries have been compared."""

    def __init__(self, backend, *, checked: bool = False):
        import tiktoken

        spec = json.loads(backend.to_str())
        pattern, (ranks, ids) = split_pattern(spec["pre_tokenizer"]), ranks_of(backend, spec)
        self._normalize = None
        if spec["normalizer"]:
            if spec["normalizer"]["type"] != "NFC":
                raise Unsupported(f"its normalizer is {spec['normalizer']['type']}")
            self._normalize = backend.normalizer.normalize_str
        self._added = [t["content"] for t in spec["added_tokens"] if not t["special"]]
        self._odd = odd_digits() if uses_digits(spec["pre_tokenizer"]) else frozenset()
        self._ids = ids
        self._encoding = tiktoken.Encoding(
            "fast", pat_str=pattern, mergeable_ranks=ranks, special_tokens={NEVER: len(ids)}
        )
        if not checked:
            compare_classes(pattern)
            self._compare(backend)

    def encode(self, text: str) -> np.ndarray | None:
        """The ids as uint32; None for a text that only the other library can encode."""
        if any(token in text for token in self._added):  # some are looked for before, some after
            return None
        if not text.isascii():
            if not self._odd.isdisjoint(text):
                return None
            text = self._normalize(text) if self._normalize else text
            if any(token in text for token in self._added):
                return None
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # white space of some 100,000 characters is too much for its regex
            return None
        ids = self._ids[ranks]
        # The other library leaves out a byte that the vocabulary lacks, and merges around it.
        return None if ids.size and ids.max() == LACKING else ids

    def _compare(self, backend) -> None:
        for text in PROBE:
            ids = self.encode(text)
            if (
                ids is not None
                and ids.tolist() != backend.encode(text, add_special_tokens=False).ids
            ):
                raise Unsupported(f"tiktoken's ids for {text[:20]!r} are others")


def split_pattern(pre_tokenizer: dict | None) -> str:
    """One regular expression for what ByteLevel, Digits + ByteLevel or Split + ByteLevel do."""
    pre = pre_tokenizer or {"type": "nothing"}
    *before, last = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds = [step["type"] for step in before]
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if not before and last["use_regex"]:
            return _gpt2_split(r" ?\p{N}+", r"\S")
        if kinds == ["Digits"] and last["use_regex"]:
            # Digits are cut out first, so that white space before one ends its piece of text.
            digits = r"\p{N}" if before[0]["individual_digits"] else r"\p{N}+"
            return _gpt2_split(digits, r"[^\s\p{N}]")
        if kinds == ["Split"] and not last["use_regex"]:
            regex = before[0]["pattern"].get("Regex")
            if regex and before[0]["behavior"] == "Isolated" and not before[0]["invert"]:
                return regex
    raise Unsupported(f"its text is split by {' + '.join([*kinds, last['type']])}")


def uses_digits(pre_tokenizer: dict | None) -> bool:
    steps = (pre_tokenizer or {}).get("pretokenizers", [])
    return any(step["type"] == "Digits" for step in steps)


@functools.cache
def odd_digits() -> frozenset[str]:
    """The characters that are a number to the `tokenizers` library's Digits, which has a table of
    its own, or to \\p{N} of tiktoken's library, but not to both."""
    import tiktoken
    from tokenizers import pre_tokenizers

    digits, ranks = pre_tokenizers.Digits(individual_digits=True), _bytes()
    encoding = tiktoken.Encoding(
        "digits", pat_str=r"\p{N}", mergeable_ranks=ranks, special_tokens={NEVER: 256}
    )
    odd = set()
    for block in _blocks():
        pieces = digits.pre_tokenize_str("a" + "a".join(block) + "a")
        theirs = {piece for piece, _ in pieces if len(piece) == 1} - {"a"}
        odd |= theirs ^ set(bytes(encoding.encode_ordinary(block)).decode())
    return frozenset(odd)


def _blocks() -> list[str]:
    """All characters, some thousand at a time. Planes 4 to 13 have never held one, 15 and 16 are
    for private use."""
    planes = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xF0000)]
    return ["".join(map(chr, planes[i : i + 4096])) for i in range(0, len(planes), 4096)]


def _bytes() -> dict[bytes, int]:
    return {bytes([byte]): byte for byte in range(256)}


def _gpt2_split(digits: str, after: str) -> str:
    """ByteLevel's own, with what it takes for digits and what must not follow white space. What
    needs no look ahead is in one group, which tiktoken's library then does at one go."""
    easy = rf" ?\p{{L}}+|{digits}|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{{L}}\p{{N}}]+"
    return rf"(?:{easy})|\s+(?!{after})|\s+"


def ranks_of(backend, spec: dict) -> tuple[dict[bytes, int], np.ndarray]:
    """(bytes -> rank, rank -> uint32 id) from vocabulary and merges; `LACKING` for a byte that is
    no token."""
    from tokenizers import Tokenizer

    model = spec["model"]
    if model["type"] != "BPE":
        raise Unsupported(f"its model is {model['type']}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise Unsupported(f"its model has {key} {model[key]}")
    vocab = model["vocab"]
    if model.get("ignore_merges"):
        plain = spec | {"model": model | {"ignore_merges": False}}
        backend = Tokenizer.from_str(json.dumps(plain))
    characters = byte_characters()
    latin = {ord(character): byte for byte, character in enumerate(characters)}
    ranks = {bytes([byte]): byte for byte in range(256)}
    ids = [vocab.get(character, LACKING) for character in characters]
    made, last = set(), None
    for left, right in model["merges"]:
        token = left + right
        if token == last:  # one more way to make it
            continue
        if token in made:
            raise Unsupported(f"its merges make {token!r} at two places")
        made.add(token)
        last = token
        # One that does not come out whole alone is never made within a text either.
        if [piece.id for piece in backend.model.tokenize(token)] == [vocab[token]]:
            try:
                ranks[token.translate(latin).encode("latin-1")] = len(ids)
            except UnicodeEncodeError:
                raise Unsupported(f"its token {token!r} is not of bytes") from None
            ids.append(vocab[token])
        elif model.get("ignore_merges"):
            raise Unsupported(f"its merges do not make {token!r}")
    if model.get("ignore_merges"):
        added = {token["content"] for token in spec["added_tokens"]}
        if lost := vocab.keys() - made - added - set(characters):
            raise Unsupported(f"its merges do not make {min(lost)!r}")
    return ranks, np.array(ids, np.uint32)


def byte_characters() -> list[str]:
    """What stands for each byte in a byte-level vocabulary: the character of that number where it
    can be seen, else one from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def compare_classes(pattern: str) -> None:
    """Raises `Unsupported` if the libraries differ on the characters of a class in the pattern."""
    import tiktoken
    from tokenizers import Regex, pre_tokenizers

    blocks, ranks = _blocks(), _bytes()
    classes = {*re.findall(r"\\p\{\w+\}", pattern), r"\s"}
    if "(?i:" in pattern:
        classes.add("(?i:[a-z])")
    for name in sorted(classes):
        # Both drop what is not in the class: tiktoken what its pattern does not match.
        encoding = tiktoken.Encoding(
            "class", pat_str=f"{name}+", mergeable_ranks=ranks, special_tokens={NEVER: 256}
        )
        split = pre_tokenizers.Split(Regex(f"{name}+"), "removed", invert=True)
        for block in blocks:
            kept = "".join(piece for piece, _ in split.pre_tokenize_str(block))
            if kept.encode() != bytes(encoding.encode_ordinary(block)):
                raise Unsupported(f"tokenizers and tiktoken know another {name}")
