"""What a stage holds in memory, part by part, from the shapes of its models alone.

Weights, gradients and optimizer state are those of real modules, objectives and optimizers without
storage (the meta device), so they are exact. What blocks keep for the backward is flops.kept_bytes
on a GPU; on a CPU it is counted in a run of each kind of block on tensors without storage. The
peak is either at the end of the forward, in the head, or at the end of the backward.
`planner.py` puts it together. Check: `pytest tests/test_planner.py`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from config import ModelConfig, StageConfig, TrainConfig
from distributed import World
from evaluate import eval_rows
from flops import kept_bytes, kept_parts
from model import Block, Transformer
from muon import STACK_ELEMENTS, STACK_SHARE
from objectives import AlignObjective, HeadObjective
from ops.kd_head import buffer_bytes, buffers_alive
from optimizer import OptimizerSet, param_role
from stage_plan import StagePlan
from trainer import amp_context, stage_optimizer

# What the runtime takes by itself. CPU: the RSS of train_kd.py with SmolLM2's tokenizer after its
# first forward, less the weights. CUDA: what nvidia-smi shows of a process that has multiplied,
# attended, compiled and stepped, beyond what PyTorch's allocator holds (H100, torch 2.11).
RUNTIME = {"cpu": 475 << 20, "mps": 475 << 20, "cuda": 701 << 20}
# On a CPU: what glibc's malloc keeps of freed blocks, as a share of the activations and held rows
# among which they lie: 0.3, 0.6, 0.7, 0.7 and 0.8 in five runs.
GAPS = 0.6
COPIES = "copies in the compute type"
WORK = "head, or a backward's own"


@dataclass(frozen=True)
class Machine:
    """What a run computes on."""

    world: World
    name: str  # "H100", or the kind of device
    dtype: torch.dtype  # in which it computes
    compiled: bool = False
    shards: int = 1  # ranks that a model is cut over (FSDP2); 1: every rank has whole models
    keep: bool = False  # what is gathered stays so until the backward

    @property
    def gpu(self) -> bool:
        return self.world.device.type == "cuda"


@dataclass
class Stage:
    """A stage on models without storage."""

    plan: StagePlan
    student: Transformer
    layers: list[int]  # converted
    objective: HeadObjective | AlignObjective
    optimizer: OptimizerSet

    def tensors(self) -> dict[str, Tensor]:
        """What its checkpoints hold, as trainer.save_step writes them."""
        saved = {f"model.{n}": p for n, p in self.objective.saved.items()}
        return saved | self.optimizer.state_tensors()


def on_meta(plan: StagePlan, student: Transformer, layers: list[int]) -> Stage:
    """The stage's own objective and optimizer; `student` knows what it trains."""
    alone = World(0, 1, torch.device("cpu"))
    if plan.name == "align":
        objective = AlignObjective(student, student, plan.stage, layers, alone)
    else:
        objective = HeadObjective(student, None, plan.stage, alone, layers)
    optimizer = stage_optimizer(plan, objective, alone)
    optimizer.init_state()
    return Stage(plan, student, layers, objective, optimizer)


def meta_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model without storage."""
    with torch.device("meta"):
        return Transformer(config).to(dtype)


# ---- weights, gradients, optimizer state


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def share(name: str, p: Tensor, shards: int) -> int:
    """Ranks that a parameter is cut over, as fsdp.shard does it."""
    return 1 if param_role(name, p) == "no_decay" else shards


def held(named: Iterable[tuple[str, Tensor]], shards: int = 1) -> int:
    """Bytes that one rank has of these parameters."""
    return sum(-(-size(p) // share(n, p, shards)) for n, p in named)


def optimizer_bytes(optimizer: OptimizerSet, shards: int = 1) -> int:
    """Bytes of the state that one rank has."""
    total = 0
    for part in optimizer.optimizers:
        for group in part.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                cut = share(name, p, shards)
                total += sum(-(-size(t) // cut) for t in part.state[p].values())
    return total


def muon_bytes(m: Machine, optimizer: OptimizerSet) -> int:
    """Newton-Schulz of the largest stack: it, its successor, and two products of at most its
    size."""
    if optimizer.muon is None:
        return 0
    shapes: dict[torch.Size, int] = defaultdict(int)
    for group in optimizer.muon.param_groups:
        for p in group["params"]:
            shapes[p.shape] += p.numel()
    limit = max(STACK_ELEMENTS, sum(shapes.values()) // STACK_SHARE)
    most = max(min(n, max(limit, shape.numel())) for shape, n in shapes.items())
    return 4 * most * (2 if m.gpu else 4)


def casts(m: Machine, model: Transformer, layers: Iterable[int], alone: bool = False) -> int:
    """Copies in the compute type of the float32 matrices of blocks (alone: of their attention),
    which autocast or a compiled graph keeps from the forward to the backward. FSDP2 gathers them
    in that type."""
    if m.shards > 1:
        return 0
    total = 0
    for i in layers:
        block = model.layers[i].attention if alone else model.layers[i]
        weights = (x.weight for x in block.modules() if isinstance(x, nn.Linear))
        total += sum(p.numel() for p in weights if p.dtype != m.dtype)
    return total * m.dtype.itemsize


def head_copy(m: Machine, model: Transformer) -> int:
    """The same of the head."""
    weight = model.head_weight
    return 0 if m.shards > 1 or weight.dtype == m.dtype else weight.numel() * m.dtype.itemsize


def gathered_bytes(m: Machine, models: list[Transformer]) -> int:
    """FSDP2: two blocks of each model (the next is fetched while one computes), or all that are
    kept, embedding and head, in the compute type; and a block's gradient, in it and in float32."""
    total = block = 0
    for model in models:
        blocks = [sum(p.numel() for p in b.parameters()) for b in model.layers]
        block = max(blocks)
        ends = model.embed_tokens.weight.numel() * (1 if model.lm_head is None else 2)
        total += ((sum(blocks) if m.keep else 2 * block) + ends) * m.dtype.itemsize
    return total + block * (m.dtype.itemsize + 4)


