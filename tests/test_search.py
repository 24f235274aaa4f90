"""--layers auto:SHARE on teachers of which it is known which layers matter."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch
from conftest import call_script, run_python
from kit import tiny_model
from test_runs import kd_flags, weights

from config import Search, UserError
from data import TokenDataset
from distributed import World
from evaluate import Evaluator
from hf import load_model, read_config, save_model
from hybrid_layers import convert_layers, copy_mixers, mixer_parameters, restore_layers
from layer_lists import auto_share, uniform_layers
from model import Transformer
from recall import Question, questions
from search import answer_batches, choose_layers, made_softmax, pattern_table, uniform_pattern
from tokenizer import load_tokenizer

CPU = World(0, 1, torch.device("cpu"))


def test_shares():
    assert auto_share("auto:0.75") == 0.75 and auto_share("3:1") is None
    for bad in ("auto", "auto:", "auto:0", "auto:1", "auto:x", "auto:-0.5"):
        with pytest.raises(UserError, match="--layers"):
            auto_share(bad)


def test_the_uniform_pattern_is_a_ratio_where_it_can_be():
    assert uniform_layers(8, 0.75) == [0, 1, 2, 4, 5, 6]  # 3:1
    assert uniform_layers(6, 0.5) == [0, 2, 4]  # 1:1
    assert 30 - len(uniform_layers(30, 0.75)) == 7 and 30 - len(uniform_layers(30, 0.9)) == 3
    assert uniform_pattern([1, 2, 5, 9], 0.5) == [1, 5]
    with pytest.raises(UserError, match=r"auto:0\.9"):
        uniform_pattern([1, 2], 0.9)


def test_answers_are_what_is_scored():
    """The labels of a batch are the answers' tokens, and nothing of another row or the padding."""
    tokenizer = load_tokenizer("byte")
    asked = questions(tokenizer, tasks=("passkey", "copy"), lengths=(512, 900), samples=1)
    batches = answer_batches(asked, tokenizer, 3)
    assert sum(len(b.sample_ids) for b in batches) == len(asked)
    found = []
    for batch in batches:
        assert batch.num_valid == (batch.labels >= 0).sum()
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            where = (labels >= 0).nonzero()[:, 0]
            prompt = ids[: where[0] + 1].tolist()
            assert ids[where[1:]].equal(labels[where[:-1]])
            found.append((tokenizer.decode(labels[where].tolist()).strip(), prompt))
    wanted = sorted((q.answer, q.prompt) for q in asked)
    assert sorted(found) == wanted


