"""fla's kernels as custom ops: on CPU the wiring, on a GPU the numbers against float64 loops.

pytest tests/ops/test_fla_kernels.py            # CPU: fla's own functions are replaced by loops
pytest tests/ops/test_fla_kernels.py -m gpu     # minutes, where Triton has not compiled them yet
"""

from __future__ import annotations

import importlib
import inspect
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import pytest
import torch
from kit import TOLERANCE, assert_close_rms, rms_ratio
from torch import nn

from ops import fla_kernels
from ops.fla_kernels import CHUNK, CUSTOM_OPS, OPS, check_head_size
from ops.fla_reference import LOW, VARIANTS, naive, random_inputs, results

# Odd bounds, an empty document inside, more than one chunk, padded by repeats at the end.
BOUNDS = [0, 1, 38, 38, 165, 200, 200, 200]


def call(op):
    """`fla_kernels`' function of this op, with the arguments of `naive`."""
    function = getattr(fla_kernels, op)

    def run(x, state, *, bounds=None, scale=None, final=True):
        cu_seqlens = None
        if bounds is not None:
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=x["v"].device)
        return function(
            *x.values(), scale=scale, initial_state=state, output_final_state=final,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip

    return run


def compare(actual, expected, tol=None):
    assert actual.keys() == expected.keys()
    errors = {n: rms_ratio(actual[n], expected[n]) for n in actual}
    limits = {n: TOLERANCE[actual[n].dtype] if tol is None else tol for n in actual}
    assert all(errors[n] <= limits[n] for n in errors), {n: f"{e:.1e}" for n, e in errors.items()}
    return max(errors.values())


# fla's function -> what it returns, in order; "." is anything. Names as in `make`.
FLA = {
    "gated_delta_rule": {
        "gated_delta_rule.chunk.chunk_gated_delta_rule_fwd": "g o A final . .",
        "gated_delta_rule.chunk.chunk_gated_delta_rule_bwd": "dq dk dv dbeta dg dstate . .",
    },
    "delta_rule": {
        "delta_rule.chunk.chunk_delta_rule_fwd": "o A final",
        "delta_rule.chunk.chunk_delta_rule_bwd": "dq dk dv dbeta dstate",
    },
    "kda": {
        "kda.chunk_fwd.chunk_kda_fwd": "o final g A A . . . . . . .",
        "kda.chunk_bwd.chunk_kda_bwd": "dq dk dv dbeta dg dstate . .",
    },
    "gla": {
        "gla.chunk.chunk_gla_fwd": "g A . final o",
        "gla.chunk.chunk_gla_bwd": "dq dk dv dg dstate",
    },
    "linear_attention": {
        "simple_gla.chunk.chunk_simple_gla_fwd": "o final",
        "simple_gla.chunk.chunk_simple_gla_bwd": "dq dk dv dg dstate",
    },
    "rwkv6": {
        "rwkv6.chunk.chunk_rwkv6_fwd": "A . final o",
        "rwkv6.chunk.chunk_rwkv6_bwd": "dr dk dv dw du dstate",
    },
    "rwkv7": {"generalized_delta_rule.dplr.chunk.chunk_dplr_fwd": "o final . ."},
}
RENAMED = {"rwkv6": {"r": "q", "w": "g"}, "rwkv7": {"r": "q", "w": "gk"}}


@pytest.fixture
def fla_on_cpu(monkeypatch):
    """fla's internal functions, replaced by the float64 loop and its gradient. They keep fla's
    signatures; where fla returns the decay's running sum, these return the decay itself."""
    pytest.importorskip("fla")

    def value(op, kwargs):
        names = RENAMED.get(op, {})
        names = {n: names.get(n, n) for n in OPS[op].inputs.replace("?", "").split()}
        x = {n: kwargs[names[n]] for n in names}
        if op == "gla" and x["g"] is None:
            x["g"] = kwargs["g_cumsum"]
        bounds = kwargs["cu_seqlens"]
        bounds = None if bounds is None else bounds.tolist()
        x = {n: t if t is None else t.detach().double().requires_grad_() for n, t in x.items()}
        state = kwargs["initial_state"]
        if state is not None:
            assert state.dtype == torch.float32
            state = state.detach().double().requires_grad_()
        with torch.enable_grad():
            o, final = naive(op, x, state, scale=kwargs["scale"], bounds=bounds)
        return x, state, o, final

    def outputs(op, kwargs):
        x, _, o, final = value(op, kwargs)
        v, dtype = x["v"], OPS[op].matrix_dtype or kwargs["v"].dtype
        return {
            "o": o.detach().to(kwargs["v"].dtype),
            "final": final.detach().float() if kwargs["output_final_state"] else None,
            "g": x["g"].detach().float() if x.get("g") is not None else None,
            "A": v.new_zeros(*v.shape[:3], CHUNK, dtype=dtype),
        }

    def gradients(op, kwargs):
        x, state, o, final = value(op, kwargs)
        out, grad = [o], [kwargs["do"].double()]
        if kwargs["dht"] is not None:
            out, grad = [o, final], [*grad, kwargs["dht"].double()]
        wanted = {n: t for n, t in {**x, "state": state}.items() if t is not None}
        found = torch.autograd.grad(out, list(wanted.values()), grad, allow_unused=True)
        found = {f"d{n}": g for n, g in zip(wanted, found, strict=True)}
        return {"dstate": None, "dg": None, **found}

    def replace(op, path, returns):
        module_name, name = path.rsplit(".", 1)
        module = importlib.import_module(f"fla.ops.{module_name}")
        signature = inspect.signature(getattr(module, name))

        def function(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            assert bound.arguments["chunk_size"] == CHUNK
            assert all(x.is_contiguous() for x in kwargs.values() if torch.is_tensor(x))
            work = outputs if name.endswith("fwd") else gradients
            arguments = {**bound.arguments, **bound.arguments.get("kwargs", {})}
            with ThreadPoolExecutor(1) as pool:  # a custom op's own thread has no autograd
                made = pool.submit(work, op, arguments).result()
            found = (None if r == "." else made[r] for r in returns.split())
            return tuple(None if x is None else x.clone() for x in found)

        monkeypatch.setattr(module, name, function)

    for op, functions in FLA.items():
        for path, returns in functions.items():
            replace(op, path, returns)
    utils = importlib.import_module("fla.ops.utils")
    monkeypatch.setattr(utils, "chunk_local_cumsum", lambda g, **_: g.clone())
    dplr = importlib.import_module("fla.ops.generalized_delta_rule.dplr.chunk")

    def rwkv7_backward(ctx, do, dht):
        r, k, v, a, b, w, state = ctx.saved_tensors
        kwargs = dict(q=r, gk=w, k=k, v=v, a=a, b=b, initial_state=state, do=do, dht=dht)
        kwargs |= dict(scale=ctx.scale, cu_seqlens=ctx.cu_seqlens)
        with ThreadPoolExecutor(1) as pool:
            d = pool.submit(gradients, "rwkv7", kwargs).result()
        order = ("dr", "dk", "dv", "da", "db", "dw", None, "dstate")
        return (*(d[n] if n else None for n in order), *[None] * 8)

    monkeypatch.setattr(dplr.ChunkDPLRDeltaRuleFunction, "backward", rwkv7_backward)


def cpu_dtype(op):
    return torch.bfloat16 if op == "delta_rule" else torch.float32


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("states", [True, False], ids=["states", "plain"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_wiring(fla_on_cpu, variant, packed, states):
    op, bounds = variant.split()[0], [0, 1, 6, 6, 9, 9] if packed else None
    x, state = random_inputs(variant, 9, batch=1 if packed else 2, states=5 if packed else None)
    state = state if states else None
    expected = results(partial(naive, op), x, state, final=states, bounds=bounds)
    dtype, run = cpu_dtype(op), call(op)
    if not states:  # nothing asked for, nothing returned
        single = {n: t if t is None else t.to(dtype) for n, t in x.items()}
        assert run(single, None, final=False)[1] is None
    actual = results(partial(run, final=states), x, state, dtype=dtype, final=states, bounds=bounds)
    compare(actual, expected, tol=TOLERANCE[dtype])


@pytest.mark.parametrize("variant", VARIANTS)
def test_registration(fla_on_cpu, variant):
    """Fake implementations, schemas and autograd agree with the real ones, by torch's own check."""
    op = variant.split()[0]
    x, state = random_inputs(variant, 9, states=3)
    dtype = cpu_dtype(op)
    tensors = [t if t is None else t.to(dtype if n in LOW else torch.float32)
               for n, t in x.items()]  # fmt: skip
    tensors = [t if t is None else t.requires_grad_() for t in tensors]
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    for args in (
        (*tensors, 0.3, state.float().requires_grad_(), True, cu_seqlens),
        (*tensors, 0.3, None, False, None),
    ):
        torch.library.opcheck(
            CUSTOM_OPS[op], args, test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


class Block(nn.Module):
    """A projection around an op, so that a graph has something on either side of it."""

    def __init__(self, variant, x, device, dtype):
        super().__init__()
        self.op, self.names = variant.split()[0], list(x)
        self.width = x["v"].shape[-1]
        self.proj = nn.Linear(self.width, self.width, bias=False, device=device, dtype=dtype)

    def forward(self, x, state, cu_seqlens):
        x = {**x, "v": self.proj(x["v"])}
        o, final = getattr(fla_kernels, self.op)(
            *(x[n] for n in self.names), initial_state=state,
            output_final_state=state is not None, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return self.proj(o).sin(), final


def run_block(block, x, state, cu_seqlens):
    o, final = block(x, state, cu_seqlens)
    loss = o.float().square().mean() + (0 if final is None else final.square().mean())
    grads = torch.autograd.grad(
        loss, [*block.parameters(), *(t for t in x.values() if t is not None)]
    )
    return [o, *([] if final is None else [final]), *grads]


def check_compiled(variant, backend, device, dtype, cases=3, **sizes):
    torch._dynamo.reset()
    x, state = random_inputs(variant, 72, states=4, device=device, **sizes)
    x = {n: t if t is None else t.to(dtype if n in LOW else torch.float32).requires_grad_()
         for n, t in x.items()}  # fmt: skip
    block = Block(variant, x, device, dtype)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    cu_seqlens = torch.tensor([0, 3, 40, 40, 72], dtype=torch.int32, device=device)
    for args in ((state.float(), cu_seqlens), (None, cu_seqlens), (None, None))[:cases]:
        for a, b in zip(run_block(compiled, x, *args), run_block(block, x, *args), strict=True):
            assert rms_ratio(a, b) <= TOLERANCE[dtype]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_graph_break(fla_on_cpu, variant):
    check_compiled(variant, "aot_eager", "cpu", cpu_dtype(variant.split()[0]))


def test_only_the_state_used(fla_on_cpu):
    x, state = random_inputs("gla", 9)
    k = x["k"].float().requires_grad_()
    _, final = fla_kernels.gla(
        x["q"].float(), k, x["v"].float(), x["g"].float(), initial_state=state.float(),
        output_final_state=True,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(final.sum(), k)
    exact = x["k"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(naive("gla", {**x, "k": exact}, state)[1].sum(), exact)
    assert_close_rms(grad, expected)


def test_mixed_dtypes_of_autocast(fla_on_cpu):
    """q and k may come in float32 (their norm ran so): they are cast to v's dtype."""
    x, _ = random_inputs("gated_delta_rule", 9)
    q, k, g, beta = (x[n].float().requires_grad_() for n in ("q", "k", "g", "beta"))
    v = x["v"].bfloat16().requires_grad_()
    o, _ = fla_kernels.gated_delta_rule(q, k.mT.contiguous().mT, v, g, beta)
    assert o.dtype == torch.bfloat16
    grads = torch.autograd.grad(o.float().square().sum(), (q, k, v, g, beta))
    assert [t.dtype for t in grads] == [t.dtype for t in (q, k, v, g, beta)]
    assert_close_rms(o, naive("gated_delta_rule", x)[0])


def test_refusals():
    x, _ = random_inputs("delta_rule", 4)
    with pytest.raises(ValueError, match="delta_rule: float32 found"):
        fla_kernels.delta_rule(*(t.float() for t in x.values()))
    with pytest.raises(ValueError, match="'mamba' found, one of gated_delta_rule, "):
        check_head_size("mamba", 64, 64)


@pytest.mark.parametrize("op", OPS)
def test_head_sizes(op):
    for size in (16, 64, 96, 128):
        assert check_head_size(op, size, size) is None
    assert "key size in multiples of 16, not 8" in check_head_size(op, 8, 64)
    assert "value size in multiples of 16, not 72" in check_head_size(op, 64, 72)
    assert f"fla's {op} kernel takes a key size of at most" in check_head_size(op, 512, 64)
    assert (check_head_size(op, 256, 256) is None) == (op != "rwkv7")


@pytest.mark.parametrize("key", [16, 64, 96, 128])
def test_right_code(monkeypatch, key):
    """The refused kernel runs, for up to 64 keys with two warps; the guard is back afterwards."""
    chunk_o = pytest.importorskip("fla.ops.common.chunk_o")
    from triton.runtime.autotuner import Autotuner, Heuristics

    launched = []

    class Jit:
        def run(self, *args, **kwargs):
            launched.append(kwargs)

    class Tuner:
        fn, run = Jit(), Jit().run

    fla = chunk_o.chunk_bwd_kernel_dqkwg
    assert isinstance(fla, Heuristics) and isinstance(fla.fn, Autotuner)  # what _two_warps takes
    kernel = Heuristics(Tuner(), ["k", "g"], {"USE_G": lambda args: args["g"] is not None})
    monkeypatch.setattr(chunk_o, "chunk_bwd_kernel_dqkwg", kernel)
    monkeypatch.setattr(chunk_o, "TRITON_ABOVE_3_7_1", False)
    monkeypatch.setattr(fla_kernels, "fla_backward_refused", lambda _: True)
    k = mock.Mock(shape=(1, 8, 2, key), is_cuda=True)
    with pytest.raises(ZeroDivisionError), fla_kernels._right_code(k):
        assert chunk_o.TRITON_ABOVE_3_7_1 is True
        chunk_o.chunk_bwd_kernel_dqkwg[7,](k, g=1)
        raise ZeroDivisionError
    warps = fla_kernels.TWO_WARPS if key <= 64 else {}
    assert launched == [dict(grid=(7,), warmup=False, g=1, USE_G=True, **warps)]
    assert chunk_o.chunk_bwd_kernel_dqkwg is kernel
    assert chunk_o.TRITON_ABOVE_3_7_1 is False


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def on_gpu(test):
    for mark in gpu:
        test = mark(test)
    return test


# Key size, value size, heads: the heads of scripts/tune_kernels.py, whose compiled kernels serve.
SIZES = {"64": (64, 64, 9), "128": (128, 128, 12), "96": (96, 96, 8), "64x128": (64, 128, 9)}
# No power of two: masked tiles. Key and value differ.
MORE_SIZES = [
    *((variant, "96") for variant in ("gated_delta_rule", "kda", "gla", "rwkv7")),
    *((variant, "64x128") for variant in ("gated_delta_rule", "linear_attention", "rwkv6")),
]


def gpu_inputs(variant, length, size, **kwargs):
    key, value, heads = SIZES[size]
    return random_inputs(
        variant, length, heads=heads, key_dim=key, value_dim=value, device="cuda", **kwargs
    )


@on_gpu
@pytest.mark.parametrize(
    ("variant", "size"), [(v, size) for v in VARIANTS for size in ("64", "128")] + MORE_SIZES
)
def test_packed_states_on_gpu(untimed_kernels, variant, size):
    """dg is the least exact, 4e-3 to 6e-3: fla adds up <state, its gradient> in bfloat16 there."""
    op = variant.split()[0]
    x, state = gpu_inputs(variant, BOUNDS[-1], size, states=len(BOUNDS) - 1)
    expected = results(partial(naive, op), x, state, bounds=BOUNDS)
    actual = results(call(op), x, state, dtype=torch.bfloat16, bounds=BOUNDS)
    print(f"error {compare(actual, expected, tol=TOLERANCE[torch.bfloat16]):.1e}")


@on_gpu
@pytest.mark.parametrize("size", ["64", "128"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lengths_on_gpu(untimed_kernels, variant, size):
    op = variant.split()[0]
    errors = []
    for length in (1, 63, 200):
        x, _ = gpu_inputs(variant, length, size, batch=2, seed=length)
        expected = results(partial(naive, op), x, None, final=False)
        actual = results(partial(call(op), final=False), x, None, dtype=torch.bfloat16, final=False)
        if length == 1:  # no gradient of a decay and a read of an empty state
            for name in [n for n in expected if expected[n].abs().max() < 1e-9]:
                largest = expected["dk"].abs().max()
                assert actual.pop(name).abs().max() <= TOLERANCE[torch.bfloat16] * largest, name
                del expected[name]
        errors.append(compare(actual, expected, tol=TOLERANCE[torch.bfloat16]))
    print("error " + ", ".join(f"{error:.1e}" for error in errors))


@on_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_on_gpu(untimed_kernels, variant):
    key, value, heads = SIZES["64"]
    check_compiled(
        variant, "inductor", "cuda", torch.bfloat16, key_dim=key, value_dim=value, heads=heads,
        cases=3 if variant == "gated_delta_rule" else 1,
    )  # fmt: skip


@on_gpu
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "delta_rule"])
def test_float32_on_gpu(untimed_kernels, variant):
    """Triton multiplies float32 in TF32: ten bits more than bfloat16 keeps, not all 24."""
    op = variant.split()[0]
    x, state = gpu_inputs(variant, BOUNDS[-1], "64", states=len(BOUNDS) - 1)
    expected = results(partial(naive, op), x, state, bounds=BOUNDS)
    actual = results(call(op), x, state, dtype=torch.float32, bounds=BOUNDS)
    print(f"error {compare(actual, expected, tol=5e-3):.1e}")


@on_gpu
def test_one_wait_per_batch(untimed_kernels, monkeypatch):
    """Layers that share a `cu_seqlens` share its chunk table, compiled and backward too."""
    from fla.ops.utils import index

    counted, build = [], index._segmented_arange
    monkeypatch.setattr(index, "_segmented_arange", lambda c: (counted.append(1), build(c))[1])
    torch._dynamo.reset()
    x, _ = gpu_inputs("gated_delta_rule", 72, "64")
    x = {n: t.to(torch.bfloat16 if n in LOW else torch.float32).requires_grad_()
         for n, t in x.items()}  # fmt: skip
    blocks = [Block("gated_delta_rule", x, "cuda", torch.bfloat16) for _ in range(3)]
    blocks = [torch.compile(block, fullgraph=True) for block in blocks]
    for _ in range(2):
        cu_seqlens = torch.tensor([0, 3, 72], dtype=torch.int32, device="cuda")
        counted.clear()
        o = x["v"]
        for block in blocks:
            o, _ = block({**x, "v": o}, None, cu_seqlens)
        o.float().sum().backward()
        assert len(counted) == 1
