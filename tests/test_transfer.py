"""What a linear layer takes over from softmax attention, part by part.

pytest tests/test_transfer.py
"""

from __future__ import annotations

import math

import pytest
import torch
from kit import random_ids, tiny_model

from config import Transfer
from hybrid_layers import check_transfer, convert_layers
from mixers.base import DECAY_TOKENS, FITTED_TOKENS

DECAYING = ("gated_deltanet", "gla", "kda", "mamba2", "rwkv6", "rwkv7")


def test_every_part_can_be_left_out():
    """A part that is left out changes what it sets, and nothing else."""
    teacher = tiny_model("FFFF", dtype=torch.float32)
    sets = {
        "conv": ("q_conv1d", "k_conv1d", "v_conv1d"), "beta": ("b_proj",), "gate": ("g_proj",),
    }  # fmt: skip
    whole = dict(convert_layers(teacher, [1]).layers[1].linear_attn.named_parameters())
    for part, names in sets.items():
        student = convert_layers(teacher, [1], transfer=Transfer(**{part: False}))
        for name, p in student.layers[1].linear_attn.named_parameters():
            left_out = name.startswith(names)
            assert p.equal(whole[name]) != left_out, (part, name)
            assert p.any() or not left_out


def test_rows_of_kv_heads_are_the_published_mistake():
    teacher = tiny_model("FF", dtype=torch.float32, qk_norm=False)
    ids = random_ids(teacher, 1, 20)
    student = convert_layers(teacher, [1], transfer=Transfer(kv="rows"))
    soft, mine = teacher.layers[1].self_attn, student.layers[1].linear_attn
    assert mine.q_proj.weight.equal(soft.q_proj.weight)
    for name in ("k_proj", "v_proj"):
        theirs = getattr(soft, name).weight
        groups = soft.num_heads // soft.num_kv_heads
        for row in (0, 1, 5, len(theirs) * groups - 1):
            assert getattr(mine, name).weight[row].equal(theirs[row // groups])
    with pytest.raises(RuntimeError, match="relative error"):
        check_transfer(teacher, student, [1], ids)
    assert check_transfer(teacher, student, [1], ids, most=math.inf)[1] > 0.5


def attending_to(back: int, length: int, cu_seqlens=None):
    """A softmax layer of two heads, of which the first looks at the token `back` before, the
    second at all alike; its input, and where tokens stand."""
    model = tiny_model(
        "F", dtype=torch.float32, qk_norm=False, num_attention_heads=2, num_key_value_heads=2
    )
    attention = model.layers[0].self_attn
    d = model.config.hidden_size
    positions = None
    if cu_seqlens is not None:
        positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])[None]
    seq = model.seq_info(length, positions=positions, cu_seqlens=cu_seqlens, max_seqlen=length)
    seq = seq._replace(cos=torch.ones_like(seq.cos), sin=torch.zeros_like(seq.sin))
    # The first head's queries and keys as inputs would have them: the position on a circle.
    turn = 2 * math.pi * seq.positions.float() / 64
    with torch.no_grad():
        for p in attention.parameters():
            p.zero_()
        attention.q_proj.weight[0, 0] = attention.q_proj.weight[1, 1] = 40.0
        attention.k_proj.weight[0, 2] = attention.k_proj.weight[1, 3] = 40.0
    x = torch.zeros(1, length, d)
    shift = 2 * math.pi * back / 64
    for i, (f, t) in enumerate(((torch.cos, turn), (torch.sin, turn))):
        x[..., i] = f(t - shift)
        x[..., 2 + i] = f(t)
    return attention, x, seq


@pytest.mark.parametrize("back", [1, 5, 20])
def test_attention_distances(back):
    attention, x, seq = attending_to(back, 60)
    first, second = attention.distances(x, seq).tolist()
    assert first == pytest.approx((back + 0.5) / math.log(2), rel=0.1)
    # Of uniform attention over 0 .. i, for i up to 59, half the weight lies within 12 tokens or so.
    weights = torch.tril(torch.ones(60, 60)) / torch.arange(1.0, 61)[:, None]
    weights[:, 0] = 0
    shares = torch.stack([weights.diagonal(-i).sum() for i in range(60)]).cumsum(0)
    median = (shares < shares[-1] / 2).sum().item()
    assert median / math.log(2) <= second <= (median + 1) / math.log(2)


def test_attention_distances_of_a_batch():
    """All rows count, and autocast changes nothing of note."""
    model = tiny_model("F", dtype=torch.float32)
    attention, seq = model.layers[0].self_attn, model.seq_info(40)
    x = torch.randn(2, 40, model.config.hidden_size)
    both = attention.distances(x, seq)
    rows = torch.stack([attention.distances(x[i : i + 1], seq) for i in range(2)])
    assert not both.equal(rows[0]) and not both.equal(rows[1])
    assert (both >= rows.amin(0) - 1e-3).all() and (both <= rows.amax(0) + 1e-3).all()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attention.distances(x, seq), both, rtol=0.1, atol=0)


def test_attention_distances_stay_in_a_document():
    bounds = torch.tensor([0, 30, 60], dtype=torch.int32)
    attention, x, seq = attending_to(5, 60, bounds)
    packed = attention.distances(x, seq)
    attention, x, seq = attending_to(5, 30)
    torch.testing.assert_close(packed, attention.distances(x, seq))


@pytest.mark.parametrize("name", DECAYING)
def test_decays_are_taken_from_the_teacher(name):
    """What the recurrence decays by, measured on its output: a token's weight e-folds with the
    distance that was asked for."""
    teacher = tiny_model("FF", dtype=torch.float32)
    x, seq = 1 + torch.randn(1, 50, teacher.config.hidden_size), teacher.seq_info(50)
    target = torch.randn_like(x)
    wanted = torch.tensor([3.0, 9.0, 1e9, 30.0])
    for parts, expected in (
        (Transfer(decay=True), wanted.clamp(*FITTED_TOKENS)),
        (Transfer(decay=False), torch.logspace(*map(math.log10, DECAY_TOKENS), 4)),
    ):
        mixer = convert_layers(teacher, [1], mixer=name).layers[1].linear_attn
        mixer.calibrate(x, target, seq, parts, wanted)
        torch.testing.assert_close(decay_tokens(mixer, x, seq), expected, rtol=1e-3, atol=0)


def decay_tokens(mixer, x, seq):
    """The e-folding time of each head [J], from what goes into the recurrence."""
    args, *_ = mixer.inputs(x, seq, {}, False)
    heads = mixer.num_value_heads
    log = args["dt"] * -mixer.A_log.exp() if "dt" in args else args.get("g", args.get("w"))
    log = log.float().mean(1).reshape(heads, -1).mean(-1)
    return -1 / log
