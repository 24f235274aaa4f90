"""Several corpora with weights: the flag, the stream of a mixture, what is refused."""

import itertools
import json
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import call_script, metric_rows
from documents import random_documents, write

from config import UserError
from data import PackedLoader, TokenDataset, eval_batches
from mixture import Mixture, open_corpora, parse_data
from tokenizer import ByteTokenizer


def test_one_data_set_is_taken_as_it_is():
    for spec in ("stdlib", "data/web", "nanogpt:data/fineweb"):
        ((data, weight),) = parse_data(spec).values()
        assert (data, weight) == (spec, 1)


def test_the_forms_of_a_mixture():
    found = parse_data("web=data/web:0.7, nanogpt:data/code:.25,stdlib:5e-2")
    assert found == {
        "web": ("data/web", Fraction(7, 10)), "code": ("nanogpt:data/code", Fraction(1, 4)),
        "stdlib": ("stdlib", Fraction(1, 20)),
    }  # fmt: skip


BAD = [
    ("a,b:0.5", "'a' found, DATA:WEIGHT"),
    ("a:0.5,", "'' found, DATA:WEIGHT"),
    ("a:0.5,nanogpt:data/b", "'nanogpt:data/b' found, DATA:WEIGHT"),
    ("a:0.5,b:much", "'b:much' found"),
    ("a:0.5,=b:1", "'=b:1' found"),
    ("a:0.5,b:0", "weight 0 of b found, a positive number"),
    ("a:0.5,b:-1", "weight -1 of b found"),
    ("a:nan,b:1", "weight nan of a found"),
    ("a:inf,b:1", "weight inf of a found"),
    ("a:1,b:1e999999999", "weight 1e999999999 of b found"),
    ("x/a:1,y/a:1", "'a' found twice"),
    ("p=a:1,q=a:1", "a found twice"),
    ("a:1,b:0.123456789", "use fewer digits"),
]


@pytest.mark.parametrize(("spec", "says"), BAD)
def test_bad_mixtures(refused, spec, says):
    assert says in refused("train", f"--data={spec}", "--tokenizer=byte")


@pytest.fixture
def corpora(tmp_path):
    """Three folders with both splits, of different sizes."""
    folders = []
    for seed, (name, count) in enumerate((("a", 150), ("b", 40), ("c", 90))):
        for split in ("train", "val"):
            documents = random_documents(count, seed=2 * seed + (split == "val"))
            folders.append(str(write(tmp_path / name, documents, split)))
    return folders[::2]


def mixture(folders, weights=(6, 1, 3), packing="concatenate", split="train"):
    parts = {folder[-1]: TokenDataset.open(folder, split) for folder in folders}
    return Mixture(parts, weights, packing)


def loader(data, **kwargs):
    settings = {"seq_len": 16, "rows_per_step": 16, "micro_batch": 2, "seed": 5, "prefetch": 0}
    return PackedLoader(data, **settings | kwargs)


def samples(batches):
    return [i for batch in batches for i in batch.sample_ids]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_step_is_the_same_on_any_number_of_ranks(corpora, world_size, packing):
    data = mixture(corpora, packing=packing)
    one = loader(data, micro_batch=16)
    ranks = [loader(data, rank=r, world_size=world_size) for r in range(world_size)]
    first, drawn, total = data.rows(16).first, [0, 0, 0], 0
    for _ in range(60):
        (whole,) = one.next_step()
        parts = [batch for rank in ranks for batch in rank.next_step()]
        assert sorted(samples(parts)) == sorted(whole.sample_ids)
        assert sum(batch.num_valid for batch in parts) == whole.num_valid
        total += 16
        for row in whole.sample_ids:
            drawn[sum(row >= f for f in first[1:-1])] += 1
        assert all(abs(d - total * w / 10) < 1 for d, w in zip(drawn, (6, 1, 3), strict=True))
        names = ("tokens/a", "tokens/b", "tokens/c")
        counts = one.tokens()
        assert counts == {n: 16 * d for n, d in zip(names, drawn, strict=True)}
    assert drawn[1] > 0 and one.epoch == total / data.rows(16).first[-1]


def test_no_rank_has_one_corpus_only(corpora):
    data = mixture(corpora[:2], (1, 1))
    border = data.rows(16).first[1]
    for r in (0, 1):
        rows = samples(loader(data, rank=r, world_size=2).next_step())
        assert {row < border for row in rows} == {True, False}


