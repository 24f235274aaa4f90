"""The Triton kernel of ops/kd_head.py: losses and dlogits of a chunk of tokens.

A program has one token. It reads the token's two rows of logits once for the normalisers and once
more, from the end, for the loss and its gradient, which it writes over the student's row; reverse
KL and JS need their value before their gradient, and one reading more. Everything between load and
store is float32. The formulas are those of ops/kd_chunk.py.
"""

import triton
import triton.language as tl

FORWARD_KL, REVERSE_KL, JS, MSE = 0, 1, 2, 3


@triton.jit
def _add(m, s, x):
    """One more x in every lane of a sum of exponentials s exp(m), with a single exponential."""
    d = x - m
    e = tl.exp(-tl.abs(d))
    return tl.maximum(m, x), tl.where(d > 0, s * e + 1, s + e)


@triton.jit
def _log_sum(m, s):
    """The logarithm of the sum over all lanes."""
    most = tl.max(m, 0)
    return most + tl.log(tl.sum(s * tl.exp(m - most), 0))


@triton.jit
def _argmax(m, index, vocab):
    """The lowest index of the largest m."""
    return tl.min(tl.where(m == tl.max(m, 0), index, vocab), 0)


@triton.jit
def _js_logs(lp, lq, beta):
    """log q/m and log p/m with m = beta q + (1 - beta) p."""
    r = tl.minimum(tl.maximum(lp - lq, -80.0), 80.0)
    q_over_m = -tl.log(beta + (1 - beta) * tl.exp(r))
    return q_over_m, r + q_over_m