# ---- activations


def without_storage(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a block on fake CPU tensors. Linears have the compute type: the copies that
    autocast makes of their weights are counted by `casts`."""
    block = copy.deepcopy(block, {id(p): p for p in block.parameters()})
    for module in block.modules():
        for name, p in module._parameters.items():
            if p is not None:
                kind = dtype if isinstance(module, nn.Linear) else p.dtype
                new = torch.empty(p.shape, dtype=kind, device="cpu")
                module._parameters[name] = nn.Parameter(new, requires_grad=p.requires_grad)
    return block


def counted(
    config: ModelConfig, block: Block, rows: int, length: int, dtype: torch.dtype,
    input_grad: bool, alone: bool = False,
) -> int:  # fmt: skip
    """Bytes that autograd keeps of one block (alone: of its attention), eager, on [rows, length]
    tokens. Counted in a forward without storage."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t  # held, so that no other storage gets its number
        return t

    one = dataclasses.replace(config, num_hidden_layers=1, layer_types=None, mixer=[])
    with FakeTensorMode(), torch.device("cpu"):
        block = without_storage(block, dtype)
        owned = {p.untyped_storage()._cdata for p in block.parameters()}
        x = torch.empty(rows, length, config.hidden_size, dtype=dtype)
        x.requires_grad_(input_grad)
        seq = Transformer(one).seq_info(length, dtype=dtype)
        with amp_context(torch.device("cpu"), dtype)(), saved_tensors_hooks(pack, lambda t: t):
            (block.attention if alone else block).train()(x, seq)
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in owned)


def first_trained(model: Transformer) -> int:
    """The first block that a backward reaches; the number of blocks if it reaches none."""
    if model.embed_tokens.weight.requires_grad:
        return 0
    some = (i for i, b in enumerate(model.layers) if any(p.requires_grad for p in b.parameters()))
    return next(some, len(model.layers))


def eager_blocks(
    m: Machine, model: Transformer, layers: Iterable[int], rows: int, length: int, alone: bool
) -> list[int]:
    """`counted` of these layers; each kind of them is run once."""
    known: dict[tuple, int] = {}
    first, found = first_trained(model), []
    for i in layers:
        block = model.layers[i]
        shapes = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())
        grad = not alone and (i > first or model.embed_tokens.weight.requires_grad)
        key = (shapes, grad)
        if key not in known:
            known[key] = counted(model.config, block, rows, length, m.dtype, grad, alone)
        found.append(known[key])
    return found


def activations(
    m: Machine, model: Transformer, rows: int, length: int, recompute: str
) -> tuple[int, int]:
    """(what the blocks keep for the backward, what one block's backward takes beside that)."""
    tokens, first, config = rows * length, first_trained(model), model.config
    layers = range(first, len(model.layers))
    if not layers:
        return 0, 0
    kept = kept_bytes(config, recompute, first)
    if not m.gpu:
        blocks = eager_blocks(m, model, layers, rows, length, False)
        return int(sum(blocks) * kept / kept_bytes(config, "none", first)), max(blocks)
    # SwiGLU's input and gradient are there twice over, of a mixer each input has a gradient.
    parts = [kept_parts(config, i) for i in layers]
    wide = max(max(2 * wide, attention) for _, attention, _, wide in parts)
    again = 0 if recompute == "none" else max(map(sum, parts))
    return tokens * kept, 2 * tokens * (wide + again + 2 * config.hidden_size)


