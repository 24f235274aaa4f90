"""Parameter roles, Muon + AdamW behind one object, gradient clipping, learning-rate schedules.

    pytest tests/test_optimizer.py

Learning rates: Muon's unit depends on `adjust_lr`. "match_rms_adamw" (the default) gives the update
the RMS of a typical AdamW update, so that AdamW's lr and weight decay carry over; "original" keeps
the orthogonal update's own scale, where 0.02 is usual.

Shapes: N matrices in a stack, R rows, C columns with R <= C (tall matrices are transposed).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import UserError

# Modules whose 2-D weight is no hidden matrix: rows are tokens, or heads of a scalar gate.
ADAMW_MODULES = frozenset({"embed_tokens", "lm_head", "a_proj", "b_proj"})

EPS = 1e-7  # floor of the norm that Newton-Schulz divides by, as in torch.optim.Muon

# K. Jordan, https://kellerjordan.github.io/posts/muon/ : one polynomial for every iteration;
# singular values end up in about [0.7, 1.2] and do not converge further.
_QUINTIC = [(3.4445, -4.7750, 2.0315)]

# Amsel et al. 2025, arXiv 2505.16932, Algorithm 1: each polynomial is minimax-optimal for what the
# previous ones leave of singular values in [1e-3, 1]; from the eighth on it is Newton-Schulz.
_POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
# The paper's safety factor (its section 4.4): each polynomial but the last sees x / 1.01, so that a
# singular value rounded above 1 in bf16 does not leave the interval and blow up; the first division
# by the Frobenius norm gets the same slack.
_SAFETY = 1.01

# name -> (per-iteration (a, b, c), the last one repeating; slack of the first normalisation)
COEFFICIENTS: dict[str, tuple[list[tuple[float, float, float]], float]] = {
    "quintic": (_QUINTIC, 1.0),
    "polar_express": (
        [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]]
        + _POLAR_EXPRESS[-1:],
        _SAFETY,
    ),
}

# name -> factor on lr for a [rows, cols] matrix; the semantics of torch.optim.Muon's adjust_lr_fn
ADJUST_LR: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
}

# Elements of one Newton-Schulz stack (a larger matrix goes alone): enough small matrices to fill a
# GPU, yet few enough that the stacks of a small model still spread evenly over 8 ranks.
STACK_ELEMENTS = 2**24


def _choose(table: dict, name: str, what: str):
    if name not in table:
        raise UserError(f"{what}={name!r} is unknown; choose one of {', '.join(table)}")
    return table[name]


# Parameter roles and groups


def param_role(name: str, param: Tensor) -> str:
    """Which optimizer a parameter belongs to: "muon", "adamw" or "no_decay" (AdamW, decay 0).

    - muon: hidden 2-D weight matrices;
    - adamw: embeddings, head and the small gate projections (`ADAMW_MODULES`);
    - no_decay: whatever is no `weight` of a module (biases, `A_log`, `dt_bias`, sinks, ...), norms,
      short convolutions, and any weight that is not 2-D.
    """
    *modules, leaf = name.split(".")
    if leaf != "weight" or param.ndim != 2 or any("norm" in m or "conv" in m for m in modules):
        return "no_decay"
    return "muon" if ADAMW_MODULES.isdisjoint(modules) else "adamw"


def build_groups(
    named_params: Iterable[tuple[str, Tensor]],
    *,
    lr: float,
    mixer_lr: float | None = None,
    mixer_params: Iterable[str] = frozenset(),
    embed_lr: float | None = None,
    muon_lr: float | None = None,
    weight_decay: float = 0.0,
    use_muon: bool = False,
) -> list[dict]:
    """Sort the trainable parameters into groups with keys params, names, role, lr, weight_decay.

    Every parameter with `requires_grad` is in exactly one group; a tied weight counts once, under
    its first name. `mixer_params` are names. The learning rate is the first of these that applies
    and is not None: `mixer_lr` (linear mixers), `embed_lr` (`embed_tokens`), `muon_lr` (role muon),
    `lr`. With `use_muon=False` the role muon becomes adamw.
    """
    mixer_params = frozenset(mixer_params)
    first_name: dict[int, str] = {}
    seen_names = set()
    groups: dict[tuple, dict] = {}
    for name, param in named_params:
        seen_names.add(name)
        if not param.requires_grad or id(param) in first_name:
            continue
        first_name[id(param)] = name
        role = param_role(name, param)
        if role == "muon" and not use_muon:
            role = "adamw"
        candidates = [
            mixer_lr if name in mixer_params else None,
            embed_lr if "embed_tokens" in name.split(".") else None,
            muon_lr if role == "muon" else None,
            lr,
        ]
        group_lr = next(value for value in candidates if value is not None)
        decay = 0.0 if role == "no_decay" else weight_decay
        empty = {"params": [], "names": [], "role": role, "lr": group_lr, "weight_decay": decay}
        group = groups.setdefault((role, group_lr), empty)
        group["params"].append(param)
        group["names"].append(name)

    # A misspelt mixer name would train that mixer at the trunk's much smaller rate, unnoticed.
    assert mixer_params <= seen_names, f"no such parameters: {sorted(mixer_params - seen_names)}"
    ids = [id(p) for group in groups.values() for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == set(first_name)
    return list(groups.values())


# Newton-Schulz


def _polynomials(coefficients: str, steps: int) -> tuple[list[tuple[float, float, float]], float]:
    table, slack = _choose(COEFFICIENTS, coefficients, "coefficients")
    return [table[min(i, len(table) - 1)] for i in range(steps)], slack


def newton_schulz_ref(
    matrix: Tensor, *, coefficients: str = "polar_express", steps: int = 5, eps: float = EPS
) -> Tensor:
    """The iteration on one matrix of either orientation, in its own dtype, as one would write it.

    X <- G / ||G||_F, then `steps` times X <- a X + b (X X^T) X + c (X X^T)^2 X: an odd polynomial
    on each singular value that drives all of them towards 1, so that X -> U V^T for G = U S V^T.
    """
    polynomials, slack = _polynomials(coefficients, steps)
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() * slack).clamp(min=eps)
    for a, b, c in polynomials:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def newton_schulz(
    stack: Tensor, *, coefficients: str = "polar_express", steps: int = 5, eps: float = EPS
) -> Tensor:
    """`newton_schulz_ref` on every matrix of stack [N, R, C], R <= C, computed in its dtype."""
    assert stack.ndim == 3 and stack.shape[1] <= stack.shape[2], stack.shape
    polynomials, slack = _polynomials(coefficients, steps)
    norm_dtype = torch.promote_types(stack.dtype, torch.float32)
    norm = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True, dtype=norm_dtype)
    x = (stack / (norm * slack).clamp(min=eps)).to(stack.dtype)
    for a, b, c in polynomials:
        gram = x @ x.mT  # [N, R, R]
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b A + c A^2
        x = torch.baddbmm(x, poly, x, beta=a)  # [N, R, C]
    return x


# Muon


@dataclass
class _Matrix:
    """One parameter of this step, with what is needed to compute and to apply its update."""

    param: Tensor
    grad: Tensor
    momentum_buffer: Tensor
    momentum: float
    shrink: float  # the weight is multiplied by this: decoupled weight decay
    scale: float  # lr times the adjustment for the shape

    @property
    def tall(self) -> bool:
        return self.param.shape[0] > self.param.shape[1]


def _make_stacks(matrices: list[_Matrix]) -> list[list[_Matrix]]:
    """Same shape up to transposition, at most STACK_ELEMENTS each, filled evenly.

    Stacks do not depend on the number of ranks: whole stacks are dealt out, so the very same
    kernels run on the very same shapes and the update is bitwise that of a single process.
    """
    by_shape = defaultdict(list)
    for matrix in matrices:
        key = (min(matrix.param.shape), max(matrix.param.shape))
        by_shape[(*key, matrix.param.device, matrix.momentum)].append(matrix)
    stacks = []
    for (rows, cols, _, _), same in by_shape.items():
        n, fit = len(same), max(1, STACK_ELEMENTS // (rows * cols))
        count = math.ceil(n / fit)
        stacks += [same[n * i // count : n * (i + 1) // count] for i in range(count)]
    return stacks


def _deal(stacks: list[list[_Matrix]], world_size: int) -> list[list[tuple[int, list[_Matrix]]]]:
    """Deal stacks over ranks, dearest first to the least loaded; returns rounds of (owner, stack).

    A round holds at most one stack of each rank. Every rank gets the same answer.
    """

    def cost(stack: list[_Matrix]) -> int:
        rows, cols = min(stack[0].param.shape), max(stack[0].param.shape)
        return len(stack) * rows * rows * (2 * cols + rows)

    load = [0] * world_size
    hands: list[list[list[_Matrix]]] = [[] for _ in range(world_size)]
    for stack in sorted(stacks, key=cost, reverse=True):
        owner = load.index(min(load))
        load[owner] += cost(stack)
        hands[owner].append(stack)
    return [
        [(owner, hand[i]) for owner, hand in enumerate(hands) if i < len(hand)]
        for i in range(max(map(len, hands)))
    ]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz, for hidden 2-D weights.

        B_t = mu B_{t-1} + (1 - mu) G_t
        O_t = NewtonSchulz(mu B_t + (1 - mu) G_t  if nesterov else  B_t)
        W_t = (1 - lr wd) W_{t-1} - lr adjust(W) O_t

    (K. Jordan, https://kellerjordan.github.io/posts/muon/; match_rms_adamw: Liu et al. 2025,
    arXiv 2502.16982.) Equals `torch.optim.Muon` with the same settings, but runs all matrices of
    one shape as one batch, and with `world_size > 1` shares Newton-Schulz over the ranks: each
    computes whole stacks and broadcasts the orthogonalised update. Gradients must already be
    averaged, and every rank must have gradients for the same parameters. Momentum is kept on every
    rank: it costs an addition, and any rank can then write the checkpoint.

    params: 2-D tensors, or groups that may set lr, weight_decay and momentum.
    lr: see the module's docstring for the unit.
    coefficients: "quintic" or "polar_express".  ns_steps: iterations of Newton-Schulz.
    ns_dtype: its dtype; None means bfloat16 on CUDA, float32 elsewhere (most CPUs emulate bf16).
    process_group: None is the default group; unused when world_size is 1.
    Raises UserError for an unknown name, a parameter that is not 2-D, and an FSDP2 shard.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        coefficients: str = "polar_express",
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        adjust_lr: str = "match_rms_adamw",
        eps: float = EPS,
        rank: int = 0,
        world_size: int = 1,
        process_group: dist.ProcessGroup | None = None,
    ):
        _choose(COEFFICIENTS, coefficients, "coefficients")
        self.adjust = _choose(ADJUST_LR, adjust_lr, "adjust_lr")
        assert 0 <= rank < world_size
        self.nesterov, self.ns_dtype = nesterov, ns_dtype
        self.ns_settings = {"coefficients": coefficients, "steps": ns_steps, "eps": eps}
        self.rank, self.world_size, self.process_group = rank, world_size, process_group
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise UserError(f"Muon takes 2-D parameters, not one of shape {tuple(p.shape)}")
            if _is_sharded(p):
                raise UserError("Muon needs whole matrices: use_muon does not work with FSDP2 yet")

    def init_state(self) -> None:
        """Create the state that is missing, so that a checkpoint can be read before a step."""
        for p in (p for group in self.param_groups for p in group["params"]):
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:
        self.init_state()
        rounds = _deal(_make_stacks(self._update_momentum()), self.world_size)
        # One round is applied while the next is computed and sent: the exchange hides behind
        # Newton-Schulz, and at most two rounds of updates are alive.
        in_flight: list[tuple] = []
        for stacks in rounds:
            sent = [self._exchange(owner, stack) for owner, stack in stacks]
            self._apply(in_flight)
            in_flight = sent
        self._apply(in_flight)

    def _update_momentum(self) -> list[_Matrix]:
        matrices = []
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            shrink = 1 - lr * group["weight_decay"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            for p, grad, buffer in zip(params, grads, buffers, strict=True):
                scale = lr * self.adjust(*p.shape)
                matrices.append(_Matrix(p, grad, buffer, momentum, shrink, scale))
        return matrices

    def _orthogonalise(self, stack: list[_Matrix], out: Tensor) -> Tensor:
        directions = [m.momentum_buffer for m in stack]
        if self.nesterov:
            directions = torch._foreach_lerp([m.grad for m in stack], directions, stack[0].momentum)
        for slot, matrix, direction in zip(out, stack, directions, strict=True):
            slot.copy_(direction.T if matrix.tall else direction)
        return newton_schulz(out, **self.ns_settings)

    def _exchange(self, owner: int, stack: list[_Matrix]) -> tuple:
        """Compute the update of a stack, or start to receive it; (stack, update, pending work)."""
        param = stack[0].param
        default = torch.bfloat16 if param.is_cuda else torch.float32
        shape = (len(stack), min(param.shape), max(param.shape))
        update = torch.empty(shape, dtype=self.ns_dtype or default, device=param.device)
        if owner == self.rank:
            update = self._orthogonalise(stack, update)
        if self.world_size == 1:
            return stack, update, None
        # As bytes: gloo has not always known bfloat16, and a broadcast does no arithmetic.
        flat = update.view(-1).view(torch.uint8)
        work = dist.broadcast(flat, group_src=owner, group=self.process_group, async_op=True)
        return stack, update, work

    def _apply(self, received: list[tuple]) -> None:
        for stack, update, work in received:
            if work is not None:
                work.wait()
            alike = defaultdict(lambda: ([], []))  # (shrink, scale) -> (params, updates)
            for matrix, one in zip(stack, update.to(stack[0].param.dtype), strict=True):
                params, updates = alike[matrix.shrink, matrix.scale]
                params.append(matrix.param)
                updates.append(one.T if matrix.tall else one)
            for (shrink, scale), (params, updates) in alike.items():
                if shrink != 1:
                    torch._foreach_mul_(params, shrink)
                torch._foreach_add_(params, updates, alpha=-scale)


# Both optimizers together


class OptimizerSet:
    """Muon and AdamW as one optimizer. `muon` or `adamw` may be None, but not both.

    `param_groups` are those of both, each with names, role, lr and initial_lr.
    """

    def __init__(self, muon: Muon | None, adamw: torch.optim.AdamW | None):
        self.muon, self.adamw = muon, adamw
        self.optimizers = [o for o in (muon, adamw) if o is not None]
        assert self.optimizers
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def set_lr_factor(self, factor: float) -> None:
        """Set every group's lr to its initial lr times factor (see `lr_factor`)."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def init_state(self) -> None:
        """Create the state that is missing, exactly as the first step would."""
        if self.muon is not None:
            self.muon.init_state()
        for group in self.adamw.param_groups if self.adamw is not None else []:
            for p in group["params"]:
                if self.adamw.state[p]:
                    continue
                # The fused kernel counts on the device; the plain one wants its counter on the CPU.
                device = p.device if group["fused"] else "cpu"
                self.adamw.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=device),
                    exp_avg=torch.zeros_like(p, memory_format=torch.preserve_format),
                    exp_avg_sq=torch.zeros_like(p, memory_format=torch.preserve_format),
                )

    def state_tensors(self) -> dict[str, Tensor]:
        """The live state, flat: `optim.<parameter>.<exp_avg|exp_avg_sq|step|momentum_buffer>`.

        Complete even before the first step and for parameters that never had a gradient, so the
        keys depend on the model and the roles only.
        """
        self.init_state()
        return {
            f"optim.{name}.{kind}": tensor
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for name, p in zip(group["names"], group["params"], strict=True)
            for kind, tensor in optimizer.state[p].items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy what `state_tensors` gave into the state; the next step continues bitwise.

        Raises UserError, before anything is changed, if keys, shapes or dtypes differ.
        """
        own = self.state_tensors()
        if own.keys() != tensors.keys():
            missing = sorted(own.keys() - tensors.keys())
            extra = sorted(tensors.keys() - own.keys())
            raise UserError(
                f"optimizer state does not fit: {len(missing)} missing (first: {missing[:1]}), "
                f"{len(extra)} unexpected (first: {extra[:1]}); was use_muon or the model changed?"
            )
        for key, tensor in own.items():
            given = tensors[key]
            if (given.shape, given.dtype) != (tensor.shape, tensor.dtype):
                raise UserError(
                    f"optimizer state {key} is {given.dtype} {list(given.shape)}, "
                    f"expected {tensor.dtype} {list(tensor.shape)}"
                )
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(tensors[key])


def build_optimizer(
    named_params: Iterable[tuple[str, Tensor]],
    *,
    lr: float,
    mixer_lr: float | None = None,
    mixer_params: Iterable[str] = frozenset(),
    embed_lr: float | None = None,
    muon_lr: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    use_muon: bool = False,
    momentum: float = 0.95,
    nesterov: bool = True,
    coefficients: str = "polar_express",
    ns_steps: int = 5,
    ns_dtype: torch.dtype | None = None,
    adjust_lr: str = "match_rms_adamw",
    rank: int = 0,
    world_size: int = 1,
    process_group: dist.ProcessGroup | None = None,
) -> OptimizerSet:
    """Group the parameters (`build_groups`) and build their optimizers.

    `betas` and `eps` are AdamW's; `momentum` to `adjust_lr` and the three about ranks are Muon's.
    Raises UserError if nothing is trainable.
    """
    groups = build_groups(
        named_params,
        lr=lr,
        mixer_lr=mixer_lr,
        mixer_params=mixer_params,
        embed_lr=embed_lr,
        muon_lr=muon_lr,
        weight_decay=weight_decay,
        use_muon=use_muon,
    )
    if not groups:
        raise UserError("no trainable parameters: every one has requires_grad=False")
    muon_groups = [g for g in groups if g["role"] == "muon"]
    adamw_groups = [g for g in groups if g["role"] != "muon"]
    muon = adamw = None
    if muon_groups:
        muon = Muon(
            muon_groups,
            lr,
            momentum=momentum,
            nesterov=nesterov,
            coefficients=coefficients,
            ns_steps=ns_steps,
            ns_dtype=ns_dtype,
            adjust_lr=adjust_lr,
            rank=rank,
            world_size=world_size,
            process_group=process_group,
        )
    if adamw_groups:
        # One kernel per step instead of a dozen passes over the parameters.
        fused = all(p.device.type in ("cpu", "cuda") for g in adamw_groups for p in g["params"])
        adamw = torch.optim.AdamW(adamw_groups, lr=lr, betas=betas, eps=eps, fused=fused)
    return OptimizerSet(muon, adamw)


# Gradient norm


def _is_sharded(tensor: Tensor) -> bool:
    # What FSDP2 makes of a tensor; importing DTensor to ask isinstance would cost a second.
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def clip_grad_norm(params: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to a total 2-norm of at most max_norm; 0 only measures.

    Returns the norm before clipping, a float32 scalar on the gradients' device, without waiting for
    the device. A norm that is not finite makes every gradient NaN or 0: check it before the step.
    Under DDP gradients are whole on each rank; FSDP2 shards are summed over their mesh.
    """
    grads = list({id(p): p.grad for p in params if p.grad is not None}.values())
    if not grads:
        return torch.zeros(())
    kinds = defaultdict(list)
    for grad in grads:
        kinds[_is_sharded(grad)].append(grad)  # foreach ops cannot mix shards and plain tensors
    totals = []
    for sharded, some in kinds.items():
        norms = torch._foreach_norm(some, 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        totals.append(norm.full_tensor() if sharded else norm)
    total = torch.linalg.vector_norm(torch.stack(totals))
    if max_norm > 0:
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for some in kinds.values():
            torch._foreach_mul_(some, factor)
    return total


# Learning-rate schedules

# name -> shape of the decay, from 1 at x = 0 to 0 at x = 1
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    # 1 - sqrt beats linear in Haegele et al. 2024, arXiv 2405.18392, section 3
    "wsd": lambda x: 1 - math.sqrt(x),
    "constant": lambda x: 1 - x,
}


def lr_factor(
    step: int,
    *,
    schedule: str,
    total_steps: int,
    warmup_steps: int = 0,
    min_ratio: float = 0.0,
    decay_fraction: float = 0.0,
) -> float:
    """What to multiply the learning rate by for update number `step`, counted from 0.

    Warm-up: (step + 1) / warmup_steps, so the first update is not lost and update warmup_steps - 1
    is the first at 1. Then
      cosine:   half a cosine over all updates that are left;
      wsd:      1, and 1 - sqrt over the last round(decay_fraction * total_steps) updates;
      constant: 1, and a straight line over as many.
    With a decay, the last update (total_steps - 1) and any later one get exactly min_ratio. Warm-up
    goes first: a decay that would start before its end is shortened, and if no update is left after
    the peak (warm-up as long as the run or longer, or a run of one update) there is none.
    A decay_fraction of 0 means no decay for wsd and constant; cosine ignores decay_fraction.
    Raises UserError for an unknown schedule or a value out of range.
    """
    shape = _choose(SCHEDULES, schedule, "schedule")
    if total_steps < 1 or warmup_steps < 0 or step < 0:
        raise UserError(
            f"need step >= 0, total_steps >= 1 and warmup_steps >= 0, "
            f"not {step}, {total_steps}, {warmup_steps}"
        )
    if not (0 <= min_ratio <= 1 and 0 <= decay_fraction <= 1):
        raise UserError(
            f"min_ratio={min_ratio} and decay_fraction={decay_fraction} must be between 0 and 1"
        )
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    last = total_steps - 1
    peak = max(warmup_steps - 1, 0)  # the first update at factor 1
    decay_steps = max(last - peak, 0)
    if schedule != "cosine":
        wanted = max(1, round(decay_fraction * total_steps)) if decay_fraction > 0 else 0
        decay_steps = min(wanted, decay_steps)
    into_decay = min(step, last) - (last - decay_steps)
    if decay_steps == 0 or into_decay <= 0:
        return 1.0
    return min_ratio + (1 - min_ratio) * shape(into_decay / decay_steps)
