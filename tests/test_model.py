"""The whole decoder: causality, documents, prefixes, caches, restarts, taps, initial weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from kit import (
    assert_close_rms,
    gradients,
    logits,
    random_ids,
    randomise,
    tiny_config,
    tiny_model,
)
from torch import nn

from distributed import compile_blocks
from model import Attention, Transformer

MAPS = ("FF", "LL", "SS", "LFS", "SLFL")
OPTIONS = {
    "plain": {},
    "llama": {"qk_norm": False, "tie_word_embeddings": False},
    "sink": {"attention_sink": True},
    "biases": {
        "attention_bias": True, "attention_output_bias": True, "linear_bias": True,
        "linear_rope": True,
    },
}  # fmt: skip
every_map = pytest.mark.parametrize("kinds", MAPS)
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
BOUNDS = [0, 1, 3, 70, 81, 81, 81]


@every_map
@options
def test_strictly_causal(kinds, options):
    model = tiny_model(kinds, **options)
    ids = random_ids(model, 1, 70)
    with torch.no_grad():
        before = model(ids)
        for t in (1, 33, 64, 69):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % model.config.vocab_size
            moved = (model(changed) - before).abs().amax((0, 2))
            assert moved[:t].max() < 1e-11, t
            assert moved[t] > 1e-3, t


@pytest.mark.parametrize(("kinds", "reach"), [("F", 70), ("L", 70), ("LFS", 70), ("SSS", 12)])
def test_reaches_every_later_token_and_no_further(kinds, reach):
    """Attention that mixes nothing would pass every causality test. Three windows of 5 reach
    3 x 4 tokens on."""
    model = tiny_model(kinds)
    ids = random_ids(model, 1, 70)
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % model.config.vocab_size
    with torch.no_grad():
        moved = (model(changed) - model(ids)).abs().amax((0, 2))
    assert moved[2 : 3 + reach].min() > 1e-10
    if 3 + reach < 70:
        assert moved[3 + reach :].max() < 1e-12


@every_map
@options
def test_packed_documents_are_each_alone(kinds, options):
    model = tiny_model(kinds, **options)
    ids = random_ids(model, 1, BOUNDS[-1])
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(BOUNDS)])[None]
    pairs = [(a, b) for a, b in itertools.pairwise(BOUNDS) if b > a]
    alone = torch.cat([model(ids[:, a:b]) for a, b in pairs], 1)
    packed = model(ids, cu_seqlens=cu_seqlens, positions=positions, max_seqlen=BOUNDS[-1])
    assert_close_rms(packed, alone)
    assert torch.equal(model(ids, cu_seqlens=cu_seqlens), packed)  # it finds the positions itself
    alone, packed = (h @ model.head_weight.T for h in (alone, packed))
    wanted = gradients(alone.sin().sum(), model)
    for name, gradient in gradients(packed.sin().sum(), model).items():
        scale = wanted[name].abs().max()
        # A constant added to every key leaves the softmax alone: that bias has no gradient.
        if scale > 1e-12:
            assert_close_rms(gradient, wanted[name], 1e-8, name)


@every_map
def test_masked_path_of_compiled_blocks_is_the_segment_path(kinds):
    model = tiny_model(kinds)
    ids = random_ids(model, 1, BOUNDS[-1])
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    expected = model(ids, cu_seqlens=cu_seqlens)
    model.compiled = True
    for module in model.modules():
        if isinstance(module, Attention):
            module.compiled = True
    assert model.seq_info(BOUNDS[-1], cu_seqlens=cu_seqlens).mask is not None
    assert_close_rms(model(ids, cu_seqlens=cu_seqlens), expected)


@every_map
@options
def test_prefix_does_not_change_with_the_length(kinds, options):
    model = tiny_model(kinds, **options)
    ids = random_ids(model, 2, 67)
    with torch.no_grad():
        whole = model(ids)
        for n in (1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 33, 63, 64, 65, 66):
            assert_close_rms(model(ids[:, :n]), whole[:, :n])


@every_map
@options
@pytest.mark.parametrize("prefill", [1, 3, 67])
def test_prefill_and_decode_is_the_full_forward(kinds, options, prefill):
    model = tiny_model(kinds, **options)
    ids = random_ids(model, 2, prefill + 9)
    cache, outs = model.new_cache(), []
    cuts = [0, prefill, *range(prefill + 1, prefill + 7), prefill + 9]
    with torch.no_grad():
        for a, b in itertools.pairwise(cuts):
            outs.append(model(ids[:, a:b], cache=cache))
        assert_close_rms(torch.cat(outs, 1), model(ids))
    assert cache.longest == prefill + 9
    assert cache.lengths.tolist() == [prefill + 9] * 2


@every_map
@options
def test_prompts_of_different_length_are_each_alone(kinds, options):
    """Prefilled as one packed row, then decoded as rows of a batch, one and two tokens a call."""
    model, more = tiny_model(kinds, **options), 6
    lengths = (67, 1, 2, 13)
    ids = random_ids(model, len(lengths), max(lengths) + more)
    bounds = list(itertools.accumulate(lengths, initial=0))
    prompts = torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])[None]
    cache = model.new_cache()
    with torch.no_grad():
        packed = model(
            prompts, cache=cache, cu_seqlens=torch.tensor(bounds), max_seqlen=max(lengths)
        )
        outs = []
        for size in (1, 1, 2, 1, 1):
            where = cache.lengths[:, None] + torch.arange(size)
            outs.append(model(ids.gather(1, where), cache=cache))
        outs = torch.cat(outs, 1)
        for i, n in enumerate(lengths):
            alone = model(ids[i : i + 1, : n + more])[0]
            assert_close_rms(torch.cat([packed[0, bounds[i] : bounds[i + 1]], outs[i]]), alone)


def test_copies_of_a_sequence_go_on_alike():
    model = tiny_model("LFS")
    ids = random_ids(model, 2, 9)
    cache, alone = model.new_cache(), model.new_cache()
    with torch.no_grad():
        model(ids[:, :6], cache=cache)
        model(ids[:, :6], cache=alone)
        cache.repeat(3)
        actual = model(ids[:, 6:7].repeat_interleave(3, 0), cache=cache)
        assert_close_rms(actual, model(ids[:, 6:7], cache=alone).repeat_interleave(3, 0))


@pytest.mark.parametrize("packed", [False, True])
def test_restart_from_a_kept_input(packed):
    model = tiny_model("FLSF")
    ids = random_ids(model, 1, BOUNDS[-1])
    where = {"cu_seqlens": torch.tensor(BOUNDS)} if packed else {}
    expected = model(ids, **where)
    for first in range(4):
        h, kept = model(ids, keep=first, **where)
        assert torch.equal(h, expected)
        assert torch.equal(model(hidden=kept, first=first, **where), expected)
    assert_close_rms(model(ids, keep=0)[1], model.embed_tokens(ids))


@pytest.mark.parametrize("layers", [[0], [1, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("packed", [False, True])
def test_taps_are_what_the_blocks_used(layers, packed):
    model = tiny_model("FLSL")
    ids = random_ids(model, 1, BOUNDS[-1])
    where = {"cu_seqlens": torch.tensor(BOUNDS)} if packed else {}
    used = {}
    hooks = [
        block.attention.register_forward_hook(
            lambda _, args, out, i=i: used.update({i: (args[0], out, args[1])})
        )
        for i, block in enumerate(model.layers)
    ]
    model(ids, **where)
    for hook in hooks:
        hook.remove()
    taps = list(model.attention_taps(ids, layers=layers, **where))
    assert [i for i, *_ in taps] == layers
    for i, normed, out, seq in taps:
        assert torch.equal(normed, used[i][0])
        assert torch.equal(out, used[i][1])
        assert torch.equal(seq.positions, used[i][2].positions)
        assert torch.equal(model.layers[i].attention(normed, seq), out)


def test_tap_is_the_attention_of_the_residual_stream():
    """Not the layer's output, nor an input before the norm."""
    model = tiny_model("LF")
    block = model.layers[0]
    h = torch.randn(1, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seq = model.seq_info(9)
    after, normed, out = block(h, seq, None, True)
    assert torch.equal(normed, block.input_layernorm(h))
    assert_close_rms(after, h + out + block.mlp(block.post_attention_layernorm(h + out)))
    assert torch.equal(after, block(h, seq))


@every_map
@options
def test_meta_construction_and_init_leave_nothing_unset(kinds, options):
    with torch.device("meta"):
        model = Transformer(tiny_config(kinds, **options))
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers()), "a buffer would need a value after to_empty"
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, torch.nan)
    torch.manual_seed(0)
    model.init_weights()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
    assert model(random_ids(model, 1, 9)).isfinite().all()


