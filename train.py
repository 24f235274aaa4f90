"""Pretrain a transformer from scratch (softmax, or hybrid with --layers).

python train.py --config configs/smoke.yaml --torch_compile=False
torchrun --nproc_per_node 8 train.py --config configs/gpt2-124m.yaml --accumulation_steps 16 \\
    --data DATA --tokenizer T
"""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import torch

import planner
from budget import show_budget
from cli import run_main
from config import ModelConfig, PretrainConfig, UserError
from data import eval_batches, require_rows
from distributed import (
    World,
    compile_blocks,
    main_first,
    require_same,
    start,
    stop,
    this_process,
)
from evaluate import Evaluator, completions, eval_rows
from fast_tokenizer import Unsupported
from fsdp import gathered, keeps_gathered, parallel_flags, ranks_line, shard, wants_fsdp
from hf import load_model, read_config, save_model, tokenizer_spec
from hf_files import fingerprint
from hybrid_layers import convert_config, resolve_kernels, use_kernels
from layer_lists import parse_layers
from mixture import rows_line
from model import Transformer
from objectives import HeadObjective
from prompts import IN_RUN, PROMPTS
from recompute import set_recompute
from retokenize import Retokenizer
from run_folder import check_run_folder
from stage_plan import plan_stage
from tokenizer import load_tokenizer
from trainer import (
    compile_wanted,
    finish,
    go_on,
    open_data,
    open_run,
    restore_weights,
    set_up_torch,
    train_stage,
    warm_up,
)


def model_config(cfg: PretrainConfig, vocab_size: int, eos: int | None) -> ModelConfig:
    """The model that the flags describe."""
    if not cfg.head_dim and cfg.embedding_dim % cfg.num_heads:
        raise UserError(
            f"--embedding_dim: {cfg.embedding_dim} found, a multiple of --num_heads "
            f"{cfg.num_heads} (or --head_dim) expected"
        )
    layers = parse_layers(cfg.layers, cfg.num_blocks, cfg.keep_layers)
    softmax = "sliding_attention" if cfg.sliding_window else "full_attention"
    mlp = cfg.mlp_dim or -(-cfg.embedding_dim * 8 // 3 // 64) * 64
    config = ModelConfig(
        # Rows in multiples of 64 make the head's matmul fast; small vocabularies stay exact.
        vocab_size=vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64,
        hidden_size=cfg.embedding_dim, intermediate_size=mlp, num_hidden_layers=cfg.num_blocks,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads or cfg.num_heads,
        head_dim=cfg.head_dim or cfg.embedding_dim // cfg.num_heads, rope_theta=cfg.rope_theta,
        max_position_embeddings=max(2048, cfg.context_len), sliding_window=cfg.sliding_window,
        attention_sink=cfg.attention_sink, tie_word_embeddings=cfg.tie_embeddings,
        layer_types=[softmax] * cfg.num_blocks, eos_token_id=eos,
    )  # fmt: skip
    if not layers:
        return config
    return convert_config(
        config, layers, cfg.mixer, linear_feature_map=cfg.linear_feature_map,
        linear_window=cfg.linear_window,
    )  # fmt: skip


def check_reference(cfg: PretrainConfig, tokenizer) -> Retokenizer | None:
    """What turns batches into the tokens of --reference, None where it has this tokenizer.
    UserError where its tokens are no bytes, or the model lacks some."""
    if not Path(cfg.reference).is_dir():
        raise UserError(f"--reference: no folder {cfg.reference}")
    theirs = load_tokenizer(tokenizer_spec(cfg.reference))
    if theirs.hash == tokenizer.hash:
        return None
    config = read_config(cfg.reference)
    if config.vocab_size < theirs.vocab_size:
        raise UserError(
            f"--reference: vocabulary of {config.vocab_size} in {cfg.reference}/config.json found, "
            f"at least the {theirs.vocab_size} of its tokenizer {theirs.name} expected"
        )
    retokenizer = Retokenizer(tokenizer, theirs, config.max_position_embeddings)
    with suppress(Unsupported):  # the other library has the same ids, only later
        theirs.speed_up()
    return retokenizer


def load_reference(cfg: PretrainConfig, world: World, dtype: torch.dtype) -> Transformer | None:
    """The frozen model that --select_tokens compares with."""
    if not cfg.reference:
        return None
    model = load_model(cfg.reference, dtype=dtype, device=world.device)
    kernels = resolve_kernels(model.config, cfg.kernel, world.device, cfg.dtype)
    use_kernels(model, kernels, world.device)
    return model.eval().requires_grad_(False)


def data_rows(cfg: PretrainConfig, tokenizer) -> int | None:
    """Rows of the data set, where the length of the run hangs on them and it is there."""
    if cfg.max_steps and not cfg.epochs:
        return None
    found = open_data(cfg, tokenizer)
    return sum(found[1].rows(cfg.context_len or 512).sizes) if found else None


def unigram_entropy(batches) -> float:
    """Nats per token of the held-out labels under their own frequencies: the best a model that
    ignores all context could do."""
    labels = torch.cat([b.labels.flatten() for b in batches])
    counts = torch.bincount(labels[labels >= 0]).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log()).sum())


