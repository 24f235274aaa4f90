"""Hugging Face folders in and out; with `hf_files.py` and `hf_hybrids.py` the only file that knows
their key names.

    config, model, tokenizer_spec = load_model("models/smollm2-135m")
    save_model(model, "runs/x/model", tokenizer_from="models/smollm2-135m")

Reads llama, qwen2, qwen3 (single or indexed safetensors, config spelling of transformers 4 and 5),
the hybrids qwen3_5_text and bamba, and our own `retort` format, which holds every model. Plain
models are written as the stock class they fit, everything else as `retort`, which stock libraries
cannot load, unless a format is named; `scripts/export.py` names one and checks the result.
Check: `pytest tests/test_hf.py tests/test_hf_files.py tests/test_export.py`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

import hf_hybrids
from config import ModelConfig, UserError
from hf_files import (
    file_key,
    listed_ends,
    opened,
    our_name,
    read_json,
    read_weights,
    require_tied,
    weight_files,
    write_weights,
)
from model import Transformer
from optimizer import param_role

PLAIN = ("llama", "qwen2", "qwen3")
HYBRIDS = ("qwen3_5_text", "bamba")
MODEL_TYPES = (*PLAIN, *HYBRIDS, "retort")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _config_json(folder: str | Path) -> dict:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json, a Hugging Face or retort model folder expected")
    return read_json(path)


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a model folder. UserError for what our model cannot represent."""
    path, raw = Path(folder) / "config.json", _config_json(folder)
    kind = raw.get("model_type")
    if "text_config" in raw:
        raise UserError(
            f"{path}: a text model nested in text_config found (model_type '{kind}'), "
            "the text model alone expected"
        )
    if kind not in MODEL_TYPES:
        raise UserError(
            f"{path}: model_type '{kind}' found, one of {', '.join(MODEL_TYPES)} expected"
        )
    if kind == "retort":
        if not isinstance(raw.get("retort"), dict):
            raise UserError(f"{path}: no field 'retort' found, the model's shape expected in it")
        known = {f.name for f in dataclasses.fields(ModelConfig)}
        extra = set(raw["retort"]) - known
        if extra:
            raise UserError(f"{path}: unknown fields {sorted(extra)}; a newer version wrote it")
    fields = raw["retort"] if kind == "retort" else _from_hf(raw, path)
    try:
        return ModelConfig(**fields)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def _from_hf(raw: dict, path: Path) -> dict:
    """The fields of a ModelConfig."""
    kind = raw["model_type"]
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads"):  # fmt: skip
        if type(raw.get(key)) is not int:  # True is an int to isinstance
            raise UserError(f"{path}: {key} is {raw.get(key)}, a whole number expected")
    for key, plain in (("hidden_act", "silu"), ("mlp_bias", False), ("quantization_config", None)):
        if raw.get(key, plain) not in (plain, None):
            raise UserError(f"{path}: {key} {raw[key]} is not supported, {plain} expected")
    rope, theta = _rope(raw, path)
    default = hf_hybrids.ROTARY_SHARE.get(kind, 1.0)
    if kind != "bamba":  # which reads it in rope_parameters alone
        default = raw.get("partial_rotary_factor") or default
    share = rope.pop("partial_rotary_factor", None) or default
    if share != 1.0:
        raise UserError(f"{path}: partial_rotary_factor {share} is not supported, 1.0 expected")
    heads = raw["num_attention_heads"]
    bias = bool(raw.get("attention_bias", False))
    window, kinds = _windows(raw, path)
    first = lambda value: next(iter(value), None) if isinstance(value, list) else value  # noqa: E731
    layers = {"layer_types": kinds}
    if kind in HYBRIDS:
        layers = hf_hybrids.from_config(raw, path)
    return dict(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim")
        or (128 if kind == "qwen3" else raw["hidden_size"] // max(1, heads)),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=rope if "rope_type" in rope else None,
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=True if kind == "qwen2" else bias,
        attention_output_bias=False if kind == "qwen2" else bias,
        qk_norm=kind in ("qwen3", "qwen3_5_text"),
        sliding_window=window,
        initializer_range=raw.get("initializer_range", 0.02),
        **layers,
        bos_token_id=first(raw.get("bos_token_id")),
        eos_token_id=first(raw.get("eos_token_id")),
    )


def _rope(raw: dict, path: Path) -> tuple[dict, float]:
    """(parameters without the base, and without the type if it is default; base). UserError where
    the spellings of transformers 4 and 5 are both there and differ: versions prefer either."""
    found, theta = {}, None
    for key in ("rope_parameters", "rope_scaling"):
        if not raw.get(key):
            continue
        if not isinstance(raw[key], dict):
            raise UserError(f"{path}: {key} is {raw[key]!r}, an object expected")
        rope = dict(raw[key])
        base = rope.pop("rope_theta", None)
        theta = theta or base
        if "type" in rope:  # an older v4 spelling
            rope.setdefault("rope_type", rope.pop("type"))
        if rope.get("rope_type") == "default":
            del rope["rope_type"]
        found[key] = rope
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        raise UserError(
            f"{path}: rope_scaling {raw['rope_scaling']} and rope_parameters "
            f"{raw['rope_parameters']} found, the same in both or one of them expected"
        )
    theta = theta or raw.get("rope_theta") or 10000.0
    if type(theta) not in (int, float):
        raise UserError(f"{path}: rope_theta is {theta!r}, a number expected")
    return next(iter(found.values()), {}), float(theta)


def _windows(raw: dict, path: Path) -> tuple[int, object]:
    """(window, layer types); qwen2/3 switch windows on from layer `max_window_layers`."""
    n = raw["num_hidden_layers"]
    if raw["model_type"] not in ("qwen2", "qwen3") or not raw.get("use_sliding_window"):
        return 0, ["full_attention"] * n
    first = raw.get("max_window_layers", 28)
    if type(first) is not int:
        raise UserError(f"{path}: max_window_layers is {first!r}, a whole number expected")
    kinds = raw.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(n)
    ]
    sliding = isinstance(kinds, list) and "sliding_attention" in kinds  # others are refused later
    return (raw.get("sliding_window") or 0 if sliding else 0), kinds