def test_init_scales():
    model = Transformer(
        tiny_config(
            "FLFL", hidden_size=128, head_dim=32, intermediate_size=256, vocab_size=1000,
            initializer_range=0.03, tie_word_embeddings=False, attention_bias=True,
        )
    )  # fmt: skip
    torch.manual_seed(0)
    model.init_weights()
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert p.std().item() == pytest.approx(0.03 / 8**0.5, rel=0.05), name
        elif name.endswith("norm.weight"):
            assert (p == 1).all(), name
        elif name.endswith(".bias"):
            assert (p == 0).all(), name
        elif name.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight")):
            assert p.std().item() == pytest.approx(0.03, rel=0.08), name
        if name.endswith("A_log"):
            assert (p >= 0).all() and (p <= 2.78).all() and p.std() > 0
        if name.endswith("dt_bias"):
            dt = nn.functional.softplus(p)
            assert (dt > 0.99e-3).all() and (dt < 0.101).all() and p.std() > 0


def test_head_is_tied_or_not():
    tied, untied = tiny_model("F"), tiny_model("F", tie_word_embeddings=False)
    assert tied.head_weight is tied.embed_tokens.weight
    assert untied.head_weight is untied.lm_head.weight
    assert untied.num_params() - tied.num_params() == 61 * 24