@triton.jit
def kd_chunk_kernel(
    z_s, z_t, labels, divisor, out, tokens, stride_s, stride_t, inv_temperature, kd_scale,
    kd_factor, ce_weight, beta, VOCAB: tl.constexpr, IGNORE: tl.constexpr, LOSS: tl.constexpr,
    TEACHER: tl.constexpr, CE: tl.constexpr, GRAD: tl.constexpr, METRICS: tl.constexpr,
    TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [4, tokens]: divergence, cross-entropy, the teacher's, whether both argmaxes agree."""
    row = tl.program_id(0)
    label = tl.load(labels + row)
    z_s += row.to(tl.int64) * stride_s
    z_t += row.to(tl.int64) * stride_t
    out += row
    lane = tl.arange(0, BLOCK)
    low: tl.constexpr = -1.0e30
    if label == IGNORE:
        for i in tl.static_range(4):
            tl.store(out + i * tokens, 0.0)
        if GRAD:
            for start in range(0, VOCAB, BLOCK):
                zero = tl.zeros([BLOCK], z_s.dtype.element_ty)
                tl.store(z_s + start + lane, zero, mask=start + lane < VOCAB)
        return

    # ---- the normalisers: at the temperature, and at 1 where that is another
    m_s = tl.full([BLOCK], low, tl.float32)
    m_t, m_s1, m_t1 = m_s, m_s, m_s
    s_s = tl.zeros([BLOCK], tl.float32)
    s_t, s_s1, s_t1 = s_s, s_s, s_s
    top_s = tl.zeros([BLOCK], tl.int32)
    top_t = top_s
    for start in range(0, VOCAB, BLOCK):
        mask = start + lane < VOCAB
        x = tl.load(z_s + start + lane, mask=mask, other=float("-inf")).to(tl.float32)
        if METRICS:
            top_s = tl.where(x * inv_temperature > m_s, start + lane, top_s)
        if TEMPERED:
            m_s1, s_s1 = _add(m_s1, s_s1, x)
        m_s, s_s = _add(m_s, s_s, x * inv_temperature)
        if TEACHER:
            x = tl.load(z_t + start + lane, mask=mask, other=float("-inf")).to(tl.float32)
            if METRICS:
                top_t = tl.where(x * inv_temperature > m_t, start + lane, top_t)
                if TEMPERED:
                    m_t1, s_t1 = _add(m_t1, s_t1, x)
            m_t, s_t = _add(m_t, s_t, x * inv_temperature)
    lse_s = _log_sum(m_s, s_s)
    lse_s1 = lse_s
    if TEMPERED:
        lse_s1 = _log_sum(m_s1, s_s1)
    lse_t = 0.0
    if TEACHER:
        lse_t = _log_sum(m_t, s_t)

    # ---- values that need no second reading
    known = (label >= 0) & (label < VOCAB)
    at = tl.where(known, label, 0)
    ce = lse_s1 - tl.load(z_s + at).to(tl.float32)
    tl.store(out + tokens, tl.where(known, ce, float("nan")))
    teacher_ce = 0.0
    agree = 0.0
    if METRICS and TEACHER:
        lse_t1 = lse_t
        if TEMPERED:
            lse_t1 = _log_sum(m_t1, s_t1)
        teacher_ce = lse_t1 - tl.load(z_t + at).to(tl.float32)
        agree = (_argmax(m_s, top_s, VOCAB) == _argmax(m_t, top_t, VOCAB)).to(tl.float32)
    tl.store(out + 2 * tokens, teacher_ce)
    tl.store(out + 3 * tokens, agree)

    # ---- the divergence, and its gradient where that does not need it
    kl_q = 0.0
    kl_p = 0.0
    LATE: tl.constexpr = TEACHER and (LOSS == 1 or LOSS == 2)  # the gradient comes last
    # What is not read again should not push out of the cache what is: 3 % on an H100.
    LOADED: tl.constexpr = "" if LATE else "evict_first"
    blocks: tl.constexpr = (VOCAB + BLOCK - 1) // BLOCK
    scale = 0.0
    if GRAD:
        scale = 1 / tl.load(divisor).to(tl.float32)
    if TEACHER or GRAD:
        sum_q = tl.zeros([BLOCK], tl.float32)
        sum_p = tl.zeros([BLOCK], tl.float32)
        for i in range(0, blocks):
            index = (blocks - 1 - i) * BLOCK + lane  # the end is still in the cache
            mask = index < VOCAB
            x = tl.load(z_s + index, mask=mask, other=float("-inf"), eviction_policy=LOADED)
            x = x.to(tl.float32)
            lp = x * inv_temperature - lse_s
            p = tl.exp(lp)
            d = tl.zeros([BLOCK], tl.float32)
            if TEACHER:
                y = tl.load(z_t + index, mask=mask, other=float("-inf"), eviction_policy=LOADED)
                y = y.to(tl.float32)
                lq = y * inv_temperature - lse_t
                q = tl.exp(lq)
                if LOSS == 0:
                    sum_q += tl.where(mask, q * (lq - lp), 0.0)
                    d = (p - q) * kd_factor
                elif LOSS == 1:
                    sum_p += tl.where(mask, p * (lp - lq), 0.0)
                elif LOSS == 2:
                    q_over_m, p_over_m = _js_logs(lp, lq, beta)
                    sum_q += tl.where(mask, q * q_over_m, 0.0)
                    sum_p += tl.where(mask, p * p_over_m, 0.0)
                else:
                    diff = tl.where(mask, x - y, 0.0) * inv_temperature
                    sum_q += diff * diff
                    d = diff * kd_factor
            if GRAD and not LATE:
                if CE:
                    d += ce_weight * (tl.exp(x - lse_s1) - tl.where(index == label, 1.0, 0.0))
                d = (d * scale).to(z_s.dtype.element_ty)
                tl.store(z_s + index, d, mask=mask, cache_modifier=".cs")
        kl_q = tl.sum(sum_q, 0)
        kl_p = tl.sum(sum_p, 0)
    value = kl_q
    if LOSS == 1:
        value = kl_p
    elif LOSS == 2:
        value = beta * kl_q + (1 - beta) * kl_p
    tl.store(out, value * kd_scale)

    # ---- the gradients of reverse KL and JS
    if GRAD and LATE:
        for start in range(0, VOCAB, BLOCK):
            index = start + lane
            mask = index < VOCAB
            x = tl.load(z_s + index, mask=mask, other=float("-inf")).to(tl.float32)
            y = tl.load(z_t + index, mask=mask, other=float("-inf")).to(tl.float32)
            lp = x * inv_temperature - lse_s
            lq = y * inv_temperature - lse_t
            if LOSS == 1:
                d = tl.exp(lp) * (lp - lq - kl_p) * kd_factor
            else:
                _, p_over_m = _js_logs(lp, lq, beta)
                d = tl.exp(lp) * (p_over_m - kl_p) * ((1 - beta) * kd_factor)
            if CE:
                d += ce_weight * (tl.exp(x - lse_s1) - tl.where(index == label, 1.0, 0.0))
            tl.store(z_s + index, (d * scale).to(z_s.dtype.element_ty), mask=mask)
