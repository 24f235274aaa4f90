"""Checkpoints: bitwise round trips, every kind of damage named, no pickle read, 2 ranks = 1."""

from __future__ import annotations

import json
import logging
import pickle
import random
import resource
import shutil
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import leave
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import checkpoint as ckpt
from config import UserError


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(7, 5, generator=g)
    return {
        "model.rows": rows,
        "model.head": torch.randn(3, 11, generator=g).bfloat16(),
        "model.transposed": torch.randn(4, 6, generator=g).t(),
        "model.slice_a": (big := torch.randn(10, 3, generator=g))[2:5],
        "model.slice_b": big[5:6],
        "model.odd_values": torch.tensor([float("nan"), -0.0, float("-inf"), 1e-42]),
        "optim.step": torch.tensor(17.0),
        "optim.count": torch.tensor(-(2**53) - 1),
        "optim.mask": torch.tensor([True, False, True]),
        "optim.empty": torch.empty(0, 3),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def poisoned(tensors: dict) -> dict:
    """Same shapes and dtypes, other values: a load that does nothing must be seen."""
    return {k: torch.full_like(v, 1).contiguous() for k, v in tensors.items()}


def save(run, step, **kwargs):
    return ckpt.save_checkpoint(run, step, some_tensors(step), {"step": step}, **kwargs)


def flip(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_round_trip_is_bitwise_and_in_place(tmp_path):
    state = {"step": 3, "loss": 0.1 + 0.2, "loader": {"epoch": 0, "seen": [1, 2]}, "best": None}
    path = ckpt.save_checkpoint(tmp_path, 3, some_tensors(), state)
    assert path == tmp_path / "checkpoints" / "step-3"
    assert ckpt.verify_checkpoint(path) is None
    assert ckpt.read_state(path) == state
    into = poisoned(some_tensors())
    pointers = {k: v.data_ptr() for k, v in into.items()}
    ckpt.load_tensors(path, into)
    assert_same(into, some_tensors())
    assert pointers == {k: v.data_ptr() for k, v in into.items()}
    expected = {k: (v.shape, v.dtype) for k, v in some_tensors().items()}
    assert ckpt.tensor_names(path) == expected
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_parameters_that_require_grad_are_loaded_in_place(tmp_path):
    source, target = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    path = ckpt.save_checkpoint(tmp_path, 1, dict(source.named_parameters()), {})
    weight = target.weight
    ckpt.load_tensors(path, dict(target.named_parameters()))
    assert target.weight is weight and torch.equal(weight, source.weight)


def test_large_checkpoints_are_split_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt, "MAX_FILE_BYTES", 100)
    path = save(tmp_path, 1)
    assert len(list(path.glob("*.safetensors"))) > 3
    into = poisoned(some_tensors(1))
    ckpt.load_tensors(path, into)
    assert_same(into, some_tensors(1))


def test_one_flipped_bit_or_lost_byte_in_any_file_is_found_and_named(tmp_path):
    path = save(tmp_path, 1)
    files = sorted(p.name for p in path.iterdir())
    assert {"manifest.json", "state.json"} < set(files)
    for name in files:
        intact = (path / name).read_bytes()
        for position in {0, 9, len(intact) // 2, len(intact) - 1}:
            flip(path / name, position)
            assert name in (ckpt.verify_checkpoint(path) or "fine"), (name, position)
            (path / name).write_bytes(intact)
        (path / name).write_bytes(intact[:-1])
        assert name in (ckpt.verify_checkpoint(path) or "fine"), name
        (path / name).write_bytes(intact)
        (path / name).unlink()
        assert name in (ckpt.verify_checkpoint(path) or "fine"), name
        (path / name).write_bytes(intact)
    assert ckpt.verify_checkpoint(path) is None


def test_reading_needs_every_file_at_its_size(tmp_path):
    """Reading does not hash, but a lost shard would leave rows unread without an error."""
    path = save(tmp_path, 1)
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(UserError, match=rf"{shard.name} has \d+ bytes, expected \d+"):
        ckpt.load_tensors(path, poisoned(some_tensors(1)))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        ckpt.tensor_names(path)


def test_every_byte_of_the_manifest_counts(tmp_path):
    path = save(tmp_path, 1)
    for position in range((path / "manifest.json").stat().st_size):
        flip(path / "manifest.json", position)
        assert "manifest.json" in (ckpt.verify_checkpoint(path) or "fine"), position
        flip(path / "manifest.json", position)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    path = save(tmp_path, 1)
    shutil.copy(next(path.glob("*.safetensors")), path / "stray.safetensors")
    assert "stray.safetensors" in ckpt.verify_checkpoint(path)
    with pytest.raises(UserError, match=r"stray\.safetensors"):
        ckpt.load_tensors(path, poisoned(some_tensors(1)))


def test_order_is_numeric_and_the_newest_are_kept(tmp_path):
    for step in (200, 1000, 900):
        save(tmp_path, step, keep=5)
    assert [p.name for p in ckpt.list_checkpoints(tmp_path)] == [
        "step-200",
        "step-900",
        "step-1000",
    ]
    save(tmp_path, 1100, keep=2)
    assert [p.name for p in ckpt.list_checkpoints(tmp_path)] == ["step-1000", "step-1100"]
    assert ckpt.find_checkpoint(tmp_path, explicit=False).name == "step-1100"


def test_going_back_neither_prunes_the_new_checkpoint_nor_the_later_ones(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step, keep=3)
    save(tmp_path, 150, keep=2)
    names = [p.name for p in ckpt.list_checkpoints(tmp_path)]
    assert names == ["step-100", "step-150", "step-200", "step-300"]
    path = ckpt.save_checkpoint(tmp_path, 200, {"w": torch.ones(2)}, {"again": True}, keep=2)
    assert ckpt.read_state(path) == {"again": True} and ckpt.verify_checkpoint(path) is None
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-150", "step-200", "step-300"]


def test_keep_below_two_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="--keep_checkpoints=1"):
        save(tmp_path, 1, keep=1)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_is_ignored_and_cleared_by_the_next(tmp_path):
    save(tmp_path, 1)
    stale = tmp_path / "checkpoints" / "step-2.tmp"
    shutil.copytree(tmp_path / "checkpoints" / "step-1", stale)
    assert [p.name for p in ckpt.list_checkpoints(tmp_path)] == ["step-1"]
    assert ckpt.find_checkpoint(tmp_path, explicit=False).name == "step-1"
    save(tmp_path, 3)
    assert not stale.exists()


def test_a_crash_at_any_point_of_a_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    for victim in ("write_tensors", "_write_text", "file_entry", "_manifest_bytes"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is gone"):
            patch.setattr(ckpt, victim, _raise_disk_is_gone)
            save(tmp_path, 2)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-1"], victim
    assert ckpt.verify_checkpoint(tmp_path / "checkpoints" / "step-1") is None


def _raise_disk_is_gone(*args, **kwargs):
    raise OSError("disk is gone")


def test_a_full_disk_is_an_error_with_the_path_and_harms_nothing(tmp_path):
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # write() fails beyond it
        with pytest.raises(OSError, match=r"step-2\.tmp"):
            ckpt.save_checkpoint(tmp_path, 2, {"w": torch.randn(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert ckpt.verify_checkpoint(tmp_path / "checkpoints" / "step-1") is None


def test_an_unusable_run_folder_is_an_os_error_with_the_path(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match="checkpoints"):
        save(tmp_path, 1)


class Malicious:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.mark.parametrize("name", [".metadata", "model.pt", "optim.pth", "x.pkl", "__0_0.distcp"])
def test_a_planted_pickle_is_refused_and_never_executed(tmp_path, name):
    marker = tmp_path / "executed"
    path = save(tmp_path, 1)
    (path / name).write_bytes(pickle.dumps(Malicious(marker)))
    assert name in ckpt.verify_checkpoint(path)
    for use in (
        ckpt.read_state,
        ckpt.tensor_names,
        lambda p: ckpt.load_tensors(p, poisoned(some_tensors(1))),
        lambda p: ckpt.find_checkpoint(p, explicit=True),
        lambda _: ckpt.find_checkpoint(tmp_path, explicit=False),
    ):
        with pytest.raises(UserError, match="pickle") as error:
            use(path)
        assert "\n" not in str(error.value)
    assert not marker.exists()
    pickle.loads((path / name).read_bytes())  # the plant does work
    assert marker.exists()


def test_the_safetensors_reader_itself_ignores_a_planted_metadata_pickle(tmp_path, monkeypatch):
    """Should the refusal above ever be lost, torch's reader must still not unpickle."""
    path = save(tmp_path, 1)
    (path / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    monkeypatch.setattr(ckpt, "_refuse_unfinished", lambda path: None)
    into = poisoned(some_tensors(1))
    ckpt.load_tensors(path, into)
    assert_same(into, some_tensors(1))
    assert not (tmp_path / "executed").exists()


def test_auto_resume_names_the_damaged_newest_and_takes_the_one_before(tmp_path, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    folder = tmp_path / "checkpoints"
    shard = next((folder / "step-3").glob("*.safetensors"))
    flip(shard, shard.stat().st_size - 1)
    (folder / "step-2" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert ckpt.find_checkpoint(tmp_path, explicit=False) == folder / "step-1"
    messages = [r.getMessage() for r in caplog.records if r.name == ckpt.logger.name]
    assert len(messages) == 2
    assert "step-3" in messages[0] and shard.name in messages[0] and "using step-1" in messages[0]
    assert "step-2" in messages[1] and "manifest.json is missing" in messages[1]


def test_auto_resume_refuses_to_begin_again_where_all_are_damaged(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
        flip(tmp_path / "checkpoints" / f"step-{step}" / "state.json", 3)
    with pytest.raises(UserError, match=r"step-2.*state\.json.*none is intact") as error:
        ckpt.find_checkpoint(tmp_path, explicit=False)
    assert "\n" not in str(error.value)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_checkpoint_asked_for_by_name_must_be_intact(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    folder = tmp_path / "checkpoints"
    flip(folder / "step-2" / "state.json", 3)
    for named in (folder / "step-2", tmp_path, folder):
        with pytest.raises(UserError, match=r"step-2.*state\.json") as error:
            ckpt.find_checkpoint(named, explicit=True)
        assert "\n" not in str(error.value)
    assert ckpt.find_checkpoint(folder / "step-1", explicit=True) == folder / "step-1"
    with pytest.raises(UserError, match=r"step-9.*no such folder"):
        ckpt.find_checkpoint(folder / "step-9", explicit=True)
    with pytest.raises(UserError, match="found none"):
        ckpt.find_checkpoint(tmp_path / "nowhere", explicit=True)
    assert ckpt.find_checkpoint(tmp_path / "nowhere", explicit=False) is None


def test_load_names_what_does_not_fit(tmp_path):
    path = save(tmp_path, 1)

    def load(change, **kwargs):
        into = poisoned(some_tensors(1))
        change(into)
        ckpt.load_tensors(path, into, **kwargs)

    with pytest.raises(UserError, match=r"lacks model\.new") as error:
        load(lambda t: t.update({"model.new": torch.ones(2)}))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"holds optim\.step"):
        load(lambda t: t.pop("optim.step"))
    load(lambda t: t.pop("optim.step"), partial=True)
    with pytest.raises(UserError, match=r"model\.rows is \(7, 5\).*expected \(5, 7\)"):
        load(lambda t: t.update({"model.rows": torch.ones(5, 7)}))
    with pytest.raises(UserError, match=r"model\.head is .*bfloat16, expected .*float32"):
        load(lambda t: t.update({"model.head": torch.ones(3, 11)}))


def test_our_own_mistakes_are_caught(tmp_path):
    weight = torch.randn(3, 2)
    with pytest.raises(AssertionError, match="embed and head share storage"):
        ckpt.save_checkpoint(tmp_path, 1, {"embed": weight, "head": weight}, {})
    with pytest.raises(AssertionError, match="meta tensor"):
        ckpt.save_checkpoint(tmp_path, 1, {"w": torch.ones(2, device="meta")}, {})
    with pytest.raises(TypeError, match="key 3"):
        ckpt.save_checkpoint(tmp_path, 1, {}, {"loader": {3: "x"}})
    with pytest.raises(TypeError):
        ckpt.save_checkpoint(tmp_path, 1, {}, {"tensor": weight})
    assert ckpt.list_checkpoints(tmp_path) == []


def test_rng_state_survives_json():
    def draw():
        return [
            torch.rand(3).tolist(),
            random.random(),
            random.gauss(0, 1),
            np.random.rand(2).tolist(),
            np.random.randn(),
        ]

    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    draw()  # leaves a spare Gaussian in both generators
    saved = json.loads(json.dumps(ckpt.rng_state()))
    first = draw()
    assert draw() != first
    ckpt.set_rng_state(saved)
    assert draw() == first


def sharded(mesh) -> dict:
    """Replicated tensors beside DTensors cut unevenly (rank 1 gets fewer rows, or none)."""
    plain = some_tensors(8)
    return {
        **plain,
        "model.rows": distribute_tensor(plain["model.rows"], mesh, [Shard(0)]),
        "model.head": distribute_tensor(plain["model.head"], mesh, [Shard(1)]),
        "model.slice_b": distribute_tensor(plain["model.slice_b"].clone(), mesh, [Shard(0)]),
    }


def two_rank_worker(rank: int, port: int, run, other_run) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ranks = {"rank": rank, "world_size": 2}
    mesh = init_device_mesh("cpu", (2,))
    path = ckpt.save_checkpoint(run, 5, sharded(mesh), {"rank": rank}, **ranks)
    assert ckpt.find_checkpoint(run, explicit=True, **ranks) == path
    assert ckpt.read_state(path) == {"rank": 0}

    for source in (path, other_run / "checkpoints" / "step-8"):  # written by 2 ranks, and by 1
        into = {k: v * 0 if v.is_floating_point() else v ^ v for k, v in sharded(mesh).items()}
        ckpt.load_tensors(source, into)
        full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in into.items()}
        assert_same(full, some_tensors(8))

    # A failure of one rank reaches both, neither waits for ever, and nothing is left behind.
    alias = torch.ones(2)
    tensors = {"a": alias, "b": alias if rank == 1 else torch.ones(2)}
    with pytest.raises((AssertionError, OSError), match="share storage"):
        ckpt.save_checkpoint(run, 6, tensors, {}, **ranks)
    with pytest.raises(UserError, match="no such folder"):
        ckpt.find_checkpoint(run / "checkpoints" / "step-6", explicit=True, **ranks)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-5"]
    leave()


def test_two_ranks_write_what_one_rank_reads_and_the_reverse(tmp_path):
    save(tmp_path / "one", 8)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(two_rank_worker, args=(port, tmp_path / "two", tmp_path / "one"), nprocs=2)

    path = tmp_path / "two" / "checkpoints" / "step-5"
    into = poisoned(some_tensors(8))
    ckpt.load_tensors(path, into)
    assert_same(into, some_tensors(8))

    holders = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                holders.setdefault(name, []).append(file.name)
    assert len({name for files in holders.values() for name in files}) == 2
    replicated = [n for n in holders if n not in ("model.rows", "model.head", "model.slice_b")]
    assert all(len(holders[name]) == 1 for name in replicated)  # written once, not once a rank
    assert len(holders["model.rows"]) == 2
