"""tiktoken in the place of tokenizers: the same ids, or a refusal that says why."""

from __future__ import annotations

import inspect
import json
import random

import numpy as np
import pytest
from test_tokenizer import make_folder
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

import fast_tokenizer
from fast_tokenizer import PROBE, FastEncoder, Unsupported
from tokenizer import load_tokenizer

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [inspect.getsource(json), inspect.getsource(inspect), *PROBE]
PIECES = [*"ab1 2\n\t .,'\"-_sS\r", "\u00e9", "\u4f60", "\U0001f600", "\u0301", "\u00a0",
          "\u2028", "\x04", "\u00b2", "'ll", "    ", "\n\n", "<|endoftext|>", "<think>", "the",
          "\u017f"]  # fmt: skip


def byte_level(use_regex=True, prefix=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)


def split_by(pattern, behavior="isolated"):
    return pre_tokenizers.Split(Regex(pattern), behavior)


SPLITS = {
    "gpt2": byte_level(),
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()]),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(False), byte_level()]),
    "qwen, llama3": pre_tokenizers.Sequence([split_by(WORDS), byte_level(use_regex=False)]),
}


def trained(folder, splits, **changes):
    """A backend whose merges were learned under `splits`; `changes` to the fields of its model."""
    make_folder(folder, texts=TEXTS, vocab_size=1500)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    spec = json.loads(backend.to_str())
    backend.pre_tokenizer = splits
    spec["pre_tokenizer"] = json.loads(backend.to_str())["pre_tokenizer"]
    spec["model"] |= changes
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def check_same(backend, encoder, *, slow_at_most=0.0):
    """On real text, the probe, and random strings of everything that is difficult."""
    rng = random.Random(5)
    made = ["".join(rng.choices(PIECES, k=rng.randrange(1, 40))) for _ in range(4000)]
    texts = [*TEXTS, *made]
    left = 0
    for text, slow in zip(
        texts, backend.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        ids = encoder.encode(text)
        left += ids is None
        assert ids is None or ids.tolist() == slow.ids, text[:200]
    assert left <= slow_at_most * len(texts)


@pytest.mark.parametrize("name", ["smollm2", "digits"])
def test_what_is_a_number_to_one_library_only(name, tmp_path):
    """`Digits` has a table of its own."""
    odd = fast_tokenizer.odd_digits()
    assert "\U00011de0" in odd and not odd & set("0\u0660\u00b2\u4f60")
    backend = trained(tmp_path, SPLITS[name])
    encoder = FastEncoder(backend)
    assert all(encoder.encode(f"x  {c} 1") is None for c in odd)
    for c in "\u0660\u00b2\uff15\u2167":  # others, of which they think alike
        text = f"x  {c}{c}1 {c}"
        assert encoder.encode(text).tolist() == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", SPLITS)
def test_ids_are_the_same(name, tmp_path):
    backend = trained(tmp_path, SPLITS[name])
    encoder = FastEncoder(backend)
    check_same(backend, encoder)
    text = TEXTS[1]
    assert len(encoder.encode(text)) < len(text) / 2  # it has merges
    check_same(backend, FastEncoder(backend, checked=True))


def test_merges_listed_in_every_way_and_ignored(tmp_path):
    """As transformers writes Llama-3's: all pairs that make a token, in a row."""
    backend = trained(tmp_path, SPLITS["qwen, llama3"])
    vocab = json.loads(backend.to_str())["model"]["vocab"]
    made = sorted((i, t) for t, i in vocab.items() if len(t) > 1 and not t.startswith("<|"))
    merges = [
        [token[:k], token[k:]]
        for _, token in made
        for k in range(1, len(token))
        if token[:k] in vocab and token[k:] in vocab
    ]
    assert len(merges) > 1.2 * len(made)
    backend = trained(tmp_path, SPLITS["qwen, llama3"], merges=merges, ignore_merges=True)
    check_same(backend, FastEncoder(backend))
    vocab["q" * 9] = 1 + max(vocab.values())  # which no merge makes
    backend = trained(tmp_path, SPLITS["gpt2"], merges=merges, ignore_merges=True, vocab=vocab)
    with pytest.raises(Unsupported, match="do not make 'qqqqqqqqq'"):
        FastEncoder(backend)


def test_tokens_out_of_order_and_bytes_that_are_missing(tmp_path):
    """Ids that do not follow the merges; texts with a byte that has no token go the slow way."""
    backend = trained(tmp_path, SPLITS["smollm2"])
    model = json.loads(backend.to_str())["model"]
    names = [t for t in model["vocab"] if t not in ("\u0104", "\u00f0")]  # bytes 4 and 0xf0
    random.Random(2).shuffle(names)
    merges = [pair for pair in model["merges"] if "\u00f0" not in "".join(pair)]
    names = [t for t in names if "\u00f0" not in t and "\u0104" not in t]
    vocab = {name: i for i, name in enumerate(names)}
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["id"] = vocab[token["content"]]
    spec["model"] |= {"vocab": vocab, "merges": merges}
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.encode_special_tokens = True
    encoder = FastEncoder(backend)
    assert encoder.encode("a\x04b") is None and encoder.encode("\U0001f600") is None
    check_same(backend, encoder, slow_at_most=0.9)


def test_added_tokens_that_are_not_special(tmp_path):
    """They are found within text even where special ones are not."""
    backend = trained(tmp_path, SPLITS["gpt2"])
    backend.add_tokens([AddedToken("<think>", special=False)])
    encoder = FastEncoder(backend)
    assert encoder.encode("a <think> b") is None and encoder.encode("a <|endoftext|> b") is not None
    check_same(backend, encoder, slow_at_most=0.7)


def test_an_added_token_before_a_combining_mark(tmp_path):
    """It is looked for before the text is normalised, which would join its end with the mark."""
    backend = trained(tmp_path, SPLITS["gpt2"])
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    slow = backend.encode("<think>\u0338", add_special_tokens=False).ids
    assert slow[0] == backend.token_to_id("<think>")
    assert FastEncoder(backend).encode("<think>\u0338") is None


def test_nfc(tmp_path):
    backend = trained(tmp_path, SPLITS["gpt2"])
    backend.normalizer = normalizers.NFC()
    encoder = FastEncoder(backend)
    assert encoder.encode("cafe\u0301").tolist() == encoder.encode("caf\u00e9").tolist()
    check_same(backend, encoder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: setattr(t, "normalizer", normalizers.NFKC()), "its normalizer is NFKC"),
        (lambda t: setattr(t, "pre_tokenizer", byte_level(prefix=True)), "is split by ByteLevel"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()), "split by Metaspace"),
        (
            lambda t: setattr(
                t, "pre_tokenizer",
                pre_tokenizers.Sequence([split_by(r"\d"), split_by(WORDS), byte_level(False)]),
            ),
            r"split by Split \+ Split \+ ByteLevel",
        ),
        (
            lambda t: setattr(
                t, "pre_tokenizer",
                pre_tokenizers.Sequence([split_by(r"\s+", "removed"), byte_level(False)]),
            ),
            r"split by Split \+ ByteLevel",
        ),
        # What this one does not match is one piece there and lost in tiktoken.
        (
            lambda t: setattr(
                t, "pre_tokenizer", pre_tokenizers.Sequence([split_by(r"\w+"), byte_level(False)])
            ),
            "tiktoken's ids for .* are others",
        ),
        (lambda t: setattr(t.model, "dropout", 0.1), "its model has dropout 0.1"),
        (lambda t: setattr(t.model, "byte_fallback", True), "its model has byte_fallback True"),
    ],
)  # fmt: skip
def test_others_are_refused(tmp_path, change, message):
    backend = trained(tmp_path, SPLITS["gpt2"])
    change(backend)
    with pytest.raises(Unsupported, match=message):
        FastEncoder(backend)


