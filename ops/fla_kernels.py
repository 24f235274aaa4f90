"""flash-linear-attention's Triton kernels (0.6) as torch custom ops: no graph break in a block.

fla's own functions are `torch.compiler.disable`d. Here each recurrence is one forward and one
backward custom op around fla's internal `*_fwd` and `*_bwd`, which keep what fla keeps for the
backward. fla itself is imported by the first call. CUDA only; one decoded token is our own code.
Check: `pytest tests/ops/test_fla_kernels.py` (the numbers on a GPU). Tuning: ops/tuned.py.

Shapes: B batch, T time, H heads, K key size, V value size, N documents, C chunk of 64 tokens.
q, k, r, a, b [B, T, H, K] and v [B, T, H, V] in one dtype (bfloat16 or float16, float32 where
fla takes it): v's, to which the others are cast. beta [B, T, H]. Log decays in float32, <= 0:
g [B, T, H] (gated delta rule, linear attention) or [B, T, H, K] (GLA, KDA), w [B, T, H, K] (RWKV).
States [N, H, K, V] in float32, one per document where `cu_seqlens` [N + 1] packs them (B = 1), else
N = B. An empty document passes its state through. scale: K^-0.5 where None. Every function returns
o [B, T, H, V] in v's dtype and the last states, or None unless `output_final_state`.

`cu_seqlens` that the host does not know (ops/bounds.py) cost one wait for the GPU per tensor: fla
builds its chunk table on the host and keeps the last few by identity. GLA, linear attention and
RWKV-6 wait three times per call more. Never change a `cu_seqlens` in place: the table of the old
values would be used.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.bounds import known_chunk_table
from ops.kernels import fla_backward_refused

CHUNK = 64
# The bound RWKV-7's decay has by construction, -e^-0.5. fla then runs chunks of 64 on tensor cores,
# which centre the decay in the chunk: exact in float32 for w >= -2.6, so there is room to spare.
RWKV7_LOWER_BOUND = -0.6065306597126334
# The largest head sizes that fla's kernels take (or, for RWKV-7, have been tried with).
MAX_KEY = {"rwkv7": 128}


def check_head_size(op: str, key_dim: int, value_dim: int) -> str | None:
    """Why `op` cannot take heads of this size, in one line; None if it can."""
    if op not in OPS:
        raise ValueError(f"op: {op!r} found, one of {', '.join(OPS)} expected")
    limit = MAX_KEY.get(op, 256)
    for name, size, most in (("key", key_dim, limit), ("value", value_dim, 512)):
        if size < 16 or size % 16:
            return f"fla's {op} kernel needs a {name} size in multiples of 16, not {size}"
        if size > most:
            return f"fla's {op} kernel takes a {name} size of at most {most}, not {size}"
    return None


@dataclass(frozen=True)
class Op:
    """One recurrence. The names list tensors in order, with the letters of the legend above.

    forward(*inputs, scale=, initial_state=, output_final_state=, cu_seqlens=, chunk_indices=)
    returns o, the final state or None, *saved. backward(do, dht, *kept, *saved, scale=,
    initial_state=, cu_seqlens=, chunk_indices=) returns the gradients of inputs and of the state.
    """

    inputs: str  # a trailing "?" marks one that may be None
    kept: str  # the inputs its backward reads
    saved: str  # what its forward computes for the backward: g like g, in float32, or a matrix
    like: str  # the tensor among kept and saved whose shape and dtype each gradient has
    forward: Callable
    backward: Callable
    matrix_dtype: torch.dtype | None = None  # of a saved matrix [B, T, H, C]; None: v's


def _gated_delta_rule_forward(q, k, v, g, beta, *, initial_state, **kwargs):
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd

    total, o, inverse, final, _, _ = chunk_gated_delta_rule_fwd(
        q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, chunk_size=CHUNK, **kwargs
    )
    return o, final, total, inverse


def _gated_delta_rule_backward(do, dht, q, k, v, beta, total, inverse, **kwargs):
    from fla.ops.gated_delta_rule import chunk

    with _right_code(k):
        dq, dk, dv, dbeta, dg, dh0, _, _ = chunk.chunk_gated_delta_rule_bwd(
            q=q, k=k, v=v, g=total, beta=beta, A=inverse, do=do, dht=dht, chunk_size=CHUNK,
            **kwargs,
        )  # fmt: skip
    return dq, dk, dv, dg, dbeta, dh0


def _delta_rule_forward(q, k, v, beta, **kwargs):
    from fla.ops.delta_rule.chunk import chunk_delta_rule_fwd

    o, inverse, final = chunk_delta_rule_fwd(q=q, k=k, v=v, beta=beta, chunk_size=CHUNK, **kwargs)
    return o, final, inverse


def _delta_rule_backward(do, dht, q, k, v, beta, inverse, **kwargs):
    from fla.ops.delta_rule.chunk import chunk_delta_rule_bwd

    return chunk_delta_rule_bwd(
        q=q, k=k, v=v, beta=beta, A=inverse, do=do, dht=dht, chunk_size=CHUNK, **kwargs
    )


def _kda_forward(q, k, v, g, beta, **kwargs):
    from fla.ops.kda.chunk_fwd import chunk_kda_fwd

    o, final, total, scores, inverse, *_ = chunk_kda_fwd(
        q=q, k=k, v=v, g=g, beta=beta, chunk_size=CHUNK, **kwargs
    )
    return o, final, total, scores, inverse


def _kda_backward(do, dht, q, k, v, beta, total, scores, inverse, **kwargs):
    from fla.ops.kda.chunk_bwd import chunk_kda_bwd

    dq, dk, dv, dbeta, dg, dh0, _, _ = chunk_kda_bwd(
        q=q, k=k, v=v, g=total, beta=beta, Aqk=scores, Akk=inverse, do=do, dht=dht,
        chunk_size=CHUNK, **kwargs,
    )  # fmt: skip
    return dq, dk, dv, dg, dbeta, dh0


def _gla_forward(q, k, v, g, **kwargs):
    from fla.ops.gla.chunk import chunk_gla_fwd

    total, scores, _, final, o = chunk_gla_fwd(
        q=q, k=k, v=v, g=g, g_cumsum=None, chunk_size=CHUNK, **kwargs
    )
    return o, final, total, scores


def _gla_backward(do, dht, q, k, v, total, scores, **kwargs):
    from fla.ops.gla.chunk import chunk_gla_bwd

    return chunk_gla_bwd(
        q=q, k=k, v=v, g=None, g_cumsum=total, A=scores, h=None, do=do, dht=dht,
        chunk_size=CHUNK, **kwargs,
    )  # fmt: skip


def _linear_attention_forward(q, k, v, g, *, cu_seqlens, chunk_indices, **kwargs):
    from fla.ops.simple_gla.chunk import chunk_simple_gla_fwd
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.constant import RCP_LN2

    packing = dict(chunk_size=CHUNK, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices)
    total = None if g is None else chunk_local_cumsum(g, scale=RCP_LN2, **packing)
    o, final = chunk_simple_gla_fwd(q=q, k=k, v=v, g=total, **packing, **kwargs)
    return o, final, total


def _linear_attention_backward(do, dht, q, k, v, total, *, cu_seqlens, chunk_indices, **kwargs):
    from fla.ops.simple_gla import chunk
    from fla.ops.utils import chunk_local_cumsum

    packing = dict(chunk_size=CHUNK, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices)
    total = total if total.numel() else None
    with _right_code(k) if total is not None else contextlib.nullcontext():
        dq, dk, dv, dg, dh0 = chunk.chunk_simple_gla_bwd(
            q=q, k=k, v=v, g=total, g_gamma=None, do=do, dht=dht, **packing, **kwargs
        )
    if total is not None:
        dg = chunk_local_cumsum(dg, reverse=True, **packing)
    return dq, dk, dv, dg, dh0


def _rwkv6_forward(r, k, v, w, u, **kwargs):
    from fla.ops.rwkv6.chunk import chunk_rwkv6_fwd

    scores, _, final, o = chunk_rwkv6_fwd(q=r, k=k, v=v, g=w, u=u, chunk_size=CHUNK, **kwargs)
    return o, final, scores


def _rwkv6_backward(do, dht, r, k, v, w, u, scores, **kwargs):
    from fla.ops.rwkv6.chunk import chunk_rwkv6_bwd

    return chunk_rwkv6_bwd(
        q=r, k=k, v=v, g=w, u=u, A=scores, do=do, dht=dht, chunk_size=CHUNK, **kwargs
    )


def _rwkv7_forward(r, w, k, v, a, b, **kwargs):
    from fla.ops.generalized_delta_rule.dplr.chunk import chunk_dplr_fwd, gate_bound_is_safe

    assert gate_bound_is_safe(RWKV7_LOWER_BOUND, CHUNK)
    o, final, _, _ = chunk_dplr_fwd(
        q=r, k=k, v=v, a=a, b=b, gk=w, chunk_size=CHUNK, safe_gate=True, **kwargs
    )
    return o, final


def _rwkv7_backward(do, dht, r, w, k, v, a, b, *, scale, initial_state, cu_seqlens, chunk_indices):
    from fla.ops.generalized_delta_rule.dplr.chunk import ChunkDPLRDeltaRuleFunction

    # fla has this backward (which recomputes the forward) only as a method of its autograd node.
    ctx = types.SimpleNamespace(
        saved_tensors=(r, k, v, a, b, w, initial_state), scale=scale, chunk_size=CHUNK,
        cu_seqlens=cu_seqlens, chunk_indices=chunk_indices, safe_gate=True,
        disable_recompute=False, cp_context=None, _fwd_used_autocast=False, _dtype=r.dtype,
    )  # fmt: skip
    dr, dk, dv, da, db, dw, _, dh0, *_ = ChunkDPLRDeltaRuleFunction.backward(ctx, do, dht)
    return dr, dw, dk, dv, da, db, dh0


OPS = {
    "gated_delta_rule": Op(
        "q k v g beta", "q k v beta", "g A", "q k v g beta",
        _gated_delta_rule_forward, _gated_delta_rule_backward,
    ),
    "delta_rule": Op(
        "q k v beta", "q k v beta", "A", "q k v beta", _delta_rule_forward, _delta_rule_backward
    ),
    "kda": Op(
        "q k v g beta", "q k v beta", "g A A2", "q k v g beta", _kda_forward, _kda_backward
    ),
    "gla": Op(
        "q k v g", "q k v", "g A", "q k v g", _gla_forward, _gla_backward, torch.float32
    ),
    "linear_attention": Op(
        "q k v g?", "q k v", "g", "q k v g",
        _linear_attention_forward, _linear_attention_backward,
    ),
    "rwkv6": Op(
        "r k v w u", "r k v w u", "A", "r k v w u", _rwkv6_forward, _rwkv6_backward, torch.float32
    ),
    "rwkv7": Op(
        "r w k v a b", "r w k v a b", "", "r w k v a b", _rwkv7_forward, _rwkv7_backward
    ),
}  # fmt: skip


# Of the refused kernel for keys of up to 64.
TWO_WARPS = {"num_warps": 2, "num_stages": 2}


@contextlib.contextmanager
def _right_code(k: Tensor) -> Iterator[None]:
    """Within it, fla's chunk_bwd_dqkwg runs for keys k [..., K] where fla refuses it, and is right.

    Triton 3.4 to 3.7.0 miscompiles that kernel's gated form on Hopper for blocks of 64 keys, so
    that dk and dg are wrong (flash-linear-attention issue 640): it transposes the result of a
    wgmma, the product of four warps. Two warps multiply with mma and are right; so are blocks of
    128, which wider keys have.
    """
    if not (k.is_cuda and fla_backward_refused(k.device)):
        yield
        return
    from fla.ops.common import chunk_o

    kernel, guard = chunk_o.chunk_bwd_kernel_dqkwg, chunk_o.TRITON_ABOVE_3_7_1
    chunk_o.TRITON_ABOVE_3_7_1 = True
    if k.shape[-1] <= 64:
        chunk_o.chunk_bwd_kernel_dqkwg = _two_warps(kernel)
    try:
        yield
    finally:
        chunk_o.chunk_bwd_kernel_dqkwg, chunk_o.TRITON_ABOVE_3_7_1 = kernel, guard


@functools.cache
def _two_warps(kernel):
    """fla's kernel, heuristics over an autotuner, with TWO_WARPS instead of the autotuner."""
    from triton.runtime.autotuner import Heuristics

    class TwoWarps(Heuristics):
        def run(self, *args, **kwargs):
            return super().run(*args, **TWO_WARPS, **kwargs)

    return TwoWarps(kernel.fn.fn, kernel.arg_names, kernel.values)


