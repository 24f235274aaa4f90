"""Softmax attention of packed documents by cuDNN, through the cudnn-frontend package.

On Hopper cuDNN's kernels are about 1.7 x as fast as FlashAttention 2, which is what PyTorch's
varlen_attn runs. PyTorch reaches them for unpacked rows only: for packed ones it plans anew at
every call. Here a plan is kept for each combination of shapes; the loader makes few of them.

Check: `pytest -m gpu tests/ops/test_cudnn_varlen.py`.
Shapes: T tokens of all documents, N documents, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor


@functools.cache
def has_cudnn_frontend() -> bool:
    """Whether the package (nvidia-cudnn-frontend) is installed."""
    return importlib.util.find_spec("cudnn") is not None


@functools.cache
def _handle(device: int) -> int:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@dataclass
class _Plan:
    """A built graph, its tensors by name, the bytes it needs, and what bounds are multiplied by
    to give the offset of a document in each ragged tensor: [names, 1] int32 on the device."""

    graph: object
    tensors: dict
    workspace: int
    ragged: list[str]
    steps: Tensor

    def run(self, bounds: Tensor, given: dict[str, Tensor]) -> None:
        """Execute on the current stream. bounds [N + 1] int32."""
        import cudnn

        device = bounds.device
        handle = _handle(device.index)
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        offsets = self.steps * bounds  # [names, N + 1]
        lengths = bounds.diff()
        pack = {self.tensors[name]: t for name, t in given.items()}
        pack |= {
            self.tensors[f"{name} offsets"]: row
            for name, row in zip(self.ragged, offsets, strict=True)
        }
        pack |= {self.tensors[name]: lengths for name in ("query lengths", "key lengths")}
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        self.graph.execute(pack, workspace, handle=handle)


@functools.lru_cache(maxsize=128)
def _plan(
    backward: bool, docs: int, longest: int, total: int, window: int, dtype: torch.dtype,
    layouts: tuple[tuple[int, int, int, int], ...], device: int,
) -> _Plan:  # fmt: skip
    """layouts: (heads, size, strides of a token and of a head) of q, k, v."""
    import cudnn

    kind = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[dtype]
    single = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=single, compute_data_type=single,
        handle=_handle(device),
    )  # fmt: skip
    heads, size = layouts[0][:2]
    whole = (heads, size, heads * size, size)  # of a contiguous [T, H, D]
    shapes = dict(zip("qkv", layouts, strict=True)) | {"o": whole, "stats": (heads, 1, heads, 1)}
    if backward:
        shapes["do"] = whole
        shapes |= {f"d{name}": shapes[name] for name in "qkv"}
    tensors, steps = {}, []

    def small(name: str, count: int):
        return graph.tensor(
            name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1],
            data_type=cudnn.data_type.INT32,
        )  # fmt: skip

    def geometry(name: str) -> tuple[list[int], list[int]]:
        heads, size, step, stride = shapes[name]
        return [docs, heads, longest, size], [longest * step, stride, step, 1]

    for name in shapes:
        tensors[f"{name} offsets"] = small(f"{name} offsets", docs + 1)
        steps.append([shapes[name][2]])
    for name in ("query lengths", "key lengths"):
        tensors[name] = small(name, docs)
    outputs = [n for n in shapes if n in (("dq", "dk", "dv") if backward else ("o", "stats"))]
    for name in shapes:
        if name not in outputs:
            dim, stride = geometry(name)
            tensors[name] = graph.tensor(
                name=name, dim=dim, stride=stride, data_type=single if name == "stats" else kind,
                ragged_offset=tensors[f"{name} offsets"],
            )  # fmt: skip
    options = {
        "attn_scale": size**-0.5, "use_padding_mask": True, "seq_len_q": tensors["query lengths"],
        "seq_len_kv": tensors["key lengths"], "diagonal_band_right_bound": 0,
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
    }  # fmt: skip
    if window:
        options["diagonal_band_left_bound"] = window
    args = {name: tensors[name] for name in "qkv"}
    if backward:
        args |= {"o": tensors["o"], "dO": tensors["do"], "stats": tensors["stats"]}
        made = graph.sdpa_backward(
            **args, **options, max_total_seq_len_q=total, max_total_seq_len_kv=total
        )
    else:
        made = graph.sdpa(**args, **options, generate_stats=True)
    for name, tensor in zip(outputs, made, strict=True):
        dim, stride = geometry(name)
        tensor.set_output(True).set_dim(dim).set_stride(stride)
        tensor.set_data_type(single if name == "stats" else kind)
        tensor.set_ragged_offset(tensors[f"{name} offsets"])
        tensors[name] = tensor
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    step = torch.tensor(steps, dtype=torch.int32, device=f"cuda:{device}")
    return _Plan(graph, tensors, graph.get_workspace_size(), list(shapes), step)


def _planned(
    backward: bool, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int
):
    layouts = tuple((*t.shape[1:], t.stride(0), t.stride(1)) for t in (q, k, v))
    return _plan(
        backward, len(bounds) - 1, longest, len(q), window, q.dtype, layouts, q.device.index
    )


def _ready(t: Tensor) -> Tensor:
    """With contiguous heads, in places that vector loads can start from."""
    aligned = t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in t.stride()[:2])
    return t if t.stride(2) == 1 and aligned else t.contiguous()


@torch.library.custom_op("retort::cudnn_varlen", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int
) -> tuple[Tensor, Tensor]:
    q, k, v = _ready(q), _ready(k), _ready(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stats = torch.empty(*q.shape[:2], 1, dtype=torch.float32, device=q.device)
    plan = _planned(False, q, k, v, bounds, longest, window)
    plan.run(bounds, {"q": q, "k": k, "v": v, "o": out, "stats": stats})
    return out, stats


@_forward.register_fake
def _(q, k, v, bounds, longest, window):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        *q.shape[:2], 1, dtype=torch.float32
    )


@torch.library.custom_op("retort::cudnn_varlen_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, bounds: Tensor,
    longest: int, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # A gradient has the layout of its tensor, whatever the graph says, and ours are contiguous.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    grads = [torch.empty_like(t) for t in (q, k, v)]
    plan = _planned(True, q, k, v, bounds, longest, window)
    given = {"q": q, "k": k, "v": v, "o": out, "do": grad.contiguous(), "stats": stats}
    plan.run(bounds, given | dict(zip(("dq", "dk", "dv"), grads, strict=True)))
    return tuple(grads)


@_backward.register_fake
def _(grad, q, k, v, out, stats, bounds, longest, window):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup(ctx, inputs, output):
    q, k, v, bounds, ctx.longest, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)


def _autograd(ctx, grad, _):
    q, k, v, out, stats, bounds = ctx.saved_tensors
    grads = _backward(grad, q, k, v, out, stats, bounds, ctx.longest, ctx.window)
    return *grads, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def cudnn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: int = 0
) -> Tensor:
    """Causal attention of packed documents to themselves, with scale D^-0.5, in bfloat16 or float16
    on CUDA.

    q [T, H, D], k and v [T, G, D] -> [T, H, D]; cu_seqlens [N + 1] int32 from 0 to T, where
    documents may be empty; longest: no document has more tokens; window as in
    `layers.causal_mask`, 0 = full.
    """
    return _forward(q, k, v, cu_seqlens, longest, window)[0]