@pytest.mark.parametrize("steps", [0, 1, 37])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_is_exact(corpora, steps, prefetch):
    whole = loader(mixture(corpora), prefetch=prefetch)
    for _ in range(steps):
        whole.next_step()
    state = json.loads(json.dumps(whole.state_dict()))
    assert state.keys() == {"seed", "samples", "fingerprint", "seq_len"}
    resumed = loader(mixture(corpora), prefetch=prefetch)
    resumed.next_step()
    resumed.load_state_dict(state)
    for _ in range(20):
        for a, b in zip(whole.next_step(), resumed.next_step(), strict=True):
            assert a.sample_ids == b.sample_ids and torch.equal(a.input_ids, b.input_ids)
    whole.close()
    resumed.close()


def test_resume_with_another_batch_size_skips_nothing(corpora):
    first = loader(mixture(corpora))
    seen = samples(first.next_step())
    second = loader(mixture(corpora), rows_per_step=24)
    second.load_state_dict(first.state_dict())
    seen += samples(second.next_step())
    reference = loader(mixture(corpora), rows_per_step=40)
    assert sorted(seen) == sorted(samples(reference.next_step()))


def test_resume_refuses_other_weights_and_corpora(corpora):
    state = loader(mixture(corpora)).state_dict()
    loader(mixture(corpora, (12, 2, 6))).load_state_dict(state)  # the same ratio
    for other in (
        mixture(corpora, (6, 2, 2)),
        mixture(corpora[::-1]),
        mixture(corpora[:2], (6, 1)),
        mixture(corpora, packing="best_fit"),
        mixture(corpora[:1], (1,)),
    ):
        with pytest.raises(UserError, match=r"--data: cannot resume the data order"):
            loader(other).load_state_dict(state)


@pytest.mark.parametrize("select", [None, [3, 10, 11, 40, 41, 42, 90]])
def test_one_corpus_is_as_without_a_mixture(corpora, select):
    """Also its state: checkpoints written before there were mixtures go on."""
    dataset = TokenDataset.open(corpora[0], "train")
    plain, mixed = loader(dataset, select=select), loader(mixture(corpora[:1], (1,)), select=select)
    for _ in range(40):
        for a, b in zip(plain.next_step(), mixed.next_step(), strict=True):
            assert a.sample_ids == b.sample_ids and torch.equal(a.labels, b.labels)
    assert mixed.tokens() == {} and mixed.state_dict() == plain.state_dict()
    if select is None:
        assert plain.state_dict()["fingerprint"] == dataset.fingerprint
    assert mixture(corpora[:1], (1,)).identity() == {"data": dataset.fingerprint}


def test_held_out_rows_are_of_all_corpora(corpora):
    data = mixture(corpora, split="val")
    rows = samples(eval_batches(data, seq_len=16, max_tokens=16 * 20, micro_batch=3))
    first = data.rows(16).first
    counts = [sum(a <= row < b for row in rows) for a, b in itertools.pairwise(first)]
    assert counts == [12, 2, 6] and len(set(rows)) == 20


def test_held_out_rows_are_concatenated_always(corpora):
    spec = f"{corpora[0]}:1,{corpora[1]}:3"
    name, train, val = open_corpora(spec, ByteTokenizer(), "best_fit")
    assert (name, train.packing, val.packing) == (spec, "best_fit", "concatenate")
    assert train.names == val.names == ["a", "b"] and train.weights == val.weights == [1, 3]
    assert [part.name for part in val.parts] == [f"{folder} (val)" for folder in corpora[:2]]


