"""The student of a distillation run: what can be refused before anything is loaded, teacher and
student as models, the fit of new mixers to what they replace.

Check: `pytest tests/test_runs.py tests/test_transfer.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from config import DistillConfig, ModelConfig, StageConfig, UserError
from data import PackedLoader
from distributed import World
from evaluate import inputs
from hf import DTYPES, load_model, load_shape, read_config, tokenizer_spec
from hf_files import fingerprint
from hybrid_layers import (
    cast_trunk,
    convert_config,
    convert_layers,
    copy_mixers,
    mixer_class,
    mixer_parameters,
)
from layer_lists import auto_share, parse_layers
from layers import Attention
from lora import FLAGS as LORA_FLAGS
from lora import adapters_alone, check_lora, is_lora, wants_lora
from mixers.base import LinearMixer
from mixture import Mixture
from model import Transformer
from optimizer import param_role
from run_folder import check_run_folder
from search import uniform_pattern
from stage_plan import StagePlan
from tokenizer import load_tokenizer
from trainer import Run

# What of a mixer a stage with train=feature_maps trains (LoLCATs, arXiv 2410.10254).
FEATURE_PARTS = {"feature_map_q", "feature_map_k", "window_factors"}


def mixer_shape(cfg: DistillConfig) -> dict:
    """The flags that shape new mixers."""
    names = ("linear_rope", "linear_gate", "linear_conv", "linear_feature_map", "linear_window")
    return {name: getattr(cfg, name) for name in names}


def check_align_loss(cfg: DistillConfig, student: ModelConfig, teacher: ModelConfig) -> None:
    """UserError for settings of losses that a stage does not have, and for weights of the align
    loss that these layers cannot be compared by."""
    names = ("hidden_weight", "heads_weight", "maps_weight")
    heads = ("loss", "temperature", "kd_weight", "ce_weight", "top_k")
    others = {
        "align": (heads, "distill and long"), "block": ((*heads, *names, "unique_tokens"), "others")
    }  # fmt: skip
    for stage in cfg.stage_names():
        found, plain = getattr(cfg, stage), StageConfig()
        taken, whose = others.get(stage, ((*names, "unique_tokens"), "the stage align"))
        odd = [n for n in taken if getattr(found, n) != getattr(plain, n)]
        if odd:
            value = str(getattr(found, odd[0])).removesuffix(".0")
            raise UserError(f"--{stage}_{odd[0]}: {value} found, which is for {whose}")
        if stage not in others and not found.kd_weight and found.ce_weight != 1:
            raise UserError(
                f"--{stage}_ce_weight: {found.ce_weight:g} found, 1 expected with "
                f"--{stage}_kd_weight 0"
            )
    if "align" not in cfg.stage_names():
        return
    stage, mixers = cfg.align, [mixer_class(name) for name in student.mixer]
    if not any(getattr(stage, n) for n in names):
        raise UserError("--align_hidden_weight: no loss at all found, some weight expected")
    scaled = [m.name for m in mixers if m.scales_o_proj]  # sliding windows are no mixers here
    if stage.heads_weight and scaled and cfg.transfer.scale and cfg.calibrate_tokens:
        raise UserError(
            f"--align_heads_weight: {stage.heads_weight:g} found, but the calibration scales each "
            f"head of {scaled[0]} in o_proj; --transfer_scale false expected"
        )
    others = [m.name for m in mixers if not m.has_maps]
    if stage.maps_weight and (others or not mixers):
        raise UserError(
            f"--align_maps_weight: {stage.maps_weight:g} found, which needs the mixer "
            f"hedgehog_window, {others[0] if others else 'sliding_window'} found"
        )
    if stage.maps_weight and teacher.attention_sink:
        raise UserError("--align_maps_weight: a teacher with attention sinks found, none expected")


def preflight(cfg: DistillConfig) -> tuple[list[int], str, ModelConfig, bool]:
    """What can be refused before a device or a process group is touched. Returns the converted
    layers, the tokenizer, the student's shape and whether the student is converted here."""
    if not Path(cfg.teacher).is_dir():
        name = Path(cfg.teacher).name
        known = "" if name == "smollm2-135m" else f" ORG/NAME --out {cfg.teacher}"
        raise UserError(
            f"--teacher: no folder {cfg.teacher}; fetch it with "
            f"python scripts/download_model.py{known}"
        )
    config = read_config(cfg.teacher)
    source = config
    if cfg.student:
        if not Path(cfg.student).is_dir():
            raise UserError(f"--student: no folder {cfg.student}")
        source = read_config(cfg.student)
    theirs = config.layer_types if len(config.layer_types) == len(source.layer_types) else None
    if cfg.student and theirs is None and "sliding_attention" in source.layer_types:
        raise UserError(
            f"--student: {source.num_hidden_layers} layers, some sliding, found; a teacher of as "
            f"many, not {config.num_hidden_layers}, expected: it tells which were converted"
        )
    layers = [
        i for i, kind in enumerate(source.layer_types)
        if cfg.student and not (theirs and theirs[i] == kind)
        and (kind == "linear_attention" or (kind == "sliding_attention" and theirs))
    ]  # fmt: skip
    convert = not layers
    if cfg.aligned and not convert:
        raise UserError(
            f"--aligned: {cfg.aligned} found, none expected with a --student that is converted"
        )
    if convert:
        if auto_share(cfg.layers) is None or cfg.keep_layers:
            layers = parse_layers(cfg.layers, source.num_hidden_layers, cfg.keep_layers)
        else:  # all are aligned, then some are chosen
            layers = [i for i, t in enumerate(source.layer_types) if t == "full_attention"]
            uniform_pattern(layers, auto_share(cfg.layers))
            check_search(cfg, config, layers)
        source = convert_config(source, layers, cfg.mixer, **mixer_shape(cfg))
        if cfg.aligned:
            if not Path(cfg.aligned).is_dir():
                raise UserError(f"--aligned: no folder {cfg.aligned}")
            check_aligned(cfg, read_config(cfg.aligned), source, layers)
        elif auto_share(cfg.layers) is not None and cfg.stage_names()[0] != "align":
            raise UserError(
                f"--layers: {cfg.layers} found; it chooses from an aligned student, so the stage "
                f"align, or a folder as --aligned, expected"
            )
    if "align" in cfg.stage_names():
        same = ("hidden_size", "num_hidden_layers", "head_dim", "num_attention_heads")
        odd = [n for n in same if getattr(source, n) != getattr(config, n)]
        if odd:
            raise UserError(
                f"--stages: align compares layer by layer, but the student's {odd[0]} is "
                f"{getattr(source, odd[0])} and the teacher's {getattr(config, odd[0])}"
            )
        if not layers:
            raise UserError("--layers: none found, align needs at least one converted layer")
    check_align_loss(cfg, source, config)
    for name in cfg.stage_names():
        if not layers and getattr(cfg, name).train in ("mixers", "feature_maps"):
            raise UserError(f"--layers: none found, but {name} trains mixers (--{name}_train)")
        if cfg.trunk_dtype == "bfloat16" and getattr(cfg, name).use_muon:
            raise UserError(
                f"--trunk_dtype: bfloat16 found, but {name} uses Muon; float32 expected"
            )
    check_feature_maps(cfg, source, layers)
    check_lora(cfg)
    if cfg.plan:  # needs neither a tokenizer nor a folder of its own
        return layers, cfg.tokenizer, source, convert
    spec = cfg.tokenizer or tokenizer_spec(cfg.teacher)
    tokenizer = load_tokenizer(spec)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"--tokenizer: {tokenizer.name} has {tokenizer.vocab_size} tokens, the teacher's "
            f"embedding {config.vocab_size} rows"
        )
    mine = load_tokenizer(tokenizer_spec(cfg.teacher))
    other = load_tokenizer(tokenizer_spec(cfg.student)) if cfg.student else tokenizer
    for flag, t in (("tokenizer", tokenizer), ("student", other)):
        if t.hash != mine.hash:
            raise UserError(
                f"--{flag}: tokenizer {t.name} ({t.hash}) found, the teacher's {mine.name} "
                f"({mine.hash}) expected"
            )
    check_run_folder(cfg)
    return layers, spec, source, convert