def _chunk_indices(cu_seqlens: Tensor | None) -> Tensor | None:
    if cu_seqlens is None:
        return None
    table = known_chunk_table(cu_seqlens, CHUNK)
    if table is not None:
        return table
    from fla.ops.utils.index import prepare_chunk_indices

    # Positional, as fla calls it: its cache compares the arguments as they are given.
    return prepare_chunk_indices(cu_seqlens, CHUNK)


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _contiguous(tensors) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _register(name: str, op: Op) -> Callable:
    """Define retort::fla_{name} and retort::fla_{name}_backward; returns the first."""
    inputs, kept, saved = op.inputs.split(), op.kept.split(), op.saved.split()
    positions = [[x.rstrip("?") for x in inputs].index(x) for x in kept]
    value = [x.rstrip("?") for x in inputs].index("v")
    arguments = [f"Tensor? {x[:-1]}" if x[-1] == "?" else f"Tensor {x}" for x in inputs]
    returns = ", ".join(["Tensor"] * (2 + len(saved)))
    schema = (
        f"({', '.join(arguments)}, float scale, Tensor? initial_state, bool output_final_state, "
        f"Tensor? cu_seqlens) -> ({returns})"
    )
    gradients = ", ".join(["Tensor"] * (len(inputs) + 1))
    backward_schema = (
        "(Tensor o_grad, Tensor? state_grad, Tensor[] tensors, float scale, "
        f"Tensor? initial_state, Tensor? cu_seqlens) -> ({gradients})"
    )

    def forward(*args):
        *tensors, scale, state, output_final_state, cu_seqlens = args
        tensors, (state,) = _contiguous(tensors), _contiguous([state])
        with _device(tensors[0]):
            o, *rest = op.forward(
                *tensors, scale=scale, initial_state=state, cu_seqlens=cu_seqlens,
                output_final_state=output_final_state, chunk_indices=_chunk_indices(cu_seqlens),
            )  # fmt: skip
            empty = functools.partial(tensors[0].new_empty, 0, dtype=torch.float32)
            return (o, *(empty() if x is None else x for x in rest))

    def fake_forward(*args):
        *tensors, _scale, _state, output_final_state, cu_seqlens = args
        q, v = tensors[0], tensors[value]
        float32 = functools.partial(q.new_empty, dtype=torch.float32)
        final = float32(0)
        if output_final_state:
            documents = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            final = float32(documents, q.shape[2], q.shape[3], v.shape[3])
        outs = [v.new_empty(v.shape), final]
        for x in saved:
            if x == "g":
                g = tensors[inputs.index("g") if "g" in inputs else inputs.index("g?")]
                outs.append(float32(0) if g is None else float32(g.shape))
            else:
                dtype = op.matrix_dtype or v.dtype
                outs.append(v.new_empty((*v.shape[:3], CHUNK), dtype=dtype))
        return tuple(outs)

    def backward(do, dht, tensors, scale, state, cu_seqlens):
        do, dht, state = _contiguous([do, dht, state])
        tensors = _contiguous(tensors)
        with _device(do):
            grads = op.backward(
                do, dht, *tensors, scale=scale, initial_state=state, cu_seqlens=cu_seqlens,
                chunk_indices=_chunk_indices(cu_seqlens),
            )  # fmt: skip
        return tuple(
            x.new_empty(x.shape) if grad is None else grad.to(x.dtype)
            for grad, x in zip(grads, likes(tensors, state), strict=True)
        )

    def fake_backward(do, dht, tensors, scale, state, cu_seqlens):
        return tuple(x.new_empty(x.shape) for x in likes(tensors, state))

    def likes(tensors, state):
        """A tensor of the shape and dtype of each gradient; empty where there is none."""
        names = dict(zip((*kept, *saved), tensors, strict=True))
        empty = tensors[0].new_empty(0, dtype=torch.float32)
        return [*(names[x] for x in op.like.split()), empty if state is None else state]

    forward_op = torch.library.custom_op(
        f"retort::fla_{name}", forward, mutates_args=(), schema=schema
    )
    backward_op = torch.library.custom_op(
        f"retort::fla_{name}_backward", backward, mutates_args=(), schema=backward_schema
    )
    forward_op.register_fake(fake_forward)
    backward_op.register_fake(fake_backward)

    def setup_context(ctx, inputs, output):
        *tensors, scale, state, _, cu_seqlens = inputs
        ctx.scale, ctx.shape = scale, (output[0].shape, output[0].dtype)
        ctx.save_for_backward(state, cu_seqlens, *(tensors[i] for i in positions), *output[2:])
        ctx.set_materialize_grads(False)

    def autograd(ctx, do, dht, *_):
        state, cu_seqlens, *tensors = ctx.saved_tensors
        if do is None:
            shape, dtype = ctx.shape
            do = tensors[0].new_zeros(shape, dtype=dtype)
        *grads, dh0 = backward_op(do, dht, tensors, ctx.scale, state, cu_seqlens)
        grads = [x if need else None for x, need in zip(grads, ctx.needs_input_grad, strict=False)]
        return (*grads, None, None if state is None else dh0, None, None)

    forward_op.register_autograd(autograd, setup_context=setup_context)
    return forward_op


