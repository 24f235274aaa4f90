"""Sampling with caches: keys and values for softmax layers, conv and recurrent state for linear.

    python generate.py runs/demo/model "The capital of France is" --max_new_tokens 40
    python generate.py models/smollm2-135m "What is a retort?" --chat

Greedy at `--temperature 0`. Check: `pytest tests/test_generate.py`.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from config import UserError
from model import Transformer
from tokenizer import load_tokenizer


@torch.inference_mode()
def generate(
    model: Transformer,
    ids: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Continue `ids`: one prefill, then one token a step. Stops after `eos`.

    temperature 0 is greedy; top_p keeps the likeliest tokens that together reach that mass.
    Returns the new ids only.
    """
    if not ids:
        raise UserError("prompt: no tokens found, at least one expected")
    device = model.embed_tokens.weight.device
    cache = model.new_cache()
    step = torch.tensor([ids], device=device)
    new: list[int] = []
    # Lengths differ every step: compiled blocks would compile again and again.
    with torch.compiler.set_stance("force_eager"):
        while len(new) < max_new_tokens:
            hidden = model(step, cache=cache)[:, -1]
            logits = torch.nn.functional.linear(hidden, model.head_weight).float()[0]
            token = pick(logits, temperature, top_p, generator)
            new.append(token)
            if token == eos:
                break
            step = torch.tensor([[token]], device=device)
    return new


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
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus mass; 1 = off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in ChatML turns")
    args = parser.parse_args(argv)
    try:
        model = load_model(args.model, device=args.device)
        tokenizer = load_tokenizer(tokenizer_spec(args.model))
        if args.device == "cpu":
            model.float()
        prompt = args.prompt
        if args.chat:
            prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.encode(prompt, special_tokens=args.chat)
        generator = torch.Generator(args.device).manual_seed(args.seed)
        amp = torch.autocast("cuda", torch.bfloat16, enabled=args.device.startswith("cuda"))
        with amp:
            new = generate(
                model, ids, args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
                eos=tokenizer.eos_token_id, generator=generator,
            )  # fmt: skip
        print(args.prompt + tokenizer.decode(new))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
