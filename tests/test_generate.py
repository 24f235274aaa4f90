"""Generation: greedy, stopping, sampling, and the command."""

from __future__ import annotations

import sys

import pytest
import torch
from kit import assert_close_rms, logits, random_ids, tiny_model

import generate as script
from config import UserError
from generate import Decoder, for_decoding, generate, generate_batch, pick
from hf import save_model
from hybrid_layers import MIXERS


@pytest.mark.parametrize("kinds", ["LFS", "LL", "F"])
@pytest.mark.parametrize("prompt", [1, 4, 66])
def test_greedy_is_the_argmax_of_full_forwards(kinds, prompt):
    model = tiny_model(kinds, tie_word_embeddings=False)  # tied, it would repeat its input
    ids = random_ids(model, prompt).tolist()
    new = generate(model, ids, 12)
    assert len(new) == 12
    for i, token in enumerate(new):
        expected = logits(model, torch.tensor([ids + new[:i]]))[0, -1].argmax()
        assert token == expected, i
    assert len(set(new)) > 1


def test_lengths_and_empty_prompt():
    model = tiny_model("LF")
    assert generate(model, [1], 0) == []
    assert len(generate(model, [1], 1)) == 1
    with pytest.raises(UserError, match="prompt"):
        generate(model, [], 3)


def test_prompts_of_different_length_are_each_alone():
    model = tiny_model("LFS", tie_word_embeddings=False)
    prompts = [random_ids(model, n, seed=n).tolist() for n in (66, 1, 4, 4)]
    alone = [generate(model, p, 12) for p in prompts]
    assert generate_batch(model, prompts, 12) == alone
    eos = alone[1][5]
    other = alone[2][7]
    ends = [[i + 1 for i, t in enumerate(a) if t in (eos, other)] for a in alone]
    cut = [a[: end[0]] if end else a for a, end in zip(alone, ends, strict=True)]
    assert {a[-1] for a in cut} >= {eos, other}
    assert generate_batch(model, prompts, 12, stops={eos, other}) == cut
    assert len({len(a) for a in cut}) > 1


@pytest.mark.parametrize("name", MIXERS)
def test_a_compiled_step_is_traced_once(name):
    """And computes the same. aot_eager: the graphs without generated code."""
    if name == "sliding_window":
        model = tiny_model("SF")
    else:
        model = tiny_model("LF", mixer=[name], linear_window=5)
    prompts = [random_ids(model, n, seed=n).tolist() for n in (9, 1, 4)]
    plain, compiled = Decoder(model), Decoder(model, 40, compiled=True)
    assert_close_rms(compiled.prefill(prompts), plain.prefill(prompts))
    for block in model.layers:
        block.compile(backend="aot_eager")
    steps = [torch.tensor([i, 20 + i, 40 + i]) for i in range(8)]
    expected = [plain.step(tokens) for tokens in steps]
    actual = [compiled.step(tokens) for tokens in steps[:2]]
    compiled.stance = "fail_on_recompile"
    actual += [compiled.step(tokens).clone() for tokens in steps[2:]]
    for a, b in zip(actual, expected, strict=True):
        assert_close_rms(a, b, 1e-6)
    torch.compiler.reset()


def test_for_decoding_rounds_matrices_only():
    model = tiny_model("LLF", mixer=["gla", "rwkv6"], dtype=torch.float32, attention_bias=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for_decoding(model)
    for name, p in model.named_parameters():
        matrix = name.endswith("weight") and p.ndim == 2
        assert p.dtype == (torch.bfloat16 if matrix else torch.float32), name
        assert matrix or torch.equal(p, before[name]), name


def test_stops_after_eos():
    model = tiny_model("LFS")
    ids = random_ids(model, 4).tolist()
    free = generate(model, ids, 12)
    eos = free[5]
    assert generate(model, ids, 12, stops={eos}) == free[: free.index(eos) + 1]


def test_sampling_repeats_with_the_seed_only():
    model = tiny_model("LF", dtype=torch.float32)
    ids = random_ids(model, 4).tolist()

    def sample(seed, **kwargs):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, ids, 20, generator=generator, **kwargs)

    first = sample(1, temperature=1.0)
    assert sample(1, temperature=1.0) == first
    assert sample(2, temperature=1.0) != first
    greedy = generate(model, ids, 20)
    assert sample(1, temperature=1e-4) == greedy
    assert sample(1, temperature=1.0, top_p=1e-6) == greedy
    assert first != greedy


