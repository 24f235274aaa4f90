"""Sampling with caches: keys and values for softmax layers, conv and recurrent state for linear.

    python generate.py runs/demo/model "The capital of France is" --max_new_tokens 40
    python generate.py models/smollm2-135m "What is a retort?" --chat

Greedy at `--temperature 0`. Check: `pytest tests/test_generate.py`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Container

import torch
import torch.distributed as dist
from torch import Tensor

from config import UserError
from distributed import choose_device
from hf_files import require_rows
from hybrid_layers import resolve_kernels, use_kernels
from model import Transformer, is_fsdp
from tokenizer import load_tokenizer


def for_decoding(model: Transformer, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """Matrices in `dtype`, in place: under autocast, which it is for, they would be cast again at
    every token. Biases, decays and norms stay as they are."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data = module.weight.data.to(dtype)
    return model


class Decoder:
    """A model and the memory of a batch of sequences: `prefill` prompts, then `step` token by
    token. A step of a small model is hundreds of launches that take longer than their work; two
    things help. compiled: the blocks' steps go through torch.compile (some seconds once). graph: on
    CUDA a step is recorded once as a CUDA graph and replayed, one launch.

    capacity: tokens a sequence can have. Both need it: it is the limit then, and every step reads
    that much of the keys and values of softmax layers.
    """

    def __init__(
        self, model: Transformer, capacity: int = 0, *, graph: bool = False, compiled: bool = False
    ):
        static = graph or compiled
        assert capacity or not static
        self.model, self.cache = model, model.new_cache(capacity, static=static)
        self.use_graph, self.graph = graph, None
        # Lengths differ every step: without a static cache blocks would compile again and again.
        self.stance = "default" if compiled else "force_eager"
        self.tokens: Tensor | None = None  # what the graph reads [B, 1]
        self.logits: Tensor | None = None  # and writes [B, V]

    def head(self, hidden: Tensor) -> Tensor:
        """[B, d] -> float32 logits [B, V]."""
        return torch.nn.functional.linear(hidden, self.model.head_weight).float()

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Read the prompts, as one packed row: lengths may differ. Returns the logits of what
        follows each [B, V]."""
        device = self.model.embed_tokens.weight.device
        lengths = [len(p) for p in prompts]
        with torch.compiler.set_stance("force_eager"):
            if len(set(lengths)) == 1:
                ids = torch.tensor(prompts, device=device)
                return self.head(self.model(ids, cache=self.cache)[:, -1])
            bounds = list(itertools.accumulate(lengths, initial=0))
            ids = torch.tensor([t for p in prompts for t in p], device=device)[None]
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
            hidden = self.model(
                ids, cache=self.cache, cu_seqlens=cu_seqlens, max_seqlen=max(lengths)
            )
            return self.head(hidden[0, cu_seqlens[1:].long() - 1])

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Add one token to every sequence, [B] int64 on the model's device; returns the logits of
        the next [B, V] (of a graph: valid until the next step)."""
        if self.graph is not None:
            assert self.cache.longest < self.cache.capacity, "the static cache is full"
            self.tokens.copy_(tokens[:, None])
            self.graph.replay()
            self.cache.longest += 1
            return self.logits
        with torch.compiler.set_stance(self.stance):
            logits = self._forward(tokens[:, None])
            if self.use_graph:
                self._record(tokens)
        return logits

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.model(tokens, cache=self.cache)[:, -1])

    def _record(self, tokens: Tensor) -> None:
        """Record a step, after a first one that ran by itself and let libraries set themselves up.
        Recording computes nothing, so what it would have added is not counted."""
        self.tokens = tokens[:, None].clone()
        self.cache.longest -= 1
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._forward(self.tokens)