def pretrain(cfg: PretrainConfig, argv: list[str]) -> None:
    spec = cfg.tokenizer or "byte"
    tokenizer = load_tokenizer(spec)
    config = model_config(cfg, tokenizer.vocab_size, tokenizer.eos_token_id)
    if cfg.plan:
        return show_budget(cfg, planner.pretraining(cfg, config, data_rows(cfg, tokenizer)))
    retokenizer = check_reference(cfg, tokenizer) if cfg.reference else None
    check_run_folder(cfg)
    planner.check_disk(cfg, planner.pretraining(cfg, config, None, full=False))
    world = this_process(cfg.device)
    fsdp = wants_fsdp(cfg, world, config)
    kernels = resolve_kernels(config, cfg.kernel, world.device, cfg.dtype)
    open_data(cfg, tokenizer)
    warm_up(config, kernels, cfg, world)
    start(world)
    keep = fsdp and keeps_gathered(cfg, world, [config])
    require_same(parallel_flags(fsdp, keep), world)
    dtype = set_up_torch(cfg, world)
    data, train_data, val_data = main_first(world, lambda: open_data(cfg, tokenizer, build=True))
    train_data.attach = retokenizer
    seq_len = cfg.context_len or 512
    eval_len = cfg.eval_seq_len or seq_len
    held_out = eval_batches(
        val_data, seq_len=eval_len, max_tokens=cfg.eval_tokens, doc_mask=cfg.doc_mask,
        micro_batch=eval_rows(eval_len, world.device),
    )  # fmt: skip

    model = Transformer(config)
    model.init_weights()
    model.to(world.device)
    linear = use_kernels(model, kernels, world.device)
    reference = load_reference(cfg, world, dtype)
    stage = cfg.stage(sum(train_data.rows(seq_len).sizes))
    plan = plan_stage(cfg, "pretrain", stage, world)
    require_rows(train_data, seq_len, plan.rows)
    identity = {
        "script": "train", "model": model.config.__dict__,
        "stage": stage.identity(),
        **({"reference": fingerprint(cfg.reference)} if cfg.reference else {}),
        **({"reference_tokenizer": retokenizer.tokenizer.hash} if retokenizer else {}),
        "seed": cfg.seed, "dtype": str(dtype), "doc_mask": cfg.doc_mask, **train_data.identity(),
    }  # fmt: skip
    run = open_run(cfg, argv, world, identity, script="train", dtype=dtype, stages=["pretrain"])
    go_on(run, [plan])
    say = run.logger.say
    say(f"model: {model.num_params():,} parameters, layers {config.layer_map()}")
    say(f"data: {train_data.num_tokens:,} tokens of {data}, tokenizer {tokenizer.name}")
    if reference is not None:
        say(f"reference: {cfg.reference}, {reference.num_params():,} parameters; the loss is over "
            f"{cfg.select_tokens:g} of each row's tokens")  # fmt: skip
    if retokenizer is not None:
        say(f"reference: tokenizer {retokenizer.tokenizer.name} (run by "
            f"{retokenizer.tokenizer.library}), its losses spread over bytes; a document longer "
            f"than its context of {retokenizer.context} tokens is cut for it")  # fmt: skip
    say(f"compute: {ranks_line(cfg, world, fsdp)}, {dtype}, {linear}")
    say(plan.line(world))
    say(f"rows: {rows_line(train_data, seq_len, plan.steps * plan.rows)}")
    if cfg.dry_run:
        say("dry run: nothing trained")
        finish(run)
        return
    restore_weights(run, model)
    set_recompute(model, cfg.activation_checkpointing)
    if compile_wanted(cfg, world):
        compile_blocks(model, hooks=fsdp)
        if reference is not None and retokenizer is None:  # else of any length
            compile_blocks(reference)
    if fsdp:
        shard(model, world, dtype=dtype, shard_ranks=cfg.shard_ranks, keep=keep, amp=run.amp)
    evaluator = Evaluator(held_out, None, amp=run.amp, world=world)
    if "pretrain" not in run.done:
        objective = HeadObjective(model, reference, stage, world, [])
        train_stage(
            run, plan, objective, train_data, student=model, teacher=reference,
            evaluate=lambda: evaluator(model),
        )  # fmt: skip
    scores = evaluator(model)
    entropy = unigram_entropy(held_out)
    run.logger.log_eval(run.step, "pretrain", {**scores, "unigram_entropy": entropy})
    say(
        f"held-out loss {scores['ce']:.3f} nats/token = {scores['ce'] / entropy:.2f} x the unigram "
        f"entropy {entropy:.3f}; perplexity {scores['ppl']:.2f}, "
        f"{scores['ce'] / math.log(2):.3f} bits/token"
    )
    if cfg.sample_tokens and (world.is_main or fsdp):
        texts = completions(model, tokenizer, cfg.sample_tokens, run.amp, cfg.sample_temperature)
        for prompt, text in zip(PROMPTS[:IN_RUN], texts, strict=True):
            say(f"sample: {prompt!r} -> {text!r}")
    whole = gathered(model, world) if fsdp and cfg.save_model else model
    if world.is_main and cfg.save_model:
        kind = save_model(whole, run.folder / "model", tokenizer_from=spec)
        say(f"model saved in {run.folder / 'model'} as {kind}")
    finish(run)


def main(cfg: PretrainConfig, argv: list[str]) -> None:
    try:
        pretrain(cfg, argv)
    finally:
        stop()


if __name__ == "__main__":
    run_main(PretrainConfig, main)