def test_scored_answers_are_what_would_be_generated():
    """A model that is certain of the right bytes has cross-entropy 0 on the answers only."""
    tokenizer = load_tokenizer("byte")
    question = Question("passkey", 20, 0.0, tokenizer.encode("a b"), "b b")

    class Oracle:
        config = tiny_model("F").config
        embed_tokens = torch.nn.Embedding(257, 257)
        head_weight = torch.eye(257)

        def __call__(self, input_ids, **_):  # after "b" a blank, after a blank "b"
            b, blank = tokenizer.encode("b")[0], tokenizer.encode(" ")[0]
            hidden = torch.zeros(*input_ids.shape, 257)
            hidden[..., b] = 50.0 * (input_ids == blank)
            hidden[..., blank] = 50.0 * (input_ids == b)
            return hidden

    scores = Evaluator(answer_batches([question], tokenizer, 1), None)(Oracle())
    assert scores["ce"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kinds", ["FFSF"])
@pytest.mark.parametrize("share", [False, True])
def test_restore_is_the_inverse_of_convert(kinds, share):
    teacher = tiny_model(kinds, dtype=torch.float32)
    student = convert_layers(teacher, [0, 1, 3], mixer="gla,kda,sliding_window", share_trunk=share,
                             linear_window=teacher.config.sliding_window)  # fmt: skip
    kept = {n: p.clone() for n, p in mixer_parameters(student, [1]).items()}
    restore_layers(student, teacher, [0, 3])
    assert student.config.layer_map() == "FLSF" and student.config.mixer == ["kda"]
    assert all(p.equal(kept[n]) for n, p in mixer_parameters(student, [1]).items())
    for i in (0, 3):
        for name, p in teacher.layers[i].named_parameters():
            mine = student.layers[i].get_parameter(name)
            assert mine.equal(p) and (mine is p) == share
    restore_layers(student, teacher, [1])
    assert student.config.layer_map() == kinds and not student.config.mixer
    ids = torch.arange(20)[None]
    assert student(ids).equal(teacher(ids))


def test_a_layer_of_a_compiled_model_is_compiled_too():
    """The model prepares inputs for one kernel, which its layers have to take."""
    model = tiny_model("FF", dtype=torch.float32)
    for m in (model, *(block.self_attn for block in model.layers)):
        m.compiled = True
    own = convert_layers(model, [0], mixer="sliding_window", linear_window=4)
    assert own.layers[0].self_attn.compiled and own.layers[1].self_attn.compiled
    lengths = torch.tensor([0, 5, 12], dtype=torch.int32)
    own(torch.zeros(1, 12, dtype=torch.int64), cu_seqlens=lengths)


def test_mixers_of_another_shape_are_refused():
    teacher = tiny_model("FFF", dtype=torch.float32)
    student = convert_layers(teacher, [0, 1])
    aligned = convert_layers(teacher, [0, 1, 2])
    torch.nn.init.normal_(aligned.layers[1].linear_attn.q_proj.weight)
    copy_mixers(student, aligned, [0, 1])
    mine, theirs = (m.layers[1].linear_attn.state_dict() for m in (student, aligned))
    assert all(mine[n].equal(theirs[n]) for n in mine)
    with pytest.raises(UserError, match=r"--aligned: nothing found as layers\.0"):
        copy_mixers(student, convert_layers(teacher, [1]), [0, 1])
    with pytest.raises(UserError, match="--aligned"):
        copy_mixers(student, convert_layers(teacher, [0, 1], linear_conv=2), [0, 1])


@pytest.fixture(scope="module")
def lopsided(tiny_teacher):
    """Of its four softmax layers two do nothing: 0 and 3."""
    teacher = load_model(tiny_teacher)
    assert teacher.config.layer_map() == "FFFF"
    with torch.no_grad():
        for i in (0, 3):
            teacher.layers[i].self_attn.o_proj.weight.zero_()
    return teacher.eval().requires_grad_(False)


@pytest.mark.parametrize("scorer", ["swap", "drop", "window", "greedy", "gates"])
def test_layers_that_matter_stay_softmax(scorer, lopsided, tiny_data):
    student = convert_layers(lopsided, [0, 1, 2, 3])
    with torch.no_grad():  # badly aligned where attention matters, perfectly where it does not
        for i in (1, 2):
            student.layers[i].linear_attn.o_proj.weight.mul_(-1)
    settings = Search(scorer=scorer, tokens=512, seq_len=64, recall_samples=0, gate_steps=30,
                      window=2)  # fmt: skip
    before = list(student.layers)
    found = choose_layers(
        student, lopsided, [0, 1, 2, 3], share=0.5, settings=settings,
        train_data=TokenDataset.open(tiny_data, "train"),
        val_data=TokenDataset.open(tiny_data, "val"), tokenizer=load_tokenizer("byte"),
        amp=nullcontext,
        world=CPU, seed=0,
    )  # fmt: skip
    assert list(student.layers) == before  # nothing is left swapped
    assert found["linear"] == [0, 3] and found["uniform"] == [0, 2]
    scores = {row["layer"]: row["score"] for row in found["layers"]}
    assert min(scores[1], scores[2]) > max(scores[0], scores[3])
    assert found["patterns"]["chosen"]["kl"] == pytest.approx(0, abs=1e-5)
    assert found["patterns"]["uniform"]["kl"] > 0.01
    with made_softmax(student, lopsided, [1, 2]):
        ids = torch.arange(40)[None]
        assert torch.allclose(student(ids), lopsided(ids), atol=1e-5)
    table = pattern_table(found, 4)
    assert [row["layers"] for row in table] == ["LFFL", "LFLF", "LLLL", "FFFF"]
    assert table[2]["kl"] == round(found["baseline"]["kl"], 4) > table[3]["kl"] == 0
    if scorer != "gates":  # KL with layer 0 alone softmax, or (drop, window) alone something else
        kl = {row["layer"]: row["kl"] for row in found["layers"]}
        base = 0 if scorer in ("drop", "window") else found["baseline"]["kl"]
        assert kl[0] == pytest.approx(base, abs=1e-5) and abs(kl[1] - base) > 0.01
        assert found["noise"] >= 0 and scores[0] == pytest.approx(0, abs=1e-4)


FLAGS = ("--layers=auto:0.5", "--search_tokens=512", "--search_seq_len=64",
         "--search_recall_samples=0")  # fmt: skip


def test_search_within_a_run(tiny_teacher, tiny_data, tmp_path, capsys, refused):
    """One command: align all, choose, distil the chosen. Resumed anywhere it is the same."""
    often = ("--save_every=10", "--keep_checkpoints=9")
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "a", *FLAGS, *often))
    out, run = capsys.readouterr().out, tmp_path / "a"
    found = json.loads((run / "layer_scores.json").read_text())
    config = read_config(run / "model")
    assert "LLLL" in out and config.layer_map() in out and "uniform" in out
    linear = [i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    assert linear == found["linear"] and len(linear) == 2
    rows = [row["model"] for row in json.loads((run / "table.json").read_text())]
    assert rows[-3:] == [
        "student after align", "student with the chosen layers", "student after distill",
    ]  # fmt: skip

    # inside align, at its end (before the choice) and inside distill
    for step in (20, 30, 40):
        again = kd_flags(tiny_teacher, tiny_data, tmp_path, f"from-{step}", *FLAGS, *often)
        call_script("train_kd", *again, f"--resume={run / 'checkpoints' / f'step-{step}'}")
        folder = tmp_path / f"from-{step}"
        assert json.loads((folder / "layer_scores.json").read_text())["linear"] == linear
        mine, theirs = weights(run / "model"), weights(folder / "model")
        assert mine.keys() == theirs.keys()
        assert all(mine[name].equal(theirs[name]) for name in mine), step

    again = kd_flags(tiny_teacher, tiny_data, tmp_path, "x", *FLAGS, *often)
    (run / "layer_scores.json").unlink()
    at = f"--resume={run / 'checkpoints' / 'step-40'}"
    assert "layer_scores.json: the run's choice" in refused("train_kd", *again, at)
    other = (*again, "--search_scorer=greedy", at)
    assert "search" in refused("train_kd", *other)


def test_a_search_without_text_or_questions_is_refused(tiny_teacher, tiny_data, tmp_path, refused):
    for length, samples, line in ((8, 2, "--search_seq_len: 8 found"), (90_000, 0, "90001")):
        more = (f"--search_seq_len={length}", f"--search_recall_samples={samples}")
        flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "x", "--layers=auto:0.5", *more)
        assert line in refused("train_kd", *flags)
        assert not (tmp_path / "x").exists()  # before anything is trained