CUSTOM_OPS = {name: _register(name, op) for name, op in OPS.items()}


def _call(name, tensors, scale, initial_state, output_final_state, cu_seqlens):
    key_dim = tensors[0].shape[-1]
    if cu_seqlens is not None:
        assert tensors[0].shape[0] == 1, f"packed documents are one row, not {tensors[0].shape}"
    o, final, *_ = CUSTOM_OPS[name](
        *tensors, float(key_dim**-0.5 if scale is None else scale),
        None if initial_state is None else initial_state.float(), output_final_state, cu_seqlens,
    )  # fmt: skip
    return o, (final if output_final_state else None)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """ops/gated_delta_rule.py's recurrence (arXiv 2412.06464, eq. 10); q, k L2-normalised."""
    tensors = (q.to(v.dtype), k.to(v.dtype), v, g.float(), beta)
    return _call("gated_delta_rule", tensors, scale, initial_state, output_final_state, cu_seqlens)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gated delta rule with g = 0 (arXiv 2406.06484). bfloat16 or float16 only."""
    if v.dtype == torch.float32:
        raise ValueError("delta_rule: float32 found; fla's kernel takes bfloat16 or float16")
    tensors = (q.to(v.dtype), k.to(v.dtype), v, beta)
    return _call("delta_rule", tensors, scale, initial_state, output_final_state, cu_seqlens)


def kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gated delta rule with a decay per key channel (Kimi Linear, arXiv 2510.26692)."""
    tensors = (q.to(v.dtype), k.to(v.dtype), v, g.float(), beta)
    return _call("kda", tensors, scale, initial_state, output_final_state, cu_seqlens)


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """S_t = diag(e^g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t (GLA, arXiv 2312.06635)."""
    tensors = (q.to(v.dtype), k.to(v.dtype), v, g.float())
    return _call("gla", tensors, scale, initial_state, output_final_state, cu_seqlens)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """GLA with one decay per head, or none (g None). No normalisation."""
    tensors = (q.to(v.dtype), k.to(v.dtype), v, None if g is None else g.float())
    return _call("linear_attention", tensors, scale, initial_state, output_final_state, cu_seqlens)


def rwkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, *, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """S_t = diag(e^w_t) S_{t-1} + k_t v_t^T, o_t = scale (S_{t-1} + diag(u) k_t v_t^T)^T r_t
    (arXiv 2404.05892); u [H, K]."""
    tensors = (r.to(v.dtype), k.to(v.dtype), v, w.float(), u)
    return _call("rwkv6", tensors, scale, initial_state, output_final_state, cu_seqlens)


def rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor,
    *, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """S_t = diag(e^w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, o_t = scale S_t^T r_t
    (arXiv 2503.14456). Needs w >= RWKV7_LOWER_BOUND, unchecked."""
    dtype = v.dtype
    tensors = (r.to(dtype), w.float(), k.to(dtype), v, a.to(dtype), b.to(dtype))
    return _call("rwkv7", tensors, scale, initial_state, output_final_state, cu_seqlens)