def test_every_split_must_fit_the_tokenizer(tmp_path):
    """An id that no embedding has would end the first evaluation."""

    class Other(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.hash = "ab" * 8

    for split in ("train", "val"):
        write(tmp_path / "a", random_documents(60), split)
        write(tmp_path / "b", random_documents(60), split, Other())
    for path in (tmp_path / "b").glob("val-*"):
        shutil.copy(path, tmp_path / "a")
    with pytest.raises(UserError, match=r"\(val\): written with tokenizer hash abab"):
        open_corpora(str(tmp_path / "a"), ByteTokenizer(), "concatenate")


def test_the_embedded_corpus_of_a_mixture_waits(corpora):
    """Before a process group starts it is not made, but the others are checked."""
    spec = f"stdlib:1,{corpora[0]}:1"
    assert open_corpora(spec, ByteTokenizer(), "concatenate", build=False) is None
    with pytest.raises(UserError, match=r"'nowhere': no data set there"):
        open_corpora(f"{spec},nowhere:1", ByteTokenizer(), "concatenate", build=False)


def test_a_corpus_must_have_the_rows_of_a_step(corpora, tmp_path):
    small = str(write(tmp_path / "d", [[1] * 40]))  # 2 rows of 16
    data = mixture([corpora[0], small], (7, 3))
    loader(data, rows_per_step=6)
    with pytest.raises(UserError, match=r"d \(train\): 2 rows .* at least the 3 that a step of 8"):
        loader(data, rows_per_step=8)


# --- whole runs --------------------------------------------------------------------------------


def flags(tmp_path, corpora, run, *more, weights="a={}:0.6,{}:.1,{}:0.3"):
    return [
        f"--data={weights.format(*corpora)}", f"--save_model_dir={tmp_path}", f"--run={run}",
        "--device=cpu", "--dtype=float32", "--num_blocks=1", "--num_heads=2", "--embedding_dim=16",
        "--context_len=32", "--batch_size=5", "--accumulation_steps=2", "--max_steps=8",
        "--eval_tokens=320", "--sample_tokens=0", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_run_of_a_mixture_resumes(refused, corpora, tmp_path, capsys, packing):
    more = (f"--packing={packing}", "--save_every=3")
    call_script("train", *flags(tmp_path, corpora, "whole", *more))
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("rows: "))
    assert re.search(r"48 rows of a, 0\.\d+ epochs.*; 8 rows of b, .*; 24 rows of c, ", line)
    assert ("padding" in line) == (packing == "best_fit")
    assert metric_rows(tmp_path / "whole", "tokens/b")[8] == 8 * 32
    call_script("train", *flags(tmp_path, corpora, "cut", *more))
    checkpoints = tmp_path / "cut" / "checkpoints"
    shutil.rmtree(checkpoints / "step-8")
    again = (*more, "--resume=auto")
    for weights, says in (
        ("a={}:0.5,{}:.2,{}:0.3", "data_weights 6:1:3, this run 5:2:3"),
        ("a={0}:0.6,{2}:.1,{1}:0.3", "has data "),
        ("{0}", "has data "),
    ):
        line = refused("train", *flags(tmp_path, corpora, "cut", *again, weights=weights))
        assert says in line
    other = "best_fit" if packing == "concatenate" else "concatenate"
    changed = flags(tmp_path, corpora, "cut", "--resume=auto", f"--packing={other}")
    assert "packing" in refused("train", *changed)
    call_script("train", *flags(tmp_path, corpora, "cut", *again))
    assert metric_rows(tmp_path / "cut") == metric_rows(tmp_path / "whole")


def test_align_cycles_through_some_rows_of_a_mixture(corpora, tiny_teacher, tmp_path, capsys):
    data = ",".join(f"{folder}:{w}" for folder, w in zip(corpora, (6, 1, 3), strict=True))
    call_script(
        "train_kd", f"--data={data}", f"--teacher={tiny_teacher}", "--config=tests/kd.yaml",
        f"--save_model_dir={tmp_path}", "--run=kd", "--layers=1,2", "--device=cpu",
        "--dtype=float32", "--eval_tokens=320", "--sample_tokens=0", "--calibrate_tokens=320",
        "--align_unique_tokens=640", "--align_batch_tokens=320", "--distill_batch_tokens=320",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert re.search(r"^align: 12 rows of a, .*; 2 rows of b, .*; 6 rows of c, ", out, re.M)
    assert re.search(r"^distill: 36 rows of a, .*; 6 rows of b, .*; 18 rows of c, ", out, re.M)
    losses, tokens = metric_rows(tmp_path / "kd"), metric_rows(tmp_path / "kd", "tokens/c")
    assert len(losses) == 12 and sorted(tokens) == list(range(7, 13)) and tokens[12] == 18 * 32


def test_corpora_that_do_not_fit_are_refused(refused, corpora, tmp_path):
    class Other(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.hash = "ab" * 8

    for split in ("train", "val"):
        write(tmp_path / "other", random_documents(60), split, Other())
    write(tmp_path / "no-val", random_documents(60))
    write(tmp_path / "short", random_documents(60), "val")
    write(tmp_path / "short", [[1] * 40])
    (tmp_path / "gpt2").mkdir()
    for split in ("train", "val"):
        np.array([5, 6, 50256] * 200, dtype="<u2").tofile(tmp_path / "gpt2" / f"{split}.bin")
    for last, says in (
        ("other", "other (train): written with tokenizer hash abab"),
        ("no-val", "no-val: no split 'val'"),
        ("short", "short (train): 1 rows of sequence length 32 found, at least the 3"),
        ("nowhere", "nowhere': no data set there"),
        ("nanogpt:gpt2", "gpt2 (train): documents end with token 50256, expected 256"),
    ):
        kind, _, name = last.rpartition(":")
        folders = [*corpora[:2], f"{kind}:{tmp_path / name}".lstrip(":")]
        assert says in refused("train", *flags(tmp_path, folders, "run"))