@torch.inference_mode()
def generate_batch(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stops: Container[int] = (),
    generator: torch.Generator | None = None,
    graph: bool = False,
    name: str = "model",
) -> list[list[int]]:
    """Continue each of `prompts`, of any lengths, together. A sequence stops after one of
    the tokens `stops`.

    temperature 0 is greedy; top_p keeps the likeliest tokens that together reach that mass.
    graph: record the step as a CUDA graph (worth it from some tens of tokens on). name: of the
    model, for the UserError where its logits are not finite. Returns the new ids only.
    """
    if not prompts or not all(prompts):
        raise UserError("prompt: no tokens found, at least one expected")
    new: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens < 1:
        return new
    capacity = max(len(p) for p in prompts) + max_new_tokens
    decoder = Decoder(model, capacity if graph else 0, graph=graph)
    logits = decoder.prefill(prompts)
    while True:
        if temperature or not new[0]:
            require_finite(logits, name)
        tokens = [pick(row, temperature, top_p, generator) for row in logits]
        if is_fsdp(model):
            tokens = first_ranks(tokens, logits.device)
        for ids, token in zip(new, tokens, strict=True):
            if not ids or ids[-1] not in stops:
                ids.append(token)
        if all(len(ids) == max_new_tokens or ids[-1] in stops for ids in new):
            return new
        logits = decoder.step(torch.tensor(tokens, device=logits.device))


def require_finite(logits: Tensor, name: str) -> None:
    """UserError where a model's logits are no numbers, as with damaged weights."""
    if not logits.isfinite().all():
        raise UserError(f"{name}: logits are not finite")


def generate(model: Transformer, ids: list[int], max_new_tokens: int, **options) -> list[int]:
    """Continue one prompt; options as of `generate_batch`."""
    return generate_batch(model, [ids], max_new_tokens, **options)[0]


def first_ranks(tokens: list[int], device: torch.device) -> list[int]:
    """Rank 0's. Every rank decodes a model that is cut, in steps that all take part in: ranks whose
    logits differ in a last bit would go on with other tokens, stop at other ends, and wait."""
    told = torch.tensor(tokens, device=device)
    dist.broadcast(told, src=0)
    return told.tolist()


def pick(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> int:
    """One token id from logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        sorted_probs, order = probs.sort(descending=True)
        cut = sorted_probs.cumsum(-1) - sorted_probs > top_p
        probs = probs.index_fill(0, order[cut], 0.0)
    return int(torch.multinomial(probs, 1, generator=generator))


def main(argv: list[str] | None = None) -> None:
    from hf import load_model, tokenizer_spec

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("prompt", nargs="+", help="texts to continue, together")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus mass; 1 = off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in ChatML turns")
    args = parser.parse_args(argv)
    try:
        if args.temperature and not 1e-6 <= args.temperature < math.inf:
            raise UserError(f"--temperature: {args.temperature:g} found, 0 or 1e-6 to inf expected")
        if not -(2**63) <= args.seed < 2**64:
            raise UserError(f"--seed: {args.seed} found, a number of 64 bits expected")
        if not 0 < args.top_p <= 1:
            raise UserError(f"--top_p: {args.top_p:g} found, above 0 and at most 1 expected")
        if args.max_new_tokens < 0:
            raise UserError(f"--max_new_tokens: {args.max_new_tokens} found, 0 or more expected")
        device = choose_device(args.device)
        model = load_model(args.model, device=device)
        tokenizer = load_tokenizer(tokenizer_spec(args.model))
        require_rows(args.model, model.config.vocab_size, tokenizer)
        if device.type == "cpu":
            model.float()
        elif device.type == "cuda":
            for_decoding(model)
            kernels = resolve_kernels(model.config, "auto", device)
            print(use_kernels(model, kernels, device), file=sys.stderr)
        prompts = args.prompt
        if args.chat:
            if len(tokenizer.encode("<|im_start|>", special_tokens=True)) != 1:
                raise UserError(
                    f"--chat: {args.model} found, whose tokenizer has no <|im_start|>; a ChatML "
                    f"model expected (SmolLM2, Qwen)"
                )
            turns = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
            prompts = [turns.format(p) for p in prompts]
        ids = [tokenizer.prompt(p, special_tokens=args.chat) for p in prompts]
        generator = torch.Generator(device).manual_seed(args.seed)
        amp = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
        with amp:
            new = generate_batch(
                model, ids, args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
                stops=tokenizer.stops, generator=generator, name=args.model,
            )  # fmt: skip
        for text, prompt, tokens in zip(args.prompt, ids, new, strict=True):
            print(text + tokenizer.continuation(prompt, tokens))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
