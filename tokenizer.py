"""Tokenizers behind one small interface: bytes, tiktoken encodings, Hugging Face tokenizer.json.

    python -m pytest tests/test_tokenizer.py

`load_tokenizer(spec)` returns a `Tokenizer`. Its `hash` is taken over the vocabulary and the
splitting rules, not over file bytes, so two folders holding the same tokenizer agree and data can
be checked against a model. Nothing here imports torch: data workers start in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from config import UserError
from fast_tokenizer import FastEncoder, byte_characters

WHITE_SPACE_RUN = re.compile(r"\s{100000}")
# Where a bare tokenizer.json has no config beside it: the usual names of the end-of-text token.
COMMON_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]")
EOS_FILES = ("tokenizer_config.json", "generation_config.json", "config.json")


class Tokenizer:
    """What the rest of the code may use. Subclasses give `_encode`, `_encode_batch`, `decode`.

    name           short name for logs and meta.json
    spec           what the user typed; `portable_spec` is None when it is an absolute path
    vocab_size     1 + the largest id
    eos_token_id   appended to every document of a data set
    stops          what ends a generated text: eos_token_id, and others that the model's files list
    bos_token_id   or None
    starts         what it puts before every text: [bos] or []. Documents and prompts begin with it
    hash           16 hex digits (8 bytes) over vocabulary, merges, splitting rules and `starts`
    chat_template  Jinja source, or None
    library        which gives the ids
    """

    library = "tokenizers"

    def __init__(
        self, *, spec, name, vocab_size, eos_token_id, bos_token_id, digest, chat_template,
        starts=(), stops=(),
    ):  # fmt: skip
        self.spec = spec
        self.name = name
        self.vocab_size = vocab_size
        self.eos_token_id = eos_token_id
        self.stops = frozenset([eos_token_id, *stops])
        self.bos_token_id = bos_token_id
        self.starts = list(starts)
        self.hash = digest
        self.chat_template = chat_template

    @property
    def portable_spec(self) -> str | None:
        """The spec if it can mean the same on another machine, else None."""
        path = Path(self.spec)
        return None if path.is_absolute() or self.spec.startswith("~") else self.spec

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; nothing is added around it.

        Text such as "<|endoftext|>" is ordinary text unless `special_tokens` (chat prompts):
        a web page that mentions a control token must not end a document.
        """
        return self._encode(_valid_unicode(text), special_tokens)

    def prompt(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """`encode`, with what the tokenizer puts before a text (Llama's beginning of text)."""
        return [*self.starts, *self.encode(text, special_tokens=special_tokens)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts, several times faster where the library is."""
        return self._encode_batch([_valid_unicode(text) for text in texts])

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` for many texts as arrays, the fastest way there is."""
        return [np.array(ids, np.uint32) for ids in self.encode_batch(texts)]

    def speed_up(self, *, checked: bool = False) -> None:
        """Lets `encode_arrays` take a faster library where there is one. Raises
        `fast_tokenizer.Unsupported` where its ids could be others; `checked` spares a look."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`. Ids outside the vocabulary (padded embedding rows) show as U+FFFD."""
        raise AssertionError("subclasses decode")

    def continuation(self, prompt: list[int], new: list[int]) -> str:
        """Text of `new` after `prompt`, with the first space that SentencePiece's decoders take off
        every text."""
        before, whole = self.decode(prompt), self.decode(prompt + new)
        return whole[len(before) :] if whole.startswith(before) else self.decode(new)

    def token_bytes(self) -> list[bytes] | None:
        """The bytes of every id, which may be part of a character; b"" for control tokens and ids
        without a token. None where tokens are no bytes of the text (SentencePiece's)."""
        raise AssertionError("subclasses know their bytes")


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255 and one end-of-text id, 256."""

    library = "Python"

    def __init__(self):
        super().__init__(
            spec="byte",
            name="byte",
            vocab_size=257,
            eos_token_id=256,
            bos_token_id=None,
            digest=_digest("byte", 257),
            chat_template=None,
        )

    def _encode(self, text, special_tokens):
        return list(text.encode())

    def _encode_batch(self, texts):
        return [list(text.encode()) for text in texts]

    def encode_arrays(self, texts):
        return [np.frombuffer(_valid_unicode(text).encode(), np.uint8) for text in texts]

    def decode(self, ids):
        pieces = (bytes([i]) if i < 256 else _BYTE_OTHER.get(i, b"\xef\xbf\xbd") for i in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self):
        return [*(bytes([i]) for i in range(256)), b""]


_BYTE_OTHER = {256: b"<|endoftext|>"}


class TiktokenTokenizer(Tokenizer):
    """An encoding of OpenAI's tiktoken, by name."""

    library = "tiktoken"

    def __init__(self, spec, encoding):
        self._encoding = encoding
        ranks = encoding._mergeable_ranks
        digest = _digest(
            "tiktoken",
            encoding._pat_str,
            sorted(encoding._special_tokens.items()),
            sorted((rank, token.hex()) for token, rank in ranks.items()),
        )
        super().__init__(
            spec=spec,
            name=spec,
            vocab_size=encoding.n_vocab,
            eos_token_id=encoding.eot_token,
            bos_token_id=None,
            digest=digest,
            chat_template=None,
        )

    def _encode(self, text, special_tokens):
        if special_tokens:
            return self._encoding.encode(text, allowed_special="all", disallowed_special=())
        return self._array(text).tolist()

    def _encode_batch(self, texts):
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts):
        return [self._array(_valid_unicode(text)) for text in texts]

    def _array(self, text):
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # too much white space in one place for its regular expressions
            cuts = [0, *(run.end() for run in WHITE_SPACE_RUN.finditer(text)), len(text)]
            if len(cuts) == 2:
                raise
            return np.concatenate([self._array(text[a:b]) for a, b in pairwise(cuts)])

    def decode(self, ids):
        try:
            return self._encoding.decode(ids)
        except KeyError:  # an id that names no token: show that one, keep the rest
            return b"".join(map(self._token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self):
        table = [b""] * self.vocab_size
        for token, i in self._encoding._mergeable_ranks.items():
            table[i] = token
        return table

    def _token_bytes(self, i):
        try:
            return self._encoding.decode_single_token_bytes(i)
        except KeyError:
            return b"\xef\xbf\xbd"


class JsonTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, spec, path):
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise UserError(f"--tokenizer: cannot read {path}: {_one_line(error)}") from error
        # Files saved from a training run may cut or pad every text: documents must stay whole.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._with_special = self._fast = None
        folder = path.parent
        config = _read_json(folder / "tokenizer_config.json")
        vocab = self._backend.get_vocab(with_added_tokens=True)
        vocab_size = 1 + max(vocab.values(), default=-1)
        stops = self._token_ids(folder, "eos", vocab, vocab_size)
        eos = next(iter(stops or [vocab[name] for name in COMMON_EOS if name in vocab]), None)
        if eos is None:
            raise UserError(
                f"--tokenizer {spec}: no end-of-text token found; expected eos_token in"
                f" {folder / 'tokenizer_config.json'} naming a token of the vocabulary"
            )
        bos = next(iter(self._token_ids(folder, "bos", vocab, vocab_size)), None)
        # In the file itself, or by the setting: transformers 4 heeds it for Llama's tokenizers,
        # transformers 5 drops it beside a tokenizer.json; here it counts, as the model was trained.
        first = self._backend.encode("", add_special_tokens=True).ids[:1]
        adds = bos is not None and (first == [bos] or config.get("add_bos_token") is True)
        starts = [bos] if adds else []
        super().__init__(
            spec=spec,
            name=path.resolve().parent.name if path.name == "tokenizer.json" else path.stem,
            vocab_size=vocab_size,
            eos_token_id=eos,
            bos_token_id=bos,
            digest=_json_digest(self._backend.to_str(), starts),
            chat_template=_chat_template(folder, config),
            starts=starts,
            stops=stops,
        )

    def _token_ids(self, folder, which, vocab, vocab_size):
        """The ids of eos/bos tokens: of the tokenizer's own config first, then of the model's."""
        found = []
        for name in EOS_FILES:
            config = _read_json(folder / name)
            for key in (f"{which}_token_id", f"{which}_token"):
                values = config.get(key)
                for value in values if isinstance(values, list) else [values]:
                    if isinstance(value, dict):
                        value = value.get("content")
                    if isinstance(value, str):
                        value = vocab.get(value)
                    if isinstance(value, int) and 0 <= value < vocab_size:
                        found.append(value)
        return found

    def _encode(self, text, special_tokens):
        backend = self._backend
        if special_tokens:
            if self._with_special is None:  # a second copy, since the switch is a shared setting
                self._with_special = type(backend).from_str(backend.to_str())
                self._with_special.encode_special_tokens = False
            backend = self._with_special
        return backend.encode(text, add_special_tokens=False).ids

    def encode_arrays(self, texts):
        if self._fast is None:
            return super().encode_arrays(texts)
        arrays = [self._fast.encode(_valid_unicode(text)) for text in texts]
        return [
            np.array(self.encode(text), np.uint32) if ids is None else ids
            for text, ids in zip(texts, arrays, strict=True)
        ]

    def speed_up(self, *, checked=False):
        self._fast = FastEncoder(self._backend, checked=checked)
        self.library = "tiktoken"

    def _encode_batch(self, texts):
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids):
        # The library drops unknown ids in silence; cut at them so that they show.
        pieces, known = [], []
        for i in ids:
            if self._backend.id_to_token(i) is None:
                pieces += [self._backend.decode(known, skip_special_tokens=False), "\ufffd"]
                known = []
            else:
                known.append(i)
        return "".join([*pieces, self._backend.decode(known, skip_special_tokens=False)])

    def token_bytes(self):
        spec = json.loads(self._backend.to_str())
        pre = spec["pre_tokenizer"] or {}
        if "ByteLevel" not in [step.get("type") for step in pre.get("pretokenizers", [pre])]:
            return None
        latin = {ord(character): byte for byte, character in enumerate(byte_characters())}
        table = [b""] * self.vocab_size
        for token, i in self._backend.get_vocab(with_added_tokens=False).items():
            with suppress(UnicodeEncodeError):  # one that no text has
                table[i] = token.translate(latin).encode("latin-1")
        for token in spec["added_tokens"]:
            table[token["id"]] = b"" if token["special"] else token["content"].encode()
        return table


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `--tokenizer SPEC` names.

    "byte", a tiktoken encoding ("gpt2", "o200k_base", ...), or the path of a tokenizer.json or of
    a folder holding one. A path wins over a tiktoken name only if written as one ("./gpt2").
    Raises `UserError` for anything else, or when tiktoken cannot get its files.
    """
    import tiktoken

    if spec == "byte":
        return ByteTokenizer()
    names = tiktoken.list_encoding_names()
    if spec in names:
        try:
            return TiktokenTokenizer(spec, tiktoken.get_encoding(spec))
        except (OSError, ValueError) as error:  # no network (requests), or a damaged cached file
            raise UserError(
                f"--tokenizer {spec}: tiktoken cannot get its vocabulary files"
                f" ({type(error).__name__}); connect once, or set TIKTOKEN_CACHE_DIR to a folder"
                " that has them"
            ) from error
    path = Path(spec).expanduser()
    if path.is_dir():
        file = path / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"--tokenizer {spec}: the folder holds no tokenizer.json")
        return JsonTokenizer(spec, file)
    if path.is_file():
        return JsonTokenizer(spec, path)
    raise UserError(
        f'--tokenizer {spec!r}: expected "byte", a tiktoken encoding ({", ".join(names)}), or the'
        " path of a tokenizer.json or of a folder holding one"
    )


def _json_digest(serialized: str, starts: list[int]) -> str:
    """Only what decides the ids: not padding, truncation, or how text is decoded."""
    tokenizer = json.loads(serialized)
    usual = {"special": True, "lstrip": False, "rstrip": False, "single_word": False}
    added = []
    for token in tokenizer["added_tokens"]:
        other = {key: token[key] for key, value in usual.items() if token[key] != value}
        if not token["special"]:  # special ones are never text
            other["normalized"] = token["normalized"]
        added.append((token["id"], token["content"], *([other] if other else [])))
    parts = [tokenizer[key] for key in ("model", "normalizer", "pre_tokenizer")]
    added.sort(key=lambda entry: entry[:2])
    return _digest("json", added, *parts, *([starts] if starts else []))


def _digest(*parts) -> str:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _chat_template(folder: Path, config: dict) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    with suppress(TypeError, KeyError):  # what is no such list stays one
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise UserError(
            f"--tokenizer: {folder / 'tokenizer_config.json'}: chat_template {template!r:.60}"
            " found, a text, or a list of objects with name and template, expected"
        )
    return template


def _read_json(path: Path) -> dict:
    """The file's object; {} if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"--tokenizer: {path} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"--tokenizer: {path} holds {type(value).__name__}, expected an object")
    return value


def _valid_unicode(text: str) -> str:
    """JSON may hold lone surrogates, which no tokenizer can encode: they become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
