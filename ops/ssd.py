"""State space duality, the recurrence of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 5; the
chunked form is its section 6).

Per head, with step size dt_t > 0 and the head's rate A < 0:

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T        y_t = S_t^T C_t + D x_t

This is linear attention with q = C, k = B, v = dt x and log decay dt A; there is no scale. The
inputs, their names and their order are mamba-ssm's. The H / G heads of a group share B and C.

`naive_*` loops over time, `chunk_*` is the training form in matrix products, `step_*` decodes one
token, `fla_*` calls fla's Triton kernel and `mamba_ssm_*` that of mamba-ssm.
Check: `pytest tests/ops -k ssd`.

Shapes: B batch, T time, H heads, G groups (H a multiple), N state size, P head size, M documents.
x [B, T, H, P]; dt [B, T, H], after softplus; A, D [H]; B, C [B, T, G, N]; states [B, H, N, P] in
float32 (float64 for float64 x), one per document ([M, H, N, P], B = 1) when `cu_seqlens` [M + 1]
is given. Outputs have x's shape and dtype. dt and A are best given in float32.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ops.chunked import CHUNK, by_steps, linear_chunks, zero_state

MAMBA_CHUNK = 256  # mamba-ssm's own default


def per_head(x: Tensor, heads: int) -> Tensor:
    """[..., G, N] -> [..., H, N]: head h reads group h // (H / G)."""
    groups = x.shape[-2]
    return x if groups == heads else x.repeat_interleave(heads // groups, -2)


def naive_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence as written, one step at a time. Returns y [B, T, H, P] and the last state."""
    return by_steps(
        lambda x, dt, B, C, **state: step_ssd(x, dt, A, B, C, D, **state),
        (x, dt, B, C),
        zero_state(per_head(B, x.shape[2]), x),
        initial_state,
        output_final_state,
        cu_seqlens,
    )


def step_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: x [B, H, P], dt [B, H], A, D [H], B, C [B, G, N]. -> y [B, H, P], state."""
    dtype, out_dtype = initial_state.dtype, x.dtype
    x, dt, A, B, C, D = (t.to(dtype) for t in (x, dt, A, B, C, D))
    B, C = per_head(B, x.shape[1]), per_head(C, x.shape[1])
    with torch.autocast(x.device.type, enabled=False):  # the state stays in float32
        state = initial_state * (dt * A).exp()[..., None, None]  # [B, H, N, P]
        state = state + B.unsqueeze(-1) * (dt.unsqueeze(-1) * x).unsqueeze(-2)
        y = torch.einsum("bhnp,bhn->bhp", state, C) + D[:, None] * x
    return y.to(out_dtype), state


def chunk_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    rows: int = 1,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence in chunks of `chunk_size` tokens: matrix products only, also between chunks.
    Any T. Returns y [B, T, H, P] and the last state.

    Documents of a packed row are kept apart by masks, so they cost nothing extra; only states
    per document (`initial_state` or `output_final_state` with `cu_seqlens`) run one by one.
    rows: with `cu_seqlens`, the packed tokens are this many rows of equal length, each of which
    begins a document; they run side by side.
    """
    B, C = per_head(B, x.shape[2]), per_head(C, x.shape[2])
    out_dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):  # decays and the state need float32
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, dt, A, D = (t.to(dtype) for t in (x, dt, A, D))
        y, state = linear_chunks(
            C, B, dt.unsqueeze(-1) * x, dt * A, scale=1.0, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens, rows=rows,
            chunk_size=chunk_size,
        )  # fmt: skip
        y = (y + D[:, None] * x).to(out_dtype)
    return y, state


def fla_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """flash-linear-attention's Triton kernels for one decay per head (CUDA only); the decay stays
    float32, dt x is rounded to x's dtype."""
    from ops.fla_kernels import linear_attention as kernel

    B, C = per_head(B, x.shape[2]), per_head(C, x.shape[2])
    dt = dt.float()
    y, state = kernel(
        C, B, (dt.unsqueeze(-1) * x).to(x.dtype), dt * A.float(), scale=1.0,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return (y + D.float()[:, None] * x).to(x.dtype), state


def mamba_ssm_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """mamba-ssm's Triton kernel, `mamba_chunk_scan_combined` (CUDA only). Used only where the
    package mamba-ssm is installed.

    It has no state per packed document that a backward could pass: with `cu_seqlens`, states given
    or wanted (a prompt being read) are the chunked form's work. Versions that take a type for
    the states between chunks get float32; older ones keep those in C's type.
    """
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        return chunk_ssd(
            x, dt, A, B, C, D, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as kernel

    options = {}
    if "state_dtype" in inspect.signature(kernel).parameters:
        options["state_dtype"] = torch.float32
    if cu_seqlens is not None:
        time = torch.arange(x.shape[1], device=x.device)
        ends = cu_seqlens[1:].contiguous()
        options["seq_idx"] = torch.searchsorted(ends, time, right=True, out_int32=True)[None]
    if initial_state is not None:  # [B, H, P, N] there
        options["initial_states"] = initial_state.mT.contiguous()
    out = kernel(
        x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), MAMBA_CHUNK, D=D.float(),
        return_final_states=output_final_state, **options,
    )  # fmt: skip
    return (out[0], out[1].float().mT.contiguous()) if output_final_state else (out, None)


KERNELS = {
    "naive": naive_ssd,
    "chunk": chunk_ssd,
    "fla": fla_ssd,
    "mamba_ssm": mamba_ssm_ssd,
}
