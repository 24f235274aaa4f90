"""Tokenizers: round trips, special-token text, end-of-text lookup, hashes.

tiktoken encodings are tried only where their files are cached; nothing is downloaded.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from config import UserError
from recall import questions
from shard_writer import pack_documents
from tokenizer import load_tokenizer

TEXTS = [
    "The quick brown fox; 12345 jumps.",
    "naive cafe\u0301 \u00fcber \u4f60\u597d \U0001f600\n\ttabs  and   spaces ",
    "a <|endoftext|> in the middle and <|im_start|>user",
    "",
]
TIKTOKEN_URLS = {
    "gpt2": ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"),
    "o200k_base": ("encodings/o200k_base.tiktoken",),
}


def make_folder(folder, *, texts=TEXTS, vocab_size=400, **config):
    """A byte-level BPE folder like a published one, with settings that must not reach the data."""
    folder.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tok.enable_truncation(4)
    tok.enable_padding(length=16)
    tok.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tiktoken_or_skip(name):
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache")
    for part in TIKTOKEN_URLS[name]:
        url = "https://openaipublic.blob.core.windows.net/" + part
        if not (folder / hashlib.sha1(url.encode()).hexdigest()).is_file():
            pytest.skip(f"tiktoken's files for {name} are not cached")
    return load_tokenizer(name)


def check_round_trip(tok):
    for text in TEXTS:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert tok.eos_token_id not in ids
        assert all(0 <= i < tok.vocab_size for i in ids)
    assert tok.encode_batch(TEXTS) == [tok.encode(text) for text in TEXTS]
    assert [ids.tolist() for ids in tok.encode_arrays(TEXTS)] == tok.encode_batch(TEXTS)
    table = tok.token_bytes()
    assert len(table) == tok.vocab_size and table[tok.eos_token_id] == b""
    for text in TEXTS:
        assert b"".join(table[i] for i in tok.encode(text)) == text.encode()
    assert tok.decode(tok.encode("lone \ud800 surrogate")) == "lone \ufffd surrogate"
    assert tok.encode_batch(["\ud800"]) == [tok.encode("\ud800")]
    assert len(bytes.fromhex(tok.hash)) == 8


def test_byte_tokenizer():
    tok = load_tokenizer("byte")
    check_round_trip(tok)
    assert (tok.vocab_size, tok.eos_token_id, tok.bos_token_id) == (257, 256, None)
    assert tok.encode("A\u00e9") == [65, 0xC3, 0xA9]
    assert tok.decode([65, 256, 66, 300]) == "A<|endoftext|>B\ufffd"


@pytest.mark.parametrize(
    "name, vocab, eos", [("gpt2", 50257, 50256), ("o200k_base", 200019, 199999)]
)
def test_tiktoken(name, vocab, eos):
    tok = tiktoken_or_skip(name)
    check_round_trip(tok)
    assert (tok.name, tok.vocab_size, tok.eos_token_id) == (name, vocab, eos)
    assert tok.encode("<|endoftext|>", special_tokens=True) == [eos]
    assert tok.decode([*tok.encode("ab"), vocab + 5]) == "ab\ufffd"
    wide = "a" + " " * 1_500_000 + "b"  # more white space than its regular expressions take
    assert tok.decode(tok.encode(wide)) == wide


def test_tiktoken_without_network(monkeypatch):
    import requests
    import tiktoken

    def offline(name):
        raise requests.ConnectionError("a\nlong\nstory")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r"--tokenizer gpt2: .*TIKTOKEN_CACHE_DIR") as error:
        load_tokenizer("gpt2")
    assert "\n" not in str(error.value)


def test_chat_templates_by_name(tmp_path):
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    folder = make_folder(tmp_path, chat_template=named)
    assert load_tokenizer(str(folder)).chat_template == "d"
    says = r"tokenizer_config\.json: chat_template .* found, a text"
    for wrong in ([{"name": "default"}], [1], [{"name": "default", "template": 1}], 5):
        folder = make_folder(tmp_path, chat_template=wrong)
        with pytest.raises(UserError, match=says):
            load_tokenizer(str(folder))


def test_json_folder(tmp_path):
    folder = make_folder(tmp_path / "small", eos_token="<|im_end|>", chat_template="{{ messages }}")
    tok = load_tokenizer(str(folder))
    check_round_trip(tok)
    assert (tok.name, tok.eos_token_id, tok.bos_token_id) == ("small", 2, None)
    assert tok.chat_template == "{{ messages }}"
    # Longer than the truncation in the file, no padding, no added <|im_start|>.
    long = "fox jumps " * 50
    assert tok.decode(tok.encode(long)) == long
    assert tok.encode("<|im_start|>x", special_tokens=True) == [1, *tok.encode("x")]
    assert 1 not in tok.encode("<|im_start|>x")
    assert tok.decode([*tok.encode("ab"), tok.vocab_size + 3, *tok.encode("c")]) == "ab\ufffdc"
    assert load_tokenizer(str(folder / "tokenizer.json")).hash == tok.hash


@pytest.mark.parametrize(
    "config, eos",
    [
        ({"eos_token": {"content": "<|im_end|>"}}, 2),
        ({"eos_token": None}, 0),  # nothing said: the usual name
        ({"eos_token_id": [2, 0]}, 2),
        ({"eos_token_id": 1}, 1),
        ({"eos_token": "not in the vocabulary"}, 0),
    ],
)
def test_eos_in_tokenizer_config(tmp_path, config, eos):
    assert load_tokenizer(str(make_folder(tmp_path, **config))).eos_token_id == eos


def test_eos_order_of_files(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 1, "bos_token_id": 0}')
    tok = load_tokenizer(str(tmp_path))
    assert (tok.eos_token_id, tok.bos_token_id) == (1, 0)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    assert load_tokenizer(str(tmp_path)).eos_token_id == 2
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert load_tokenizer(str(tmp_path)).eos_token_id == 0


def test_every_listed_token_ends_a_text(tmp_path):
    tok = load_tokenizer(str(make_folder(tmp_path, eos_token="<|im_end|>")))
    assert tok.stops == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 999, 2]}')
    found = load_tokenizer(str(tmp_path))
    assert (found.stops, found.eos_token_id, found.hash) == ({0, 2}, 2, tok.hash)
    (tmp_path / "config.json").write_text('{"eos_token_id": [1]}')
    assert load_tokenizer(str(tmp_path)).stops == {0, 1, 2}
    (tmp_path / "config.json").write_text('{"eos_token_id": []}')
    assert load_tokenizer(str(tmp_path)).stops == {0, 2}
    assert load_tokenizer("byte").stops == {256}


def test_hash_is_of_the_vocabulary(tmp_path):
    a = make_folder(tmp_path / "a", eos_token="<|im_end|>")
    b = make_folder(tmp_path / "b")
    backend = Tokenizer.from_file(str(b / "tokenizer.json"))
    backend.no_truncation()
    backend.save(str(b / "tokenizer.json"), pretty=False)  # other bytes, same tokenizer
    c = make_folder(tmp_path / "c", vocab_size=300)
    hashes = [load_tokenizer(str(folder)).hash for folder in (a, b, c)]
    assert hashes[0] == hashes[1] != hashes[2]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    backend.save(str(b / "tokenizer.json"))  # same vocabulary, other splitting
    assert load_tokenizer(str(b)).hash != hashes[0]


def test_hash_is_of_what_added_tokens_do(tmp_path):
    found = set()
    for i, flags in enumerate(({}, {"special": False}, {"lstrip": True},
                               {"special": False, "normalized": True})):  # fmt: skip
        path = make_folder(tmp_path / str(i)) / "tokenizer.json"
        spec = json.loads(path.read_text())
        spec["added_tokens"][0] |= {"special": True, "normalized": False, **flags}
        path.write_text(json.dumps(spec))
        found.add(load_tokenizer(str(path)).hash)
    assert len(found) == 4


@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_begins_texts_begins_documents_and_prompts(where, tmp_path):
    """As Llama's do: before documents, prompts and recall's questions. The setting counts as
    in transformers 4, with which such models were trained; transformers 5 drops it."""
    plain, folder = (make_folder(tmp_path / name, eos_token="<|im_end|>") for name in "ab")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["bos_token"] = "<|endoftext|>"
    if where == "tokenizer.json":
        backend = Tokenizer.from_file(str(folder / where))
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        backend.save(str(folder / where))
    else:
        config["add_bos_token"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    other, tok = load_tokenizer(str(plain)), load_tokenizer(str(folder))
    assert (tok.starts, other.starts) == ([0], []) and tok.hash != other.hash
    ids = tok.encode("some text")
    assert ids == other.encode("some text") and tok.prompt("some text") == [0, *ids]
    tokens, ends = pack_documents([ids, [], ids[:2]], tok)
    eos = tok.eos_token_id
    assert tokens.tolist() == [0, *ids, eos, 0, *ids[:2], eos]
    assert ends.tolist() == [len(ids) + 2, len(ids) + 6]
    how = {"tasks": ["copy"], "lengths": [2048], "samples": 1}
    (asked,), (theirs,) = questions(tok, **how), questions(other, **how)
    assert asked.prompt == [0, *theirs.prompt]


def test_a_continuation_keeps_its_first_space(tmp_path):
    """SentencePiece's, whose decoder takes the first space off; bytes may end in a character."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *"\u2581abc"])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = load_tokenizer(str(tmp_path))
    ids = tok.encode("ab c ba")
    assert tok.decode(ids[3:]) == "c ba"
    for prompt in (ids[:3], tok.starts + ids[:3]):
        assert tok.continuation(prompt, ids[3:]) == " c ba"
    assert tok.continuation(ids[:4], ids[4:]) == "c ba"
    byte = load_tokenizer("byte")
    first, second = byte.encode("\u00fc")
    assert byte.continuation([97], [98, first]) == "b\ufffd"
    assert byte.continuation([97, first], [second, 98]) == "\ufffdb"


def test_portable_spec(tmp_path, monkeypatch):
    make_folder(tmp_path / "rel")
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("rel").portable_spec == "rel"
    assert load_tokenizer(str(tmp_path / "rel")).portable_spec is None
    assert load_tokenizer("byte").portable_spec == "byte"


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"--tokenizer 'nonsense'.*byte.*gpt2.*tokenizer\.json"):
        load_tokenizer("nonsense")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: the folder holds no tokenizer.json"):
        load_tokenizer(str(tmp_path / "empty"))
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match=r"cannot read .*tokenizer.json"):
        load_tokenizer(str(tmp_path))
    bare = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    bare.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no end-of-text token"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config.json holds list, expected an object"):
        load_tokenizer(str(tmp_path))
