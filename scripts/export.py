"""Writes a model as a folder that stock libraries load, checks it there, and says what was checked.

    python scripts/export.py runs/demo
    python scripts/export.py runs/mine --format qwen3_5_text --out models/mine --dtype bfloat16

The folder is written beside its target, loaded by `transformers` without remote code and by
`hf.load_model`, compared with the model in float32, and only then renamed. docs/export.md says
which model fits which format. Tested by tests/test_export.py.
Shapes: B batch, T time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# Runnable as a file: the modules live one folder up and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import UserError
from generate import generate
from hf import (
    DTYPES,
    FORMATS,
    HYBRIDS,
    load_model,
    read_config,
    save_model,
    stored_state,
    tokenizer_spec,
)
from model import Transformer
from tokenizer import Tokenizer, load_tokenizer

TOKENS = 321  # odd, and several chunks of every kernel
NEW_TOKENS = 64
# Largest difference of two logits where their standard deviation is at most 1, else that many
# times it. Rounding alone makes 1.0e-4 in 30 layers of 576 where it is 6.2.
TOLERANCE = 1e-4
TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs; 3.14159, 1234567890 and -0x1F.",
    "na\u00efve caf\u00e9, cafe\u0301, \u4f60\u597d\u4e16\u754c, \u0645\u0631\u062d\u0628\u0627, "
    "\U0001f600\U0001f1f8\U0001f1ea",
    "def f(x):\n\treturn {k: v for k, v in x.items() if v != ''}  # it's\r\n\n    pass\n",
    "  two leading,   three inside, a tab\t and some trailing   \n\n ",
    "I'll, WE'VE, don't; e-mail@example.com https://example.com/a?b=c&d=%20",
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder (that has model/ in it) or model folder")
    parser.add_argument(
        "--format", default="auto", help=f"auto (the first that fits), {', '.join(FORMATS)}"
    )
    parser.add_argument("--out", default="", help="folder to write; empty = MODEL-FORMAT beside it")
    parser.add_argument("--dtype", default="", help="float32 or bfloat16; empty = as stored")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    args = parser.parse_args(argv)
    try:
        export(args.run, args.format, args.out, args.dtype, overwrite=args.overwrite)
    except (UserError, OSError) as e:
        print(f"error: {_one_line(e)}", file=sys.stderr)
        raise SystemExit(2) from None


def export(run: str, kind: str, out: str, dtype: str, *, overwrite: bool) -> Path:
    """Write, check, rename. UserError, with nothing left behind, when any of it fails."""
    if kind not in ("auto", *FORMATS):
        raise UserError(f"--format: '{kind}' found, auto, {', '.join(FORMATS)} expected")
    if dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"--dtype: '{dtype}' found, float32 or bfloat16 expected")
    source = Path(run)
    if not (source / "config.json").is_file():
        source = source / "model"
    if not (source / "config.json").is_file():
        raise UserError(f"{run}: no config.json and no model/config.json in it, a run expected")
    if not source.name:  # "." or ".."
        source = source.resolve()
    config = read_config(source)
    if kind == "auto":
        reasons = {k: FORMATS[k](config) for k in FORMATS if k not in ("retort", "fla")}
        kind = next((k for k, reason in reasons.items() if reason is None), "retort")
        print(f"--format auto: {kind}")
        if kind == "retort":
            for k, reason in reasons.items():
                print(f"  not {k}: {reason}")
    elif reason := FORMATS[kind](config):
        raise UserError(f"--format {kind}: {reason}")
    target = Path(out) if out else source.with_name(f"{source.name}-{kind}")
    _check_target(target, source, overwrite)
    transformers = None if kind == "retort" else _import_transformers(kind)
    spec = tokenizer_spec(source)
    model = load_model(source)
    part = target.with_name(target.name + ".part")
    try:
        _clear(part)
        save_model(model, part, tokenizer_from=spec, dtype=DTYPES.get(dtype), format=kind)
        state = stored_state(model, kind, DTYPES.get(dtype))
        model.load_state_dict({k: t.float() for k, t in state.items()}, assign=True)
        lines = verify(part, model, kind, spec, transformers)
        old = target.with_name(target.name + ".old")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        part.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        _clear(part)
    stored = dtype or "its own types"
    print(f"{source}: {config.layer_map()}, {model.num_params():,} parameters, in {stored}")
    for line in lines:
        print(f"  {line}")
    print(f"saved in {target} as {kind}")
    if kind == "bamba" and config.linear_num_key_heads > 1:
        print(
            "Load it with transformers 5.23 or newer: older ones give other logits, and no error."
        )
    if kind == "retort":
        print("Stock libraries cannot load the retort format, only this project's code can.")
    return target


def _check_target(target: Path, source: Path, overwrite: bool) -> None:
    if source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"--out: {target} is or holds the model to export, another folder expected")
    if target.exists():
        if not overwrite:
            raise UserError(f"--out: {target} exists; --overwrite replaces it")
        if not (target / "config.json").is_file():
            raise UserError(f"--out: {target} is no model folder, so it is not replaced")


def _clear(part: Path) -> None:
    for path in (part, part.with_name(part.name + ".tmp")):
        shutil.rmtree(path, ignore_errors=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


# ---- transformers


def _import_transformers(kind: str):
    """The library, quiet. UserError when it is missing or too old for the class."""
    try:
        import transformers
    except ImportError as e:  # missing, or refusing the versions it finds
        raise UserError(
            f"--format {kind}: every export is checked in transformers, which cannot be imported "
            f"({_one_line(e)}); pip install -e '.[hf]' brings it"
        ) from None
    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"--format {kind}: transformers {transformers.__version__} has no such class, "
            "5.2 or newer expected"
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if kind in HYBRIDS:
        family = kind.removesuffix("_text")
        with without("fla", "mamba_ssm", "causal_conv1d"):
            importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return transformers


@contextlib.contextmanager
def without(*packages: str) -> Iterator[None]:
    """Packages that cannot be imported. When transformers imports a model it takes these ones'
    GPU kernels if it finds them, and the check runs on the CPU, which they cannot run on."""
    held = {name: sys.modules.pop(name, None) for name in packages}
    sys.modules.update(dict.fromkeys(packages))
    try:
        yield
    finally:
        for name, module in held.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


# ---- the check


@torch.inference_mode()
def verify(folder: Path, model: Transformer, kind: str, spec: str, transformers) -> list[str]:
    """Compare `folder` with `model`, which is in float32 and rounded as the folder is. Returns a
    line for each thing that was compared; UserError at the first that differs."""
    tokenizer = load_tokenizer(spec)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator)
    prompt = tokenizer.prompt(TEXTS[0])
    batches = {f"{TOKENS} random tokens": ids, f"{len(prompt)} of text": torch.tensor([prompt])}
    mine = {what: _logits(model, batch) for what, batch in batches.items()}
    greedy = generate(model, prompt, NEW_TOKENS)
    lines = []
    if transformers is not None:
        peer = _load_stock(folder, transformers)
        found = {what: peer(batch).logits for what, batch in batches.items()}
        name = f"transformers {transformers.__version__}, {type(peer).__name__}"
        lines.append(f"{name}: {_compare(mine, found, name)}")
        _same_greedy(greedy, _stock_greedy(peer, prompt, transformers), name)
        lines.append(f"{name}: greedy continuation, {NEW_TOKENS} tokens: identical")
        del peer
        lines.append(_check_tokenizer(folder, tokenizer, transformers))
    back = load_model(folder, dtype=torch.float32)
    found = {what: _logits(back, batch) for what, batch in batches.items()}
    lines.append(f"read back: {_compare(mine, found, 'read back')}")
    _same_greedy(greedy, generate(back, prompt, NEW_TOKENS), "read back")
    lines.append(f"read back: greedy continuation, {NEW_TOKENS} tokens: identical")
    if (folder / "tokenizer.json").is_file():
        theirs = load_tokenizer(str(folder))
        if (theirs.hash, theirs.eos_token_id) != (tokenizer.hash, tokenizer.eos_token_id):
            raise UserError("export: the tokenizer read back is not the model's")
    return lines


def _logits(model: Transformer, ids: Tensor) -> Tensor:
    return model(ids) @ model.head_weight.T


def _compare(mine: dict[str, Tensor], found: dict[str, Tensor], name: str) -> str:
    """One line on the largest differences; UserError where one is above the limit."""
    parts = []
    for what, logits in mine.items():
        limit = TOLERANCE * max(1.0, logits.std().item())
        worst = (found[what] - logits).abs().max().item()
        if not worst <= limit:
            raise UserError(
                f"export: logits of {what} in {name} differ by {worst:.1e}, "
                f"{limit:.1e} at most expected; nothing was written"
            )
        parts.append(f"of {what} {worst:.1e} (limit {limit:.1e})")
    return "largest difference of logits " + ", ".join(parts)


def _same_greedy(mine: list[int], found: list[int], name: str) -> None:
    if mine != found:
        step = next((i for i, (a, b) in enumerate(zip(mine, found, strict=False)) if a != b), 0)
        raise UserError(
            f"export: the greedy continuation in {name} differs from token {step} on; "
            "nothing was written"
        )


def _load_stock(folder: Path, transformers):
    """The folder as AutoModelForCausalLM, float32. UserError when it does not load whole."""
    try:
        peer, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as e:  # whatever a library may raise on a folder it cannot read
        raise UserError(f"export: transformers cannot load it: {_one_line(e)}") from e
    wrong = [f"{what} {sorted(map(str, keys))[:2]}" for what, keys in report.items() if keys]
    if wrong:
        raise UserError(f"export: transformers did not load it whole: {', '.join(wrong)}")
    return peer.eval()


def _stock_greedy(peer, prompt: list[int], transformers) -> list[int]:
    """64 tokens of the library's own generate, without the end-of-text rule."""
    peer.generation_config = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False
    )
    ids = torch.tensor([prompt])
    new = peer.generate(ids, attention_mask=torch.ones_like(ids))
    return new[0, len(prompt) :].tolist()


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, transformers) -> str:
    """Ids of TEXTS and of the end-of-text token, in the library's tokenizer and in ours."""
    if not (folder / "tokenizer.json").is_file():
        return (
            f"tokenizer: {tokenizer.name} has no tokenizer.json, so stock libraries take ids only"
        )
    try:
        peer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as e:  # as above
        raise UserError(f"export: AutoTokenizer cannot load it: {_one_line(e)}") from e
    eos = tokenizer.decode([tokenizer.eos_token_id])
    texts = [*TEXTS, f"user\n{eos}\nassistant{eos}"]
    for text in texts:
        if peer.encode(text, add_special_tokens=False) != tokenizer.encode(
            text, special_tokens=True
        ):
            raise UserError(
                f"export: AutoTokenizer ({type(peer).__name__}) gives other ids for {text[:20]!r}; "
                "nothing was written"
            )
    return f"tokenizer: ids of {len(texts)} texts in AutoTokenizer: identical"


if __name__ == "__main__":
    main()
