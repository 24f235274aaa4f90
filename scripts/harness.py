r"""Score a model with EleutherAI's lm-evaluation-harness, for those with its data sets at hand.

    pip install -e ".[eval]"
    python scripts/harness.py runs/demo/model --tasks arc_easy,hellaswag --num_fewshot 0

Every task of lm-eval that needs log-likelihoods or greedy generation runs; --limit takes a few
examples of each. --out FILE gets the harness's results as JSON.
Check: `pytest tests/test_harness.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

# lm-eval needs the package `evaluate`, and so must not find our evaluate.py: only these modules of
# ours are imported, and not before lm-eval is.
ROOT = str(Path(__file__).resolve().parents[1])


class Scorer:
    """What the harness asks of a model; texts are tokens here.

    max_length: tokens a request may have; what is longer loses its beginning.
    """

    def __init__(self, model, tokenizer, *, max_length: int, batch_tokens: int, amp=nullcontext):
        self.model, self.tokenizer, self.amp = model, tokenizer, amp
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self.device = model.embed_tokens.weight.device
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.prefix = eos if bos is None else bos  # before a text of which nothing is given

    def encode(self, text: str) -> list[int]:
        """`Tokenizer.prompt`; a text that already says what comes before it does not get it
        twice."""
        said = self.tokenizer.decode(self.tokenizer.starts)
        return self.tokenizer.prompt(text.removeprefix(said))

    @torch.no_grad()
    def log_likelihoods(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(context, continuation), neither empty -> log p(continuation | context) in nats, and
        whether greedy decoding would have said it."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        with torch.compiler.set_stance("force_eager"):
            while order:
                together, tokens = [], 0
                while order and (not together or tokens < self.batch_tokens):
                    together.append(order.pop(0))
                    tokens += min(self.max_length, sum(map(len, pairs[together[-1]])))
                scores = self._score([pairs[i] for i in together])
                for i, score in zip(together, scores, strict=True):
                    found[i] = score
        return found

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """A few of them, packed into one row."""
        kept = [(context + answer)[-self.max_length - 1 :] for context, answer in pairs]
        lengths = torch.tensor([0] + [len(ids) - 1 for ids in kept])
        ids = torch.tensor([t for ids in kept for t in ids[:-1]], device=self.device)[None]
        bounds = lengths.cumsum(0).to(torch.int32)
        with self.amp():
            hidden = self.model(
                ids, cu_seqlens=bounds.to(self.device), max_seqlen=int(lengths.max()),
                positions=torch.cat([torch.arange(n) for n in lengths[1:]])[None].to(self.device),
            )  # fmt: skip
            scores = []
            for (_, answer), tokens, end in zip(pairs, kept, bounds[1:].tolist(), strict=True):
                count = min(len(answer), len(tokens) - 1)
                targets = torch.tensor(tokens[-count:], device=self.device)
                log_p = self._log_softmax(hidden[0, end - count : end])
                nats = log_p.gather(-1, targets[:, None]).sum()
                scores.append((nats.item(), bool((log_p.argmax(-1) == targets).all())))
        return scores

    def _log_softmax(self, hidden: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, self.model.head_weight)
        return logits.float().log_softmax(-1)

    def windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """A long text as pairs for `log_likelihoods`, every token of it in one continuation,
        `prefix` before it all. As the harness cuts it: every row but the last begins with the one
        token before it, the last, shorter one after as much of the text as fits."""
        ids, step = [self.prefix, *ids], self.max_length
        starts = range(1, len(ids), step)
        begins = [max(0, min(i + step, len(ids)) - step - 1) for i in starts]
        return [(ids[b:i], ids[i : i + step]) for b, i in zip(begins, starts, strict=True)]

    def generate_until(self, prompt: str, stops: list[str], most: int) -> str:
        """Greedy, up to the first of `stops`, which is left out."""
        from config import UserError
        from generate import generate

        starts = self.tokenizer.starts
        room = self.max_length - most - len(starts)
        if room < 1:
            raise UserError(
                f"--tasks: {most} tokens to generate found in a task, fewer than the model's "
                f"{self.max_length} of context expected"
            )
        ids = starts + self.encode(prompt)[len(starts) :][-room:]
        with self.amp():
            new = generate(self.model, ids, most, stops=self.tokenizer.stops)
        new = new[:-1] if new and new[-1] in self.tokenizer.stops else new
        text = self.tokenizer.decode(new)
        for stop in stops:
            text = text.split(stop)[0] if stop else text
        return text


def harness_model(scorer: Scorer):
    """The scorer as a model of lm-eval."""
    from lm_eval.api.model import TemplateLM

    class Retort(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return scorer.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return scorer.prefix

        def tok_encode(self, string: str, add_special_tokens=None, **_) -> list[int]:
            plain = add_special_tokens is False
            return (scorer.tokenizer.encode if plain else scorer.encode)(string)

        def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
            return scorer.log_likelihoods([(context, answer) for _, context, answer in requests])

        def loglikelihood_rolling(self, requests, **_) -> list[float]:
            found = []
            for (text,) in (request.args for request in requests):
                pairs = scorer.windows(scorer.tokenizer.encode(text))
                found.append(sum(nats for nats, _ in scorer.log_likelihoods(pairs)))
            return found

        def generate_until(self, requests, **_) -> list[str]:
            found = []
            for prompt, how in (request.args for request in requests):
                stops = how.get("until") or []
                stops = [stops] if isinstance(stops, str) else stops
                found.append(scorer.generate_until(prompt, stops, how.get("max_gen_toks", 256)))
            return found

    return Retort()


def build_scorer(args) -> Scorer:
    """The model of a folder, in bfloat16 on CUDA."""
    from config import UserError
    from distributed import choose_device
    from generate import for_decoding
    from hf import load_model, tokenizer_spec
    from hf_files import require_rows
    from hybrid_layers import resolve_kernels, use_kernels
    from metrics import check_writable
    from tokenizer import load_tokenizer

    for flag, least in (("max_length", 0), ("batch_tokens", 1)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag}: {getattr(args, flag)} found, at least {least} expected")
    if args.out:
        check_writable("out", Path(args.out))
    device, amp = choose_device(args.device), nullcontext
    tokenizer = load_tokenizer(tokenizer_spec(args.model))
    model = load_model(args.model, device=device, dtype=torch.float32)
    require_rows(args.model, model.config.vocab_size, tokenizer)
    if device.type == "cuda":
        kernels = resolve_kernels(model.config, "auto", device)
        print(use_kernels(model, kernels, device), file=sys.stderr)
        for_decoding(model)
        amp = lambda: torch.autocast("cuda", torch.bfloat16)  # noqa: E731
    limit = args.max_length or model.config.max_position_embeddings
    return Scorer(model, tokenizer, max_length=limit, batch_tokens=args.batch_tokens, amp=amp)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("--tasks", required=True, help="names of lm-eval, separated by commas")
    parser.add_argument("--num_fewshot", type=int, default=None, help="examples shown; as the task")
    parser.add_argument("--limit", type=float, default=None, help="examples asked; all")
    parser.add_argument("--include_path", default=None, help="folder with more tasks")
    parser.add_argument("--max_length", type=int, default=0, help="tokens; 0 = the model's context")
    parser.add_argument("--batch_tokens", type=int, default=32_768, help="tokens at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="", help="file for the results; empty = none")
    args = parser.parse_args(argv)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        message = 'lm-eval not found, expected after pip install -e ".[eval]"'
        raise SystemExit(_refuse(message)) from None
    sys.path.append(ROOT)
    from config import UserError

    try:
        tasks = TaskManager(include_path=args.include_path)
        names = args.tasks.split(",")
        unknown = [name for name in names if not tasks.match_tasks([name])]
        if unknown:
            raise UserError(f"--tasks: {unknown[0]} is no task of lm-eval (lm_eval ls tasks)")
        found = simple_evaluate(
            model=harness_model(build_scorer(args)), tasks=names, num_fewshot=args.num_fewshot,
            limit=args.limit, task_manager=tasks,
        )  # fmt: skip
    except UserError as e:
        raise SystemExit(_refuse(str(e))) from None
    print(make_table(found))
    if args.out:
        Path(args.out).write_text(json.dumps(found["results"], indent=1, default=str) + "\n")


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