def test_aligned_mixers_are_taken_over(tiny_teacher, tiny_data, tmp_path, refused):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "all", "--layers=all", "--stages=align")
    call_script("train_kd", *flags)
    aligned = f"--aligned={tmp_path / 'all' / 'model'}"
    more = ("--layers=0,2", "--stages=distill", "--distill_lr=0", "--distill_mixer_lr=0", aligned)
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "some", *more))
    whole, some = weights(tmp_path / "all" / "model"), weights(tmp_path / "some" / "model")
    mixers = [name for name in some if ".linear_attn." in name]
    assert {name.split(".")[1] for name in mixers} == {"0", "2"}
    assert all(some[name].equal(whole[name]) for name in mixers)

    call = lambda name, *more: refused(  # noqa: E731
        "train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, name, *more)
    )
    assert "gated_deltanet found at layer 1" in call("x", aligned, "--mixer=gla", "--layers=1")
    rope = ("--layers=0,2", "--stages=distill", "--linear_rope=True", aligned)
    assert "linear_rope False found, True expected" in call("x", *rope)
    assert "--aligned" in call("x", "--aligned=nowhere")
    done = f"--student={tmp_path / 'some' / 'model'}"
    assert "none expected with a --student that is converted" in call("x", aligned, done)
    assert "--aligned" in call("x", "--layers=auto:0.5", "--stages=distill")
    assert "auto:0.9 found" in call("x", "--layers=auto:0.9")


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_student_of_its_own_is_not_searched(kv_heads, tiny_teacher, tiny_data, tmp_path, refused):
    """Its layers would become the teacher's softmax layers, which may not even fit."""
    shape = read_config(tiny_teacher)
    other = Transformer(dataclasses.replace(shape, num_key_value_heads=kv_heads))
    other.init_weights()
    save_model(other, tmp_path / "other", tokenizer_from="byte")
    flags = lambda folder, *more: kd_flags(  # noqa: E731
        tiny_teacher, tiny_data, tmp_path, "x", f"--student={folder}", "--dry_run", *more
    )
    err = refused("train_kd", *flags(tmp_path / "other", *FLAGS))
    assert "--student: an unconverted model found with --layers auto:0.5" in err
    call_script("train_kd", *flags(tmp_path / "other"))  # layers by number
    call_script("train_kd", *flags(tiny_teacher, *FLAGS))