def model_type(folder: str | Path) -> str:
    """What config.json says; UserError without one."""
    return _config_json(folder).get("model_type", "")


def tokenizer_spec(folder: str | Path) -> str:
    """What `load_tokenizer` takes for this model: its folder, or the name it was trained with."""
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return str(folder)
    name = _config_json(folder).get("retort_tokenizer")
    if not name or not isinstance(name, str):
        raise UserError(f"{folder}: no tokenizer.json; --tokenizer has to name one")
    return name


@contextmanager
def stored_rows(
    folder: str | Path, config: ModelConfig
) -> Iterator[dict[str, tuple[tuple[int, ...], Callable[[int, int], Tensor]]]]:
    """Our name of every tensor in a folder -> (its shape, what reads its rows start to stop), while
    its files are open. The hybrids of other libraries are read whole, as their tensors are not ours
    one to one."""
    kind = model_type(folder)
    if kind in HYBRIDS:
        found = {our_name(key): t for key, t in read_weights(folder).items()}
        found = hf_hybrids.from_weights(found, config, kind, folder)
        yield {name: (tuple(t.shape), lambda a, b, t=t: t[a:b]) for name, t in found.items()}
        return
    with ExitStack() as stack:
        rows = {}
        for path in weight_files(Path(folder)):
            f = stack.enter_context(opened(path))
            for key in f.keys():  # noqa: SIM118
                piece = f.get_slice(key)
                rows[our_name(key)] = tuple(piece.get_shape()), lambda a, b, p=piece: p[a:b]
        yield rows


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """The model of a folder with its weights, in `dtype` (None: as stored; `load_type` has the
    exceptions). UserError when the weights do not fit the config, naming the first key."""
    model = _empty_model(folder)
    found = {our_name(key): t for key, t in read_weights(folder).items()}
    kind = model_type(folder)
    if kind in HYBRIDS:
        found = hf_hybrids.from_weights(found, model.config, kind, folder)
    names = _fitting(folder, model, {name: t.shape for name, t in found.items()}, found.get)
    types = {n: load_type(n, found[n], dtype) if dtype else found[n].dtype for n in names}
    tensors = {n: found[n].to(device=device, dtype=types[n]) for n in names}
    model.load_state_dict(tensors, assign=True)
    return model


def load_shape(folder: str | Path, dtype: torch.dtype) -> Transformer:
    """The model of a folder in `dtype` without its weights, on the meta device; they are there and
    fit, or `load_model`'s UserError is raised."""
    model = _empty_model(folder)
    with stored_rows(folder, model.config) as stored:
        read = lambda name: stored[name][1](0, stored[name][0][0])  # noqa: E731
        _fitting(folder, model, {name: shape for name, (shape, _) in stored.items()}, read)
    for name, p in model.named_parameters():
        p.data = p.data.to(load_type(name, p, dtype))
    return model


