"""Muon (Jordan et al. 2024), batched by shape, with owner-computes across ranks.

    pytest tests/test_muon.py

Every hidden matrix moves along the orthogonal factor of its momentum, found by Newton-Schulz
iterations: that, and no second moment, is the diff from AdamW. `optimizer.py` decides which
parameters come here.

Shapes: N matrices in a stack, R rows, C columns, S = min(R, C).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from config import UserError
from muon_shards import Exchange, cut_of, is_sharded, local, total_norms
from ops.multi_tensor import PLAIN, TRITON, Passes, uses_triton

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
# GPU, yet few enough that the stacks of a small model still spread over 8 ranks. A model of many
# more elements has stacks of one in STACK_SHARE of them.
STACK_ELEMENTS = 2**24
STACK_SHARE = 32

# From this ratio of the sides on Newton-Schulz runs on Gram matrices, which are brought up to date
# after the first two iterations, then after every three. In float16 that errs by 3e-3 on a random
# matrix and by 3e-2 where singular values fall as 1 / i^2, the plain iteration by 1e-3 and 3e-2; in
# bfloat16 the plain one errs by 1e-2 and 2e-1 (192 x 1120, polar_express, against float64).
WIDE = 2
PARTS = (2, 3)


def choose(table: dict, name: str, what: str):
    if name not in table:
        raise UserError(f"{what}={name!r} is unknown; choose one of {', '.join(table)}")
    return table[name]


# Newton-Schulz


def _polynomials(coefficients: str, steps: int) -> tuple[list[tuple[float, float, float]], float]:
    table, slack = choose(COEFFICIENTS, coefficients, "coefficients")
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
    """`newton_schulz_ref` on every matrix of stack [N, R, C], computed in its dtype."""
    _, slack = _polynomials(coefficients, steps)
    norm_dtype = torch.promote_types(stack.dtype, torch.float32)
    norm = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True, dtype=norm_dtype)
    x = (stack / (norm * slack).clamp(min=eps)).to(stack.dtype)
    return orthogonalise(x, coefficients=coefficients, steps=steps)


def orthogonalise(x: Tensor, *, coefficients: str, steps: int) -> Tensor:
    """The iterations on stack x [N, R, C], already divided by its norms; contiguous.

    They multiply from the shorter side: tall matrices by polynomials in X^T X [S, S] from the
    right, the others by polynomials in X X^T [S, S] from the left.
    Where one side is WIDE times the other they run on these Gram matrices, of which each iteration
    is a polynomial, and their product is multiplied into X: with C = 6 R two fifths fewer FLOPs.
    Rounding lets the smallest eigenvalues drift, so X and its Gram matrix are brought up to date
    after each of PARTS iterations, and bfloat16 takes the plain way, as it would drift too soon
    (Gram Newton-Schulz, https://tridao.me/blog/2026/gram-newton-schulz/).
    """
    assert x.ndim == 3, x.shape
    polynomials, _ = _polynomials(coefficients, steps)
    short, long = sorted(x.shape[1:])
    if long >= WIDE * short and x.dtype != torch.bfloat16:
        done = 0
        while done < steps:
            part = polynomials[done : done + PARTS[min(done, 1)]]
            x = _gram_iterations(x, part)
            done += len(part)
        return x
    for a, b, c in polynomials:
        gram = _gram(x)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b A + c A^2
        # baddbmm copies x first. bmm with a on the diagonal of poly would not, but a + poly rounds:
        # 1.4 to 1.7 times the error in float16, 1.5 to 3 times in bfloat16 (random matrices of
        # 256 x 256 and 192 x 1120, both kinds of coefficients, against float64).
        x = torch.baddbmm(x, *_in_order(poly, x), beta=a)  # [N, R, C]
    return x


def _gram(x: Tensor) -> Tensor:
    """[N, S, S]; a view is transposed, nothing in memory."""
    wide = x.mT if x.shape[1] > x.shape[2] else x
    return wide @ wide.mT


def _in_order(poly: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a product with poly [N, S, S], symmetric, on the side of x where it fits."""
    return (x, poly) if x.shape[1] > x.shape[2] else (poly, x)


def _gram_iterations(x: Tensor, polynomials: list[tuple[float, float, float]]) -> Tensor:
    """The same, without touching x [N, R, C] in between."""
    gram, product = _gram(x), None
    for i, (a, b, c) in enumerate(polynomials):
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        # Here, unlike in `orthogonalise`, the rounding of a + poly adds little to the error.
        poly.diagonal(dim1=1, dim2=2).add_(a)
        product = poly if product is None else poly @ product
        if i + 1 < len(polynomials):
            gram = poly @ (poly @ gram)  # all of them commute
    return torch.bmm(*_in_order(product, x))


# Muon


@dataclass
class _Matrix:
    """One parameter of this step, with what is needed to compute and to apply its update. Of a
    matrix that FSDP2 has cut, the tensors are this rank's rows."""

    shape: torch.Size  # of the whole matrix
    param: Tensor
    grad: Tensor
    momentum_buffer: Tensor
    momentum: float
    shrink: float  # the weight is multiplied by this: decoupled weight decay
    scale: float  # lr times the adjustment for the shape


@dataclass
class _Stack:
    """Matrices of one shape, device and momentum, whose updates are computed together."""

    matrices: list[_Matrix]
    passes: Passes
    norms: Tensor | None = None  # [N], of the directions, once the momentum is up to date


def _make_stacks(matrices: list[_Matrix]) -> list[_Stack]:
    """Same shape, at most STACK_ELEMENTS or a share of all, filled evenly.

    Stacks do not depend on the number of ranks: whole stacks are dealt out, so the very same
    kernels run on the very same shapes and the update is bitwise that of a single process.
    """
    by_shape = defaultdict(list)
    for matrix in matrices:
        by_shape[matrix.shape, matrix.param.device, matrix.momentum].append(matrix)
    stacks = []
    share = sum(m.shape.numel() for m in matrices) // STACK_SHARE
    for (shape, _, _), same in by_shape.items():
        n, fit = len(same), max(1, max(STACK_ELEMENTS, share) // shape.numel())
        count = math.ceil(n / fit)
        tensors = [t for m in same for t in (m.param, m.grad, m.momentum_buffer)]
        triton = uses_triton(tensors) and all(t.numel() for t in tensors)
        for i in range(count):
            some = same[n * i // count : n * (i + 1) // count]
            stacks.append(_Stack(some, TRITON if triton else PLAIN))
    return stacks


def _deal(stacks: list[_Stack], world_size: int) -> list[list[tuple[int, _Stack]]]:
    """Deal stacks over ranks, dearest first to the least loaded; returns rounds of (owner, stack).

    A round holds at most one stack of each rank. Every rank gets the same answer.
    """

    def cost(stack: _Stack) -> int:
        short, long = sorted(stack.matrices[0].shape)
        return len(stack.matrices) * short * short * (2 * long + short)

    load = [0] * world_size
    hands: list[list[_Stack]] = [[] for _ in range(world_size)]
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
    rank: it costs an addition, and any rank can then write the checkpoint. Of matrices that FSDP2
    has cut each rank keeps its rows (muon_shards.py).

    params: 2-D tensors, or groups that may set lr, weight_decay and momentum.
    lr: see the module's docstring for the unit.
    coefficients: "quintic" or "polar_express".  ns_steps: iterations of Newton-Schulz.
    ns_dtype: its dtype; None means float16 on CUDA (eight times as exact as bfloat16 and as fast;
    matrices are normalised in float32 first), float32 elsewhere.
    process_group: None is the default group; unused when world_size is 1.
    Raises UserError for an unknown name and a parameter that is not 2-D.
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
        adjust_lr: str = "original",
        eps: float = EPS,
        rank: int = 0,
        world_size: int = 1,
        process_group: dist.ProcessGroup | None = None,
    ):
        choose(COEFFICIENTS, coefficients, "coefficients")
        self.adjust = choose(ADJUST_LR, adjust_lr, "adjust_lr")
        assert 0 <= rank < world_size
        self.nesterov, self.ns_dtype = nesterov, ns_dtype
        self.ns_settings = {"coefficients": coefficients, "steps": ns_steps}
        self.slack, self.eps = COEFFICIENTS[coefficients][1], eps
        self.rank, self.world_size, self.process_group = rank, world_size, process_group
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise UserError(f"Muon takes 2-D parameters, not one of shape {tuple(p.shape)}")

    def init_state(self) -> None:
        """Create the state that is missing, so that a checkpoint can be read before a step."""
        for p in (p for group in self.param_groups for p in group["params"]):
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, go: Tensor | None = None) -> None:
        """go: see ops/multi_tensor.py."""
        self.init_state()
        cut, whole = self._matrices(sharded=True), self._matrices()
        if cut:
            self._step_shards(cut, go)
        if not whole:
            return
        rounds = _deal(self._momentum(whole, go), self.world_size)
        # One round is applied while the next is computed and sent: the exchange hides behind
        # Newton-Schulz, and at most two rounds of updates are alive.
        in_flight: list[tuple] = []
        for stacks in rounds:
            sent = [self._exchange(owner, stack) for owner, stack in stacks]
            self._apply(in_flight, go)
            in_flight = sent
        self._apply(in_flight, go)

    def _step_shards(self, matrices: list[_Matrix], go: Tensor | None) -> None:
        """As `step`, of matrices that FSDP2 has cut."""
        params = (p for group in self.param_groups for p in group["params"])
        cut = cut_of(next(filter(is_sharded, params)))
        stacks = self._momentum(matrices, go)
        norms = total_norms([stack.norms for stack in stacks], cut)
        for stack, norm in zip(stacks, norms, strict=True):
            stack.norms = norm
        for dealt in _deal(stacks, cut.size):
            pieces, shapes = {}, {}
            for owner, stack in dealt:
                shapes[owner] = (len(stack.matrices), *stack.matrices[0].shape)
                pieces[owner] = self._directions(stack)
            exchange = Exchange(cut, shapes, next(iter(pieces.values())))
            mine = exchange.to_owners(pieces)
            if mine is not None:
                mine = orthogonalise(mine, **self.ns_settings)
            updates = exchange.to_ranks(mine)
            self._apply([(stack, updates[owner], None) for owner, stack in dealt], go)

    def _momentum(self, matrices: list[_Matrix], go: Tensor | None) -> list[_Stack]:
        """The stacks, their momentum up to date."""
        stacks = _make_stacks(matrices)
        for stack in stacks:
            buffers, grads, mix = self._settings(stack)
            stack.norms = stack.passes.momentum(buffers, grads, **mix, go=go)
        return stacks

    def _matrices(self, sharded: bool = False) -> list[_Matrix]:
        matrices = []
        for group in self.param_groups:
            lr, momentum = group["lr"], float(group["momentum"])
            shrink = 1.0 - lr * group["weight_decay"]
            for p in group["params"]:
                if p.grad is not None and is_sharded(p) == sharded:
                    tensors = map(local, (p, p.grad, self.state[p]["momentum_buffer"]))
                    scale = lr * self.adjust(*p.shape)
                    matrices.append(_Matrix(p.shape, *tensors, momentum, shrink, scale))
        return matrices

    def _settings(self, stack: _Stack) -> tuple[list[Tensor], list[Tensor], dict]:
        """What both passes over the momentum are told: buffers, gradients, how to mix them."""
        buffers = [m.momentum_buffer for m in stack.matrices]
        grads = [m.grad for m in stack.matrices]
        return buffers, grads, {"momentum": stack.matrices[0].momentum, "nesterov": self.nesterov}

    def _room(self, stack: _Stack) -> Tensor:
        """Memory for the directions or the update of a stack, in the dtype of Newton-Schulz."""
        param = stack.matrices[0].param
        default = torch.float16 if param.is_cuda else torch.float32
        shape = (len(stack.matrices), *param.shape)
        return torch.empty(shape, dtype=self.ns_dtype or default, device=param.device)

    def _directions(self, stack: _Stack) -> Tensor:
        """[N, R, C], divided by their norms."""
        buffers, grads, mix = self._settings(stack)
        factors = (stack.norms * self.slack).clamp(min=self.eps).reciprocal()
        out = self._room(stack)
        stack.passes.directions(out, buffers, grads, factors, **mix)
        return out

    def _exchange(self, owner: int, stack: _Stack) -> tuple:
        """Compute the update of a stack, or start to receive it; (stack, update, pending work)."""
        if owner == self.rank:
            update = orthogonalise(self._directions(stack), **self.ns_settings)
        else:
            update = self._room(stack)
        if self.world_size == 1:
            return stack, update, None
        # As bytes: gloo has not always known bfloat16, and a broadcast does no arithmetic.
        flat = update.view(-1).view(torch.uint8)
        work = dist.broadcast(flat, group_src=owner, group=self.process_group, async_op=True)
        return stack, update, work

    def _apply(self, received: list[tuple], go: Tensor | None) -> None:
        for stack, update, work in received:
            if work is not None:
                work.wait()
            first = 0
            for (shrink, scale), run in itertools.groupby(
                stack.matrices, lambda m: (m.shrink, m.scale)
            ):  # groups of parameters follow one another
                params = [m.param for m in run]
                some = update[first : first + len(params)]
                stack.passes.update(params, some, shrink=shrink, scale=scale, go=go)
                first += len(params)
