"""Parameter roles, Muon + AdamW behind one object, gradient clipping, learning-rate schedules.

    pytest tests/test_optimizer.py

Learning rates: Muon's unit depends on `adjust_lr`. "match_rms_adamw" gives the update the RMS of a
typical AdamW update, so that AdamW's lr and weight decay carry over; "original" keeps the scale of
the orthogonal update itself, where 0.02 is usual.

Shapes: N matrices in a stack, R rows, C columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import UserError
from muon import Muon, choose
from muon_shards import cut_of, is_sharded, local, total_norms
from ops.multi_tensor import (
    KINDS,
    aligned,
    plain_adamw,
    scale_,
    total_norm,
    triton_adamw,
    uses_triton,
)

# Modules whose 2-D weight is no hidden matrix: rows are tokens or heads of a scalar gate, or the
# matrix is a factor of low rank (decays, data-dependent shifts) or a feature map inside a head.
ADAMW_MODULES = frozenset(
    {
        "embed_tokens", "lm_head", "a_proj", "b_proj", "gk_proj", "f_proj", "x_proj", "w_proj",
        "w_lora", "a_lora", "g_lora", "feature_map_q", "feature_map_k",
    }
)  # fmt: skip

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
    factor = modules and modules[-1].isdigit()  # one of several in a row (kda's g_proj.0, g_proj.1)
    return "adamw" if factor or not ADAMW_MODULES.isdisjoint(modules) else "muon"


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


# AdamW


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov & Hutter, arXiv 1711.05101) with the same state and the same
    result, but for weights in bfloat16: their update and second moment are computed in float32 and
    rounded stochastically, or steps below 1/256 of a weight would mostly be lost. On CUDA all
    tensors of a dtype and alignment take one launch."""

    @torch.no_grad()
    def step(self, go: Tensor | None = None) -> None:
        """go: see ops/multi_tensor.py."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            settings = {
                "lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"],
                "weight_decay": group["weight_decay"],
            }  # fmt: skip
            launches = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    tensors = p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]
                    one = tuple(map(local, tensors))
                    if not one[0].numel():  # FSDP2 had no row left for this rank
                        state["step"] += 1 if go is None else go
                        continue
                    triton = uses_triton(one[:4], KINDS)
                    launches[p.dtype, triton, triton and aligned(*one[:4])].append(one)
            for (_, triton, _), some in launches.items():
                run = triton_adamw if triton else plain_adamw
                run(*map(list, zip(*some, strict=True)), **settings, go=go)


# Both optimizers together


class OptimizerSet:
    """Muon and AdamW as one optimizer. `muon` or `adamw` may be None, but not both.

    `param_groups` are those of both, each with names, role, lr and initial_lr.
    """

    def __init__(self, muon: Muon | None, adamw: torch.optim.AdamW | None):
        self.muon, self.adamw = muon, adamw
        self.optimizers = [o for o in (muon, adamw) if o is not None]
        assert self.optimizers
        self.ours = all(isinstance(o, (Muon, AdamW)) for o in self.optimizers)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, go: Tensor | None = None) -> None:
        """go [] float32 on the device: 0 leaves weights and state as they are. The host looks at it
        unless all tensors are Triton's (ops/multi_tensor.py)."""
        self.init_state()
        if go is not None and not (go.is_cuda and self.ours):
            if not go:
                return
            go = None
        for optimizer in self.optimizers:
            optimizer.step() if go is None else optimizer.step(go)

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
    adjust_lr: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    process_group: dist.ProcessGroup | None = None,
) -> OptimizerSet:
    """Group the parameters (`build_groups`) and build their optimizers.

    `betas` and `eps` are AdamW's; `momentum` to `adjust_lr` and the three about ranks are Muon's.
    adjust_lr: None means "original" if `muon_lr` is given, and otherwise "match_rms_adamw", because
    Muon then runs at `lr`, which is in AdamW's unit. A `mixer_lr` is in the same unit as Muon's for
    the mixers' matrices, so leave `muon_lr` out where the two would differ.
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
    if adjust_lr is None:
        adjust_lr = "match_rms_adamw" if muon_lr is None else "original"
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
        params = [p for g in adamw_groups for p in g["params"]]
        fused = all(p.device.type in ("cpu", "cuda") for p in params)
        ours = uses_triton(map(local, params), KINDS)
        ours = ours or any(p.dtype == torch.bfloat16 for p in params)
        kind = AdamW if ours else torch.optim.AdamW
        adamw = kind(adamw_groups, lr=lr, betas=betas, eps=eps, fused=fused)
    return OptimizerSet(muon, adamw)


# Gradient norm


@torch.no_grad()
def clip_grad_norm(params: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to a total 2-norm of at most max_norm; 0 only measures.

    Returns the norm before clipping, a float32 scalar (float64 for such gradients) on the
    gradients' device, without waiting for it. A norm that is not finite makes every gradient NaN
    or 0: a step for `StepGuard` to refuse.
    Under ddp gradients are whole on each rank; FSDP2 shards are summed over their mesh.
    """
    grads = list({id(p): p.grad for p in params if p.grad is not None}.values())
    if not grads:
        return torch.zeros(())
    kinds = defaultdict(list)
    for grad in grads:
        kinds[is_sharded(grad)].append(grad)
    totals = []
    for sharded, some in kinds.items():
        norm = total_norm([local(g) for g in some])
        totals.append(total_norms([norm[None]], cut_of(some[0]))[0][0] if sharded else norm)
    total = torch.linalg.vector_norm(torch.stack(totals))
    if max_norm > 0:
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        scale_([local(g) for g in grads], factor)
    return total


class StepGuard:
    """Which steps are taken: 1 for a gradient norm that is finite and, if `spike` is not 0, at most
    `spike` times the median of the last norms; else 0, as a float32 [] on the norm's device, where
    everything stays. Only norms of steps taken are remembered, so that none that was refused can
    spoil the median. skipped, in_row: steps refused so far, and one after another until now.
    """

    WINDOW, LEAST = 64, 16  # norms remembered, and how many it takes to tell a spike

    def __init__(self, spike: float, device: torch.device):
        self.spike = spike
        self.norms = torch.full((self.WINDOW,), torch.nan, device=device)
        self.taken, self.skipped, self.in_row = torch.zeros(3, device=device)
        self.slots = torch.arange(self.WINDOW, device=device)

    @torch.no_grad()
    def __call__(self, norm: Tensor) -> Tensor:
        go = norm.isfinite()
        if self.spike:
            high = norm > self.spike * self.norms.nanmedian()
            go = go & ~(high & (self.taken >= self.LEAST))
            here = go & (self.slots == self.taken % self.WINDOW)
            self.norms = torch.where(here, norm.float(), self.norms)
        go = go.float()
        self.taken = self.taken + go
        self.skipped = self.skipped + (1 - go)
        self.in_row = (self.in_row + 1) * (1 - go)
        return go

    def state_dict(self) -> dict[str, list[float | None]]:
        """What decides about the next steps, for JSON; the host waits for the device."""
        norms = [x if math.isfinite(x) else None for x in self.norms.tolist()]
        counts = torch.stack([self.taken, self.skipped, self.in_row]).tolist()
        return {"norms": norms if self.spike else [], "counts": counts}

    def load_state_dict(self, state: dict[str, list[float | None]]) -> None:
        for i, norm in enumerate(state["norms"]):
            self.norms[i] = math.nan if norm is None else norm
        self.taken, self.skipped, self.in_row = self.norms.new_tensor(state["counts"])


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
    shape = choose(SCHEDULES, schedule, "schedule")
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