def check_search(cfg: DistillConfig, teacher: ModelConfig, layers: list[int]) -> None:
    """UserError where the search of `layers` could not end well: it puts the teacher's softmax
    layers into the student, and the scorer window cuts their windows in the teacher."""
    if cfg.student and not Path(cfg.student).samefile(cfg.teacher):
        raise UserError(
            f"--student: an unconverted model found with --layers {cfg.layers}, which takes "
            f"softmax layers from the teacher; the teacher itself, or other --layers, expected"
        )
    if cfg.search.scorer != "window":
        return
    try:
        convert_config(teacher, layers, "sliding_window", linear_window=cfg.search.window)
    except UserError as e:
        flag, _, reason = str(e).partition(": ")
        raise UserError(
            f"--search_window: {cfg.search.window} found, which --search_scorer window cannot give "
            f"this teacher ({flag.removeprefix('--')}: {reason}); another window or scorer expected"
        ) from None


def check_feature_maps(cfg: DistillConfig, config: ModelConfig, layers: list[int]) -> None:
    """UserError where a stage that trains layers by themselves is to train feature maps, and a
    converted layer has none."""
    names = {"align", "block"}.intersection(cfg.stage_names())
    names = [n for n in sorted(names) if getattr(cfg, n).train == "feature_maps"]
    if not names:
        return
    with torch.device("meta"):
        model = Transformer(config)
    for i in layers:
        linear = config.layer_types[i] == "linear_attention"
        if not any(is_feature_map(name) for name, _ in model.layers[i].named_parameters()):
            raise UserError(
                f"--{names[0]}_train: feature_maps found, but "
                f"{config.mixer_name(i) if linear else 'sliding_window'} of layer {i} has none"
            )


