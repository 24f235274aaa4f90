"""FSDP2: every block's matrices cut over the ranks, gathered while that block computes.

    torchrun --nproc_per_node 8 train_kd.py --parallel fsdp --layers 3:1

What is cut are the matrices of a block, and those of the embedding and the head, along their rows.
Everything that `param_role` calls no_decay (norms, biases, short convolutions, `A_log`, `dt_bias`,
...) stays whole and in float32 on every rank, outside FSDP2, whose mixed precision would cast it;
its gradients are summed in one message a step. Matrices are cast to the compute type before they
are gathered; after every micro-batch their gradients travel as the backward made them and are
summed over ranks in float32, so that no rank ever holds a whole gradient.
Check: `pytest tests/test_fsdp.py`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from config import DistillConfig, ModelConfig, TrainConfig, UserError
from distributed import World, sum_gradients
from hf import stored_rows
from layer_lists import auto_share
from lora import LoRALinear, lora_parameters
from model import Transformer, is_fsdp
from muon_shards import cut_of, is_sharded, local
from optimizer import param_role

# Of the memory of a GPU, what ddp's weights, gradients and optimizer state may take under `auto`.
DDP_SHARE = 0.5
# And what all blocks of teacher and student may take, gathered, to stay so under `auto`: gathering
# a block costs the host the same time whatever its size.
KEPT_SHARE = 0.1


def wants_fsdp(cfg: TrainConfig, world: World, config: ModelConfig) -> bool:
    """--parallel: auto = fsdp where a student of this shape would take more than DDP_SHARE of a
    GPU's memory under ddp. UserError for what does not go with fsdp."""
    if cfg.shard_ranks and (world.size % cfg.shard_ranks or cfg.parallel != "fsdp"):
        raise UserError(
            f"--shard_ranks: {cfg.shard_ranks} found with --parallel {cfg.parallel} on "
            f"{world.size} ranks, fsdp and a divisor of the ranks expected"
        )
    reason = conflict(cfg)
    if cfg.parallel == "fsdp" and reason:
        raise UserError(f"--parallel: fsdp found with {reason}; ddp expected")
    if world.size == 1 or cfg.parallel != "auto":
        return world.size > 1 and cfg.parallel == "fsdp"
    if world.device.type != "cuda" or reason:
        return False
    with torch.device("meta"):
        params = Transformer(config).num_params()
    needed = 16 * params  # float32 weights, gradients, two states of AdamW
    return needed > DDP_SHARE * world.gpu_memory


def keeps_gathered(cfg: TrainConfig, world: World, configs: Iterable[ModelConfig]) -> bool:
    """--reshard_after_forward never, or auto with models of these shapes that are small enough."""
    if cfg.reshard_after_forward != "auto":
        return cfg.reshard_after_forward == "never"
    if world.device.type != "cuda":
        return False
    with torch.device("meta"):
        params = sum(Transformer(config).num_params() for config in configs)
    return 2 * params <= KEPT_SHARE * world.gpu_memory


def parallel_flags(fsdp: bool, keep: bool) -> dict[str, str]:
    """`wants_fsdp` and `keeps_gathered` as the flags that would say so."""
    found = {"--parallel": "fsdp" if fsdp else "ddp"}
    return found | {"--reshard_after_forward": "never" if keep else "always"} if fsdp else found


def conflict(cfg: TrainConfig) -> str:
    """The first setting that needs whole models on every rank."""
    if not isinstance(cfg, DistillConfig):
        return ""
    found = {
        f"--layers {cfg.layers}, which exchanges layers": (
            auto_share(cfg.layers) is not None and not cfg.keep_layers
        ),
        "--align_unique_tokens, which leaves the teacher out on some ranks": any(
            getattr(cfg, name).unique_tokens for name in cfg.stage_names()
        ),
        "--align_maps_weight": cfg.align.maps_weight > 0 and "align" in cfg.stage_names(),
        "--teacher_float8": cfg.teacher_float8,
        "--trunk_dtype bfloat16": cfg.trunk_dtype != "float32",
    }
    return next((reason for reason, here in found.items() if here), "")