def test_autocast_residual_stream():
    """Under autocast the stream is in bfloat16 and near the float32 result."""
    model = tiny_model("FLS", dtype=torch.float32)
    ids = random_ids(model, 1, 67)
    expected = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        h = model(ids)
        actual = logits(model, ids)
    assert h.dtype == torch.bfloat16
    assert_close_rms(actual, expected, 5e-2)  # three blocks of rounding, not one op


def test_depends_on_positions():
    """Equal tokens at other distances give other outputs: RoPE is on in softmax layers."""
    model = tiny_model("F")
    ids = random_ids(model, 1, 9)
    near, far = torch.arange(9)[None], torch.tensor([[0, 1, 2, 3, 4, 15, 16, 17, 18]])
    moved = (model(ids, positions=near) - model(ids, positions=far)).abs().amax((0, 2))
    assert moved[:5].max() == 0
    assert moved[5:].min() > 1e-3
    shifted = model(ids, positions=near + 50)
    assert_close_rms(shifted, model(ids), 1e-4)  # relative only; the angles are float32


@pytest.mark.slow
@pytest.mark.parametrize(("packed", "amp"), [(False, False), (True, False), (False, True)])
def test_compiled_blocks_equal_eager(packed, amp):
    model = tiny_model("FLS", dtype=torch.float32)
    ids = random_ids(model, 1, BOUNDS[-1])
    where = {"cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32)} if packed else {}

    def run(amp):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = model(ids, **where)
        return out.float(), gradients(out.float().sin().sum(), model)

    expected, wanted = run(False)
    rough, rounded = run(True) if amp else (expected, wanted)
    torch._dynamo.reset()
    compile_blocks(model)
    actual, found = run(amp)

    def close(a, b, other, what):
        """Within rounding of b, or about as near to it as eager autocast is."""
        limit = max(1e-5 * b.norm(), 2.5 * (other - b).norm())
        assert (a - b).norm() <= limit, what

    close(actual, expected, rough, "output")
    for name, gradient in found.items():
        close(gradient, wanted[name], rounded[name], name)


def test_randomised_models_differ():
    """Guards the kit: a seed that did nothing would hide swapped layers."""
    a, b = tiny_model("F"), randomise(tiny_model("F"), seed=1)
    assert all(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