def test_pick_follows_temperature_and_top_p():
    probs = torch.tensor([0.05, 0.5, 0.15, 0.3])
    generator = torch.Generator().manual_seed(0)

    def shares(temperature, top_p):
        tokens = [pick(probs.log(), temperature, top_p, generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(tokens), minlength=4) / 4000

    assert pick(probs.log(), 0, 1.0, None) == 1
    assert (shares(1.0, 1.0) - probs).abs().max() < 0.03
    flat = probs.sqrt() / probs.sqrt().sum()
    assert (shares(2.0, 1.0) - flat).abs().max() < 0.03
    # .5 + .3 reach .79: the other two are out, and the rest keeps its proportions.
    assert (shares(1.0, 0.79) - torch.tensor([0, 5 / 8, 0, 3 / 8])).abs().max() < 0.03
    assert shares(1.0, 0.81)[2] > 0.1


@pytest.fixture
def folder(tmp_path):
    model = tiny_model("LF", dtype=torch.bfloat16, vocab_size=257, eos_token_id=256)
    save_model(model, tmp_path / "m", tokenizer_from="byte")
    return str(tmp_path / "m")


def test_command_with_several_prompts(folder, capsys):
    script.main([folder, "ab c", "d", "--max_new_tokens", "5", "--device", "cpu"])
    lines = capsys.readouterr().out
    assert lines.startswith("ab c") and "\nd" in lines


def test_chat_is_for_models_that_know_its_turns(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main([folder, "hi", "--device", "cpu", "--chat"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: --chat: ") and err.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--temperature", "1", "--top_p", "0.5"]])
def test_command(folder, flags, capsys):
    script.main([folder, "ab c", "--max_new_tokens", "5", "--device", "cpu", *flags])
    out = capsys.readouterr().out
    assert out.startswith("ab c")
    assert len(out.strip()) > 4


@pytest.mark.parametrize(
    "flag",
    ["--temperature=nan", "--temperature=-0.5", "--temperature=1e-40", "--top_p=0",
     "--max_new_tokens=-3", f"--seed={2**64}"],
)  # fmt: skip
def test_settings_that_cannot_be(folder, flag, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main([folder, "ab", "--device", "cpu", flag])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"error: {flag.split('=')[0]}: ")
    assert err.count("\n") == 1


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, capsys):
    model = tiny_model("LF", vocab_size=200, eos_token_id=5)
    save_model(model, tmp_path / "m", tokenizer_from="byte")
    with pytest.raises(SystemExit) as stop:
        script.main([str(tmp_path / "m"), "\u00e9", "--device", "cpu"])
    says = "vocab_size 200 found, at least the 257 of its tokenizer byte expected"
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'm'}: {says}\n"


@pytest.mark.parametrize("flags", [[], ["--temperature", "1"]])
def test_logits_that_are_not_finite(flags, tmp_path, capsys):
    model = tiny_model("LF", dtype=torch.float32, vocab_size=257, eos_token_id=256)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    save_model(model, tmp_path / "m", tokenizer_from="byte")
    with pytest.raises(SystemExit) as stop:
        script.main([str(tmp_path / "m"), "a", "bc", "--device", "cpu", *flags])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'm'}: logits are not finite\n"


def test_chat_encodes_control_tokens_as_such(folder, monkeypatch):
    """The prompt of --chat holds <|im_start|>, which must not be spelled out in pieces."""
    asked = []

    class Spy:
        stops, vocab_size = (256,), 257

        def encode(self, text, *, special_tokens=False):
            asked.append((text, special_tokens))
            return [5]

        prompt = encode

        def continuation(self, prompt, new):
            assert prompt == [5] and len(new) == 1
            return ""

    monkeypatch.setattr(script, "load_tokenizer", lambda spec: Spy())
    for flags in ([], ["--chat"]):
        script.main([folder, "hi", "--max_new_tokens", "1", "--device", "cpu", *flags])
    assert asked[:2] == [("hi", False), ("<|im_start|>", True)]
    text, special = asked[2]
    assert special and text.startswith("<|im_start|>user\nhi<|im_end|>\n")


def test_command_refuses_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    for device, says in (("cpu", "nowhere"), ("abacus", "--device")):
        with pytest.raises(SystemExit) as stop:
            script.main([str(tmp_path / "nowhere"), "hi", "--device", device])
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and says in err