def is_feature_map(name: str) -> bool:
    return bool(FEATURE_PARTS & set(name.split(".")))


def check_aligned(cfg, found: ModelConfig, wanted: ModelConfig, layers: list[int]) -> None:
    """UserError unless the model of --aligned has the mixers wanted at `layers`."""
    if found.num_hidden_layers != wanted.num_hidden_layers:
        raise UserError(
            f"--aligned: {found.num_hidden_layers} layers found, {wanted.num_hidden_layers} "
            f"expected"
        )
    for i in layers:
        mine, theirs = (
            c.mixer_name(i) if c.layer_types[i] == "linear_attention" else c.layer_types[i]
            for c in (wanted, found)
        )
        if mine != theirs:
            raise UserError(f"--aligned: {theirs} found at layer {i}, {mine} expected")
    kinds = {wanted.mixer_name(i) for i in layers if wanted.layer_types[i] == "linear_attention"}
    used = {  # what changes a layer's function, but not its parameters
        "linear_rope": kinds - {"hedgehog_window"},
        "linear_feature_map": kinds & {"linear_attention"},
        "linear_window": kinds & {"hedgehog_window"},
        "sliding_window": "sliding_attention" in {wanted.layer_types[i] for i in layers},
    }
    for name in (name for name, some in used.items() if some):
        mine, theirs = getattr(wanted, name), getattr(found, name)
        if mine != theirs:
            raise UserError(f"--aligned: {name} {theirs} found, {mine} expected")


def shares_trunk(cfg: DistillConfig, fsdp: bool) -> bool:
    """Whether the student's trunk is the teacher's own; never under FSDP2, which gathers each model
    by itself."""
    frozen = all(getattr(cfg, name).train != "all" for name in cfg.stage_names())
    return not cfg.student and frozen and cfg.share_trunk == "auto" and not fsdp


def build_models(
    cfg: DistillConfig, layers: list[int], convert: bool, world: World, dtype: torch.dtype,
    fsdp: bool = False,
) -> tuple[Transformer, Transformer, Transformer, bool]:  # fmt: skip
    """(teacher, source, student, shared): the frozen teacher in the compute type, the model whose
    layers were converted (the teacher, or --student as it was), and the student, whose trunk is
    the teacher's own where it stays frozen (`shares_trunk`), else a copy in --trunk_dtype. Under
    FSDP2, with a --student that needs no conversion, both are shapes alone, on the meta device:
    no rank has room for more than its pieces (`fsdp.shard`)."""
    if fsdp and cfg.student and not convert:
        teacher = load_shape(cfg.teacher, dtype).eval().requires_grad_(False)
        student = load_shape(cfg.student, torch.float32).train()
        return teacher, student, student, False
    teacher = load_model(cfg.teacher, dtype=dtype, device=world.device)
    teacher.eval().requires_grad_(False)
    shared = shares_trunk(cfg, fsdp)
    source = teacher
    if not cfg.student:
        student = convert_layers(
            teacher, layers, mixer=cfg.mixer, share_trunk=shared, transfer=cfg.transfer,
            **mixer_shape(cfg),
        )  # fmt: skip
    else:
        source = student = load_model(cfg.student, dtype=torch.float32, device=world.device)
        if convert and layers:
            student = convert_layers(
                source, layers, mixer=cfg.mixer, transfer=cfg.transfer, **mixer_shape(cfg)
            )
    if convert:
        check_parts(student, layers, cfg)
    if convert and cfg.aligned:
        copy_mixers(student, load_model(cfg.aligned, device=world.device), layers)
    if cfg.trunk_dtype == "bfloat16" and dtype == torch.float32:
        raise UserError("--trunk_dtype: bfloat16 found, float32 expected, as the compute type is")
    if cfg.trunk_dtype != "float32" and not shared:
        cast_trunk(student, layers, DTYPES[cfg.trunk_dtype])
    return teacher, source, student.train(), shared


def check_parts(student: Transformer, layers: list[int], cfg: DistillConfig) -> None:
    """UserError where --transfer_... leaves out what no mixer takes over."""
    mixers = [student.layers[i].attention for i in layers]
    had = {part for m in mixers if isinstance(m, LinearMixer) for part in m.can_leave_out()}
    for part in ("conv", "gate", "beta"):
        if not getattr(cfg.transfer, part) and part not in had:
            raise UserError(f"--transfer_{part}: false found, but --mixer {cfg.mixer} sets none")