def test_merges_in_another_order_are_refused(tmp_path):
    backend = trained(tmp_path, SPLITS["gpt2"])
    model = json.loads(backend.to_str())["model"]
    merges, vocab = model["merges"], model["vocab"]
    whole = ((a + b, a) for a, b in merges if len(a + b) > 3)
    other = next([t[:1], t[1:]] for t, a in whole if len(a) > 1 and t[1:] in vocab)
    backend = trained(tmp_path, SPLITS["gpt2"], merges=[*merges, other])
    with pytest.raises(Unsupported, match="at two places"):
        FastEncoder(backend)
    # Learned late and moved to the front: some tokens are never made any more.
    backend = trained(tmp_path, SPLITS["gpt2"], merges=merges[::-1])
    check_same(backend, FastEncoder(backend))


def test_another_unicode_is_refused(tmp_path, monkeypatch):
    """As if one library took U+0378, which has no meaning yet, for a letter."""
    backend = trained(tmp_path, SPLITS["gpt2"])
    real = pre_tokenizers.Split

    def newer(pattern, behavior, invert=False):
        name = "[\\p{L}\u0378]+" if pattern == r"\p{L}+" else pattern
        return real(Regex(name), behavior, invert)

    monkeypatch.setattr("tokenizers.Regex", str)
    monkeypatch.setattr(pre_tokenizers, "Split", newer)
    with pytest.raises(Unsupported, match=r"know another \\p\{L\}"):
        FastEncoder(backend)


def test_model_without_byte_level_is_refused():
    backend = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = SPLITS["gpt2"]
    with pytest.raises(Unsupported, match="its model is WordPiece"):
        FastEncoder(backend)
    backend = Tokenizer(models.BPE({"\u4f60": 0, "a": 1, "\u4f60a": 2}, [("\u4f60", "a")]))
    backend.pre_tokenizer = SPLITS["gpt2"]
    with pytest.raises(Unsupported, match="is not of bytes"):
        FastEncoder(backend)


def test_very_long_texts(tmp_path):
    """White space that is too much for tiktoken's regular expressions goes the slow way."""
    make_folder(tmp_path / "t", texts=TEXTS, vocab_size=1500)
    fast, slow = (load_tokenizer(str(tmp_path / "t")) for _ in range(2))
    fast.speed_up()
    assert (fast.library, slow.library) == ("tiktoken", "tokenizers")
    texts = [" " * 1_000_000 + "x", "ab" * 300_000, "lone \ud800 surrogate", ""]
    assert fast._fast.encode(texts[0]) is None and fast._fast.encode(texts[1]) is not None
    for a, b in zip(fast.encode_arrays(texts), slow.encode_arrays(texts), strict=True):
        assert np.array_equal(a, b)
    assert fast.hash == slow.hash and fast_tokenizer.NEVER not in "".join(TEXTS)