def load_type(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype`; at least float32 for what is no matrix of a linear layer: in bfloat16 a decay of
    many tokens would be another one."""
    if ".linear_attn." in name and param_role(name, tensor) == "no_decay":
        return torch.promote_types(dtype, torch.float32)
    return dtype


def _empty_model(folder: str | Path) -> Transformer:
    with torch.device("meta"):
        return Transformer(read_config(folder))


def _fitting(
    folder: str | Path, model: Transformer, found: dict[str, Sequence[int]],
    read: Callable[[str], Tensor],
) -> list[str]:  # fmt: skip
    """The names of the model's tensors, for which those found in the folder, name -> shape, are all
    there and fit; UserError naming the first that does not. read: a tensor by its name, for a head
    stored beside a tied embedding, which has to be the same."""
    wanted, names = model.state_dict(), []
    for name, shape in found.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name not in wanted:
            raise UserError(f"{folder}: weight {name} found, the config has no place for it")
        if tuple(shape) != tuple(wanted[name].shape):
            raise UserError(
                f"{folder}: weight {name} has shape {tuple(shape)}, "
                f"{tuple(wanted[name].shape)} expected"
            )
        names.append(name)
    missing = sorted(set(wanted) - set(names))
    if missing:
        raise UserError(f"{folder}: weight {missing[0]} is missing ({len(missing)} in all)")
    if "lm_head.weight" in set(found) - set(names):
        require_tied(folder, read)
    return names


# ---- which format holds which model


def _unfit_plain(config: ModelConfig) -> str | None:
    """What no plain class holds."""
    if "linear_attention" in config.layer_types:
        i = config.layer_types.index("linear_attention")
        return f"layer {i} is linear ({config.mixer_name(i)}), softmax layers only expected"
    return "attention sinks found, none expected" if config.attention_sink else None


def unfit_llama(config: ModelConfig) -> str | None:
    """Why LlamaForCausalLM cannot hold the model, or None."""
    if reason := _unfit_plain(config):
        return reason
    if config.qk_norm:
        return "softmax layers with q/k-norm (Qwen3) found, none expected"
    if "sliding_attention" in config.layer_types:
        i = config.layer_types.index("sliding_attention")
        return f"layer {i} has a sliding window, full attention expected"
    if config.attention_bias != config.attention_output_bias:
        return "biases on only some of q, k, v, o found, all or none expected"
    return None


def unfit_qwen2(config: ModelConfig) -> str | None:
    """Why Qwen2ForCausalLM cannot hold the model, or None."""
    if reason := _unfit_plain(config):
        return reason
    if config.qk_norm:
        return "softmax layers with q/k-norm (Qwen3) found, none expected"
    if not config.attention_bias or config.attention_output_bias:
        return "other biases than Qwen2's found, q, k, v with a bias and o without expected"
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        return f"head_dim {config.head_dim} found, hidden_size / heads expected"
    return None


def unfit_qwen3(config: ModelConfig) -> str | None:
    """Why Qwen3ForCausalLM cannot hold the model, or None."""
    if reason := _unfit_plain(config):
        return reason
    if not config.qk_norm:
        return "softmax layers without q/k-norm (Llama, Qwen2) found, Qwen3's q/k-norm expected"
    if config.attention_bias != config.attention_output_bias:
        return "biases on only some of q, k, v, o found, all or none expected"
    return None


def unfit_retort(config: ModelConfig) -> str | None:
    """None: our own format holds every model."""
    return None


def unfit_fla(config: ModelConfig) -> str | None:
    """Always a reason."""
    return (
        "its hybrid class cannot be imported without flash-attn, so that no export to it could be "
        "checked; --format retort holds every model"
    )


# In the order of preference.
FORMATS = {
    "llama": unfit_llama,
    "qwen2": unfit_qwen2,
    "qwen3": unfit_qwen3,
    "qwen3_5_text": hf_hybrids.unfit_qwen3_5_text,
    "bamba": hf_hybrids.unfit_bamba,
    "retort": unfit_retort,
    "fla": unfit_fla,
}


def stock_type(config: ModelConfig) -> str | None:
    """The transformers class a plain model fits, or None (`retort` holds it, maybe a hybrid)."""
    return next((kind for kind in PLAIN if FORMATS[kind](config) is None), None)


def stored_state(model: Transformer, kind: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The model's tensors in the types that a folder of format `kind` holds, on the CPU: `dtype`
    (None: their own), but in float32 at least the hybrids' `WIDE` ones, and those that `load_type`
    excepts in our own format."""
    out = {}
    for name, tensor in model.state_dict().items():
        to = dtype or tensor.dtype
        if kind in HYBRIDS and name.endswith(hf_hybrids.WIDE):
            to = torch.promote_types(to, torch.float32)
        elif kind == "retort" and dtype:
            to = load_type(name, tensor, dtype)
        out[name] = tensor.detach().to("cpu", to)
    return out


def to_hf_config(config: ModelConfig, kind: str, dtype: torch.dtype) -> dict:
    """config.json of the stock class; for plain ones in the spelling that transformers 4 and 5
    both read."""
    name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
            "max_position_embeddings", "tie_word_embeddings", "initializer_range",
            "attention_bias", "bos_token_id", "eos_token_id")  # fmt: skip
    out = {"model_type": kind, "hidden_act": "silu"}
    out.update({key: getattr(config, key) for key in same})
    out["dtype"] = out["torch_dtype"] = str(dtype).removeprefix("torch.")
    if kind in HYBRIDS:
        return out | hf_hybrids.to_config(config, kind)
    out["architectures"] = [name[kind]]
    out["rope_theta"] = config.rope_theta
    out["rope_scaling"] = config.rope_scaling
    rope = config.rope_scaling or {"rope_type": "default"}
    out["rope_parameters"] = {**rope, "rope_theta": config.rope_theta}
    if kind == "llama":
        out["mlp_bias"] = False
    elif "sliding_attention" in config.layer_types:
        out["use_sliding_window"] = True
        out["sliding_window"] = config.sliding_window
        out["layer_types"] = config.layer_types
        out["max_window_layers"] = config.layer_types.index("sliding_attention")
    return out


def save_model(
    model: Transformer,
    folder: str | Path,
    *,
    tokenizer_from: str | Path,
    dtype: torch.dtype | None = None,
    format: str = "auto",  # noqa: A002, the word users type
) -> str:
    """Write a model folder (atomically, replacing one of the same name) and return its format.

    tokenizer_from: a folder whose tokenizer files travel along, a tokenizer.json, or the name of a
    tokenizer. format: one of FORMATS; auto = the plain class that fits, else retort. UserError when
    the format cannot hold the model.
    """
    if format not in ("auto", *FORMATS):
        raise UserError(f"--format: '{format}' found, auto, {', '.join(FORMATS)} expected")
    kind = (stock_type(model.config) or "retort") if format == "auto" else format
    if reason := FORMATS[kind](model.config):
        raise UserError(f"--format {kind}: {reason}")
    state = stored_state(model, kind, dtype)
    if kind in HYBRIDS:
        state = hf_hybrids.to_weights(state, model.config, kind)
    stored = dtype or model.embed_tokens.weight.dtype
    write_folder(folder, model.config, kind, stored, state.items(), tokenizer_from)
    return kind


def write_folder(
    folder: str | Path, config: ModelConfig, kind: str, dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]], tokenizer_from: str | Path,
) -> None:  # fmt: skip
    """A model folder of format `kind` from (name, tensor) pairs, of which few are held at once.
    dtype: what config.json says."""
    folder = Path(folder)
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    if kind == "retort":
        raw = {"model_type": "retort", "retort": dataclasses.asdict(config)}
    else:
        raw = to_hf_config(config, kind, dtype)
    source = Path(tokenizer_from).expanduser()
    if not _copy_tokenizer(source, tmp, kind):
        raw["retort_tokenizer"] = str(tokenizer_from)
    elif len(ends := listed_ends(source, config.eos_token_id)) > 1:
        raw["eos_token_id"] = ends
    (tmp / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    write_weights(((file_key(name), t.contiguous()) for name, t in tensors), tmp)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    tmp.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _copy_tokenizer(source: Path, folder: Path, kind: str) -> bool:
    """Copy the tokenizer's files, if there are any; whether `folder` has a tokenizer.json then."""
    if source.name == "tokenizer.json":
        source = source.parent
    if source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    elif source.suffix == ".json" and source.is_file():
        shutil.copyfile(source, folder / "tokenizer.json")
        if (source.parent / "tokenizer_config.json").is_file():
            shutil.copyfile(
                source.parent / "tokenizer_config.json", folder / "tokenizer_config.json"
            )
    if not (folder / "tokenizer.json").is_file():
        return False
    path = folder / "tokenizer_config.json"
    if kind in HYBRIDS or (kind in PLAIN and not path.is_file()):
        _set_tokenizer_class(path)
    return True


def _set_tokenizer_class(path: Path) -> None:
    """Have transformers run tokenizer.json itself. Without it the model type decides on a class,
    which may split text by rules of its own: other ids, and no error."""
    raw = read_json(path) if path.is_file() else {}
    raw.pop("auto_map", None)
    raw["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(raw, indent=2) + "\n")