def test_windows_that_do_not_fit_are_refused_at_once(tiny_teacher, tiny_data, tmp_path, refused):
    """Not after the stage align: a model has one length of windows, the teacher's where it has."""
    kinds = ["sliding_attention", *read_config(tiny_teacher).layer_types[1:]]
    shape = dataclasses.replace(read_config(tiny_teacher), layer_types=kinds, sliding_window=5)
    teacher = Transformer(shape)
    teacher.init_weights()
    save_model(teacher, tmp_path / "teacher", tokenizer_from="byte")
    flags = lambda *more: kd_flags(  # noqa: E731
        tmp_path / "teacher", tiny_data, tmp_path, "x", "--dry_run", *FLAGS, *more
    )
    err = refused("train_kd", *flags("--search_scorer=window", "--search_window=8"))
    assert "--search_window: 8 found" in err and "sliding layers of 5" in err
    assert "--search_scorer window" in err
    call_script("train_kd", *flags("--search_scorer=window", "--search_window=5"))
    call_script("train_kd", *flags("--search_scorer=drop", "--search_window=8"))


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["swap", "gates"])
def test_two_ranks_choose_alike(scorer, tiny_teacher, tiny_data, tmp_path):
    """The scores are those of one process up to rounding (swap); both ranks restore the same."""
    more = (*FLAGS, "--stages=align", f"--search_scorer={scorer}", "--search_gate_steps=20",
            "--dtype=float32")  # fmt: skip
    flags = {n: kd_flags(tiny_teacher, tiny_data, tmp_path, f"r{n}", *more) for n in (1, 2)}
    call_script("train_kd", *flags[1])
    run_python("train_kd.py", *flags[2], ranks=2)
    one, two = (json.loads((tmp_path / f"r{n}" / "layer_scores.json").read_text()) for n in (1, 2))
    config = read_config(tmp_path / "r2" / "model")
    letters = "".join("L" if i in two["linear"] else "F" for i in range(4))
    assert config.layer_map() == letters
    if scorer == "swap":
        assert one["linear"] == two["linear"]
        for a, b in zip(one["layers"], two["layers"], strict=True):
            assert a["kl"] == pytest.approx(b["kl"], rel=1e-2)