def ranks_line(cfg: TrainConfig, world: World, fsdp: bool) -> str:
    """How many ranks of what, and what each of them holds."""
    line = f"{world.size} x {world.device.type}"
    if world.size == 1:
        return line
    return f"{line} (fsdp over {cfg.shard_ranks or world.size})" if fsdp else f"{line} (ddp)"


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that every rank has whole."""
    return {p for name, p in model.named_parameters() if param_role(name, p) == "no_decay"}


def shard(
    model: nn.Module, world: World, *, dtype: torch.dtype, shard_ranks: int = 0,
    keep: bool = False, amp, folder: str | Path = "",
) -> nn.Module:  # fmt: skip
    """Cut the model's matrices over the ranks, in place: of all ranks, or of groups of shard_ranks,
    which then hold copies of one another. dtype: what they are computed in. keep: blocks stay
    gathered until the backward, those of a model without one until `reshard`. Every rank must have
    the same values, or, on the meta device, gets them from `folder`. Compile blocks before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size = shard_ranks or world.size
    shape, names = (world.size,), ("shard",)
    if size < world.size:
        shape, names = (world.size // size, size), ("replicate", "shard")
    how = {
        "mesh": init_device_mesh(world.device.type, shape, mesh_dim_names=names),
        "ignored_params": kept_whole(model),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    for block in model.layers:
        fully_shard(block, **how, reshard_after_forward=not keep)
    fully_shard(model, **how)
    for module in (model, *model.layers):
        module.set_custom_reduce_scatter(RowsToRanks(dtype))
    if next(model.parameters()).is_meta:
        read_pieces(model, folder, world)
    # Which module is the outermost one is settled by the first forward; align calls blocks alone.
    with torch.no_grad(), amp(), torch.compiler.set_stance("force_eager"):
        model(torch.zeros(1, 1, dtype=torch.int64, device=world.device))
    reshard(model)
    return model


def reduce_rows(rows: Tensor, out: Tensor, group: dist.ProcessGroup, *, mean: bool) -> Tensor:
    """Rank r's `out` [N] float32 becomes the sum over ranks, or their mean, of row r of `rows`
    [ranks, N]. They travel in their own type: of bfloat16 half the bytes of a reduce-scatter in
    float32, for the same sums."""
    theirs = torch.empty_like(rows)
    dist.all_to_all_single(theirs, rows, group=group)
    return (torch.mean if mean else torch.sum)(theirs, 0, dtype=out.dtype, out=out)


class RowsToRanks:
    """`reduce_rows` as FSDP2's reduce-scatter, of gradients in `dtype`: what the interface
    `torch.distributed.fsdp._fully_shard._fsdp_api.ReduceScatter` asks for."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.asked = dtype, 0

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP2 asks for what is sent, then for what is received, both in its reduce_dtype."""
        self.asked += 1
        return torch.empty(size, dtype=self.dtype if self.asked % 2 else dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False) -> None:
        assert (input_tensor.dtype, output_tensor.dtype) == (self.dtype, torch.float32)
        rows = input_tensor.view(group.size(), -1)
        reduce_rows(rows, output_tensor, group, mean=op == dist.ReduceOp.AVG)


@torch.no_grad()
def read_pieces(model: nn.Module, folder: str | Path, world: World) -> None:
    """Give a cut model, which is on the meta device, the weights of a folder; every rank reads its
    own rows alone. Adapters have their values and come to the rank's device."""
    from torch.distributed.tensor import DTensor

    state = {}
    with stored_rows(folder, model.config) as stored:
        for name, p in model.state_dict().items():
            if not p.is_meta:
                continue
            (rows, *_), read = stored[name]
            if not is_sharded(p):
                state[name] = read(0, rows).to(world.device, p.dtype)
                continue
            cut = cut_of(p)
            first = sum(cut.rows(rows)[: cut.rank])
            piece = read(first, first + cut.rows(rows)[cut.rank]).to(world.device, p.dtype)
            how = {"run_check": False, "shape": p.shape, "stride": p.stride()}
            state[name] = DTensor.from_local(piece, p.device_mesh, p.placements, **how)
    model.load_state_dict(state, strict=False, assign=True)
    for p in lora_parameters(model).values():
        p.data = p.data.to(world.device)


def reshard(model: nn.Module) -> None:
    """Give up what stays gathered after a forward without gradients, at least the embedding and
    the head: until then the model's parameters are not those that an optimizer has."""
    if is_fsdp(model):
        for module in (model, *model.layers):
            module.reshard()


@contextlib.contextmanager
def whole_part(part: nn.Module):
    """Within it the matrices of a part of a cut block are whole and in the compute type, for a
    forward and backward of the part by itself; then their gradients are summed over ranks in
    float32 and added to those of the pieces. What every rank has whole is left alone.

    FSDP2 would gather all of the block, and after every backward look at all blocks and wait for
    the sum. In align each layer has a backward of its own: with 28 that was a third of the host's
    time."""
    places = [(m, leaf) for m in part.modules() for leaf, p in m._parameters.items()
              if p is not None and is_sharded(p)]  # fmt: skip
    pieces = [m._parameters[leaf] for m, leaf in places]
    if not pieces:
        yield
        return
    device = pieces[0].device.type
    dtype = pieces[0].dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    wholes = [nn.Parameter(w, p.requires_grad)
              for w, p in zip(gather(pieces, dtype), pieces, strict=True)]  # fmt: skip
    for (module, leaf), p in zip(places, wholes, strict=True):
        module._parameters[leaf] = p
    try:
        yield
    finally:
        for (module, leaf), p in zip(places, pieces, strict=True):
            module._parameters[leaf] = p
    trained = [i for i, p in enumerate(wholes) if p.grad is not None]
    if trained:
        add_pieces([pieces[i] for i in trained], [wholes[i].grad for i in trained])


def _even(matrix: Tensor, ranks: int) -> Tensor:
    """With rows of zeros behind it, so that all ranks have equally many."""
    missing = -len(matrix) % ranks
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix


@torch.no_grad()
def gather(pieces: list[nn.Parameter], dtype: torch.dtype) -> list[Tensor]:
    """The whole matrices [R, C] of these pieces in `dtype`, in one message."""
    cut, mine = cut_of(pieces[0]), []
    for p in pieces:
        short = -(-len(p) // cut.size) - len(local(p))  # rows that only other ranks have
        mine.append(F.pad(local(p), (0, 0, 0, short)) if short else local(p))
    flat = torch.cat([x.flatten().to(dtype) for x in mine])
    every = flat.new_empty(cut.size * len(flat))
    # Its name from torch 2.13 on, where the old one warns.
    new = getattr(dist, "all_gather_single", None)
    (new or dist.all_gather_into_tensor)(every, flat, group=cut.group)
    parts = every.view(cut.size, -1).split([x.numel() for x in mine], 1)
    return [x.reshape(-1, p.shape[1])[: len(p)] for x, p in zip(parts, pieces, strict=True)]


@torch.no_grad()
def add_pieces(pieces: list[nn.Parameter], grads: list[Tensor]) -> None:
    """Sum gradients [R, C] of whole matrices over ranks in one message; each rank adds its rows to
    the gradients of its pieces."""
    from torch.distributed.tensor import DTensor

    cut, mesh = cut_of(pieces[0]), pieces[0].device_mesh
    even = [_even(g, cut.size).reshape(cut.size, -1) for g in grads]
    rows = torch.cat(even, 1)  # what each rank will have of all matrices
    mine = rows.new_empty(rows.shape[1], dtype=torch.float32)
    reduce_rows(rows, mine, cut.group, mean=False)
    for dim in range(mesh.ndim):  # groups of shard_ranks are copies of one another
        if mesh.get_group(dim) != cut.group:
            dist.all_reduce(mine, group=mesh.get_group(dim))
    parts = mine.split([g.shape[1] for g in even])
    for p, g, part in zip(pieces, grads, parts, strict=True):
        here = part.view(-1, g.shape[1])[: cut.rows(len(g))[cut.rank]]
        if p.grad is not None:
            local(p.grad).add_(here)
            continue
        how = {"run_check": False, "shape": p.shape, "stride": p.stride()}
        p.grad = DTensor.from_local(here, mesh, p.placements, **how)


def average_whole_gradients(params: Iterable[nn.Parameter], world: World) -> None:
    """The mean over ranks of gradients of what each has whole; FSDP2 has taken the others'."""
    whole = [p for p in params if not is_sharded(p) and p.grad is not None]
    if whole:
        torch._foreach_div_([p.grad for p in whole], world.size)
        sum_gradients(whole, world)


@torch.no_grad()
def gathered(model: nn.Module, world: World) -> nn.Module | None:
    """The whole model, adapters merged, on rank 0's CPU; None elsewhere. Collective."""
    reshard(model)
    whole = None
    if world.is_main:
        with torch.device("meta"):
            whole = Transformer(copy.deepcopy(model.config))
        whole.to_empty(device="cpu")
    into: dict[str, Tensor] = dict(whole.named_parameters()) if whole is not None else {}
    for name, p in model.named_parameters():
        full = p.full_tensor() if is_sharded(p) else p
        if name in into:
            into[name].data = full.detach().to("cpu", copy=True)
    for name, module in model.named_modules() if whole is not None else ():
        if isinstance(module, LoRALinear):
            weight = into[f"{name}.weight"]
            weight.data = weight.float() + module.delta().cpu()
    return whole