def to_save(
    objective, cfg: DistillConfig, stage: str, student: Transformer, convert: bool
) -> dict[str, torch.nn.Parameter]:
    """What a checkpoint of a stage has to hold: what it and the stages before it train, adapters,
    and the mixers unless they come with a --student that was not converted in this run."""
    names = cfg.stage_names()
    if any(getattr(cfg, name).train == "all" for name in names[: names.index(stage)]):
        return dict(student.named_parameters())
    return objective.params if adapters_alone(cfg) and not convert else objective.saved


def narrow(model: Transformer, dtype: torch.dtype) -> None:
    """Store what is computed in `dtype` in it, in place: the matrices that FSDP2 would cut. For
    models that are not trained, or by adapters alone."""
    for name, p in model.named_parameters():
        if param_role(name, p) != "no_decay":
            p.data = p.data.to(dtype)


def search_identity(cfg: DistillConfig) -> dict:
    """The settings of the search; without what older checkpoints lack where it plays no part."""
    found = dataclasses.asdict(cfg.search) | {"layers": cfg.layers}
    if cfg.search.scorer != "window":
        del found["window"]
    return found


def run_identity(cfg, layers, convert, plans: list[StagePlan], data: Mixture, dtype) -> dict:
    """What a continuation must have in common with the run it continues."""
    stages = {plan.name: plan.stage.identity() for plan in plans}
    return {
        "script": "train_kd", "teacher": fingerprint(cfg.teacher),
        "student": fingerprint(cfg.student) if cfg.student else "", "layers": layers,
        **({"mixer": cfg.mixer, **mixer_shape(cfg)} if convert else {}),
        **({"search": search_identity(cfg)} if convert and auto_share(cfg.layers) is not None
           else {}),
        **({name: getattr(cfg, name) for name in LORA_FLAGS} if wants_lora(cfg) else {}),
        "aligned": fingerprint(cfg.aligned) if cfg.aligned else "", **data.identity(),
        "seed": cfg.seed, "dtype": str(dtype), "trunk_dtype": cfg.trunk_dtype,
        "teacher_float8": cfg.teacher_float8, "doc_mask": cfg.doc_mask,
        "calibrate_tokens": cfg.calibrate_tokens if convert else 0, "stages": stages,
        "transfer": dataclasses.asdict(cfg.transfer) if convert else {},
    }  # fmt: skip


def calibration_loader(cfg: DistillConfig, data: Mixture) -> PackedLoader:
    """Its first step is the training rows that mixers are fitted on."""
    seq_len = min(512, cfg.calibrate_tokens)
    rows = max(1, cfg.calibrate_tokens // seq_len)
    return PackedLoader(
        data, seq_len=seq_len, rows_per_step=rows, micro_batch=rows, seed=cfg.seed, prefetch=0,
        doc_mask=cfg.doc_mask,
    )  # fmt: skip


@torch.no_grad()
def calibrate(
    run: Run, source: Transformer, student: Transformer, layers: list[int], data: Mixture
) -> dict[int, float]:
    """Fit decays, gates and output scales to the layers replaced, on a few training rows; layer ->
    relative error afterwards."""
    parts = run.cfg.transfer
    batch = calibration_loader(run.cfg, data).next_step()[0].to(run.world.device)
    errors = {}
    with run.amp():
        for i, normed, target, seq in source.attention_taps(**inputs(batch), layers=layers):
            soft, distances = source.layers[i].attention, None
            if parts.decay and isinstance(soft, Attention):
                distances = soft.distances(normed, seq)
            mixer = student.layers[i].attention
            errors[i] = mixer.calibrate(normed, target, seq, parts, distances)
    return errors


def set_trainable(student: Transformer, stage: StageConfig, layers: list[int]) -> None:
    """Which parameters the stage trains, none that its loss does not depend on."""
    mixers = mixer_parameters(student, layers)
    idle = set()
    if not stage.hidden_weight:
        idle = {student.layers[i].attention.projections["o"] for i in layers}
        idle |= set() if stage.heads_weight else {"v_proj"}
    parts = {
        "all": lambda name: not is_lora(name), "lora": is_lora,
        "mixers": lambda name: name in mixers,
        "feature_maps": lambda name: name in mixers and is_feature_map(name),
    }  # fmt: skip
    for name, p in student.named_parameters():
        p.requires_grad_(parts[stage.train](name) and not idle & set(name.split(".")))
    if not any(p.requires_grad for p in student.parameters()):
        raise UserError(f"--stages: a stage trains {stage.train} found, but no layer has any")