def align_activations(
    m: Machine, model: Transformer, layers: list[int], rows: int, length: int
) -> tuple[int, int]:
    """As `activations`, of the largest mixer: one is trained at a time."""
    if not m.gpu:
        most = max(eager_blocks(m, model, layers, rows, length, True))
        return most, most  # as many gradients
    parts = [kept_parts(model.config, i) for i in layers]
    most, work = (max(p[1] + p[2] for p in parts), max(p[1] for p in parts))
    return 2 * rows * length * most, 2 * rows * length * work


def head_bytes(
    m: Machine, tokens: int, student: ModelConfig, teacher: ModelConfig | None,
    stage: StageConfig | None = None,
) -> int:  # fmt: skip
    """Logits of a chunk, and hidden states of all tokens with their gradient. stage None: an
    evaluation."""
    vocab = min(c.vocab_size for c in (student, teacher) if c is not None)
    triton = m.gpu and (stage is None or not 0 < stage.top_k < vocab)
    item = m.dtype.itemsize if triton and stage is not None else 4
    count = 1 if teacher is None else 2
    if not triton:
        s = StageConfig() if stage is None else stage
        count = buffers_alive(s.loss, teacher is not None, s.ce_weight != 0, s.temperature != 1)
    kind = "triton" if triton else m.world.device.type
    wide = student.hidden_size * (item + m.dtype.itemsize)
    wide += teacher.hidden_size * m.dtype.itemsize if teacher else 0
    return count * buffer_bytes(tokens, vocab, kind, item) + tokens * wide


# ---- whole moments


def stage_memory(
    cfg: TrainConfig, m: Machine, stage: Stage, teacher: ModelConfig | None
) -> dict[str, int]:
    """Part -> bytes that a stage holds at its peak, beside the models' weights."""
    plan, student, s = stage.plan, stage.student, stage.plan.stage
    tokens = plan.micro_batch * s.seq_len
    micro_batches = plan.rows // (plan.micro_batch * m.world.size)
    gradients = held(stage.objective.params.items(), m.shards)
    parts = {"optimizer state": optimizer_bytes(stage.optimizer, m.shards)}
    all_there = plan.name == "align" or micro_batches > 1 or m.world.size > 1
    if plan.name == "align":
        kept, work = align_activations(m, student, stage.layers, plan.micro_batch, s.seq_len)
        # The teacher's residual stream, the layer's input and output, their difference in float32.
        kept += tokens * student.config.hidden_size * (3 * m.dtype.itemsize + 4)
        some = stage.layers[:1] if m.compiled else stage.layers
        parts[COPIES] = casts(m, student, some, alone=True)
        if s.unique_tokens:
            most = min(s.unique_tokens, plan.steps * s.batch_tokens // m.world.size)
            parts["held rows"] = most * len(stage.layers) * 2 * student.config.hidden_size * 2
        after = 0
    else:
        recompute = cfg.activation_checkpointing
        kept, after = activations(m, student, plan.micro_batch, s.seq_len, recompute)
        parts[COPIES] = casts(m, student, range(first_trained(student), len(student.layers)))
        guide = teacher if s.kd_weight > 0 else None
        selected = max(1, int(tokens * s.select_tokens))
        work = head_bytes(m, selected, student.config, guide, s) + head_copy(m, student)
        weight = student.head_weight
        in_place = m.gpu and m.world.size == 1 and micro_batches > 1  # dW goes into its gradient
        if weight.requires_grad and not in_place:
            work += 4 * weight.numel()
        work = max(work, after)
        if m.world.size > 1 and m.shards == 1 and micro_batches > 1:  # DDP's, beside .grad
            parts["messages of gradients"] = gradients
    if cfg.async_save and not m.gpu:
        parts["copy for --async_save"] = sum(map(size, stage.tensors().values())) // m.world.size
    if not m.gpu:
        parts["malloc's gaps"] = int(GAPS * (kept + parts.get("held rows", 0)))
    before = {"gradients": gradients if all_there else 0, "activations": kept, WORK: work}
    after = max(after, muon_bytes(m, stage.optimizer))
    after = {"gradients": gradients, "activations": 0, WORK: after}
    return parts | max(before, after, key=lambda some: sum(some.values()))


def evaluation_memory(
    cfg: TrainConfig, m: Machine, student: Transformer, teacher: ModelConfig | None, seq_len: int,
    first: int,
) -> dict[str, int]:  # fmt: skip
    """As `stage_memory`, of an evaluation, which is never compiled. first: blocks that run once for
    teacher and student."""
    rows = eval_rows(seq_len, m.world.device)
    parts = {COPIES: casts(m, student, range(len(student.layers)))}
    if teacher is not None and not m.gpu:  # all of the teacher's hidden states are kept
        tokens = max(1, cfg.eval_tokens // seq_len // m.world.size) * seq_len
        width = teacher.hidden_size * m.dtype.itemsize
        parts["held rows"] = tokens * width * (2 if first else 1)
    return parts | {
        WORK: head_bytes(m, rows * seq_len, student.config, teacher) + head_copy(m, student)
    }
