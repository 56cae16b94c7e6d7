"""Checkpoints: whole or not there, the newest two, and found again."""

import pytest
import torch
import torch.distributed as dist

from commrt.errors import StateError
from commrt.training import checkpoint


@pytest.fixture(autouse=True)
def _one_rank(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(out, step):
    return checkpoint.save(out, step=step, shared={"model": torch.ones(3)}, own={"rank": 0})


def names(out):
    return sorted(path.name for path in out.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    folder = save(tmp_path / "run", 7)
    shared, own = checkpoint.load(folder)
    assert torch.equal(shared["model"], torch.ones(3))
    assert (shared["step"], shared["world_size"], own) == (7, 1, {"rank": 0})


def test_the_newest_two_are_kept(tmp_path):
    out = tmp_path / "run"
    for step in (5, 50, 500, 10_000_000):
        save(out, step)
    assert names(out) == ["step_0000500", "step_10000000"]
    assert checkpoint.find(out).name == "step_10000000"


def test_later_ones_of_another_try_go(tmp_path):
    out = tmp_path / "run"
    for step in (10, 20, 15):
        save(out, step)
    assert names(out) == ["step_0000010", "step_0000015"]


def test_a_half_written_one_is_never_taken_for_whole(tmp_path, monkeypatch):
    out = tmp_path / "run"
    older = save(out, 1)

    def fail(state, file):
        file.write(b"half of")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="No space"):
            save(out, 2)
    assert checkpoint.find(out) == older
    partial = out / "step_0000002.partial"
    assert partial.exists()
    (partial / "model.pt").touch()
    with pytest.raises(StateError, match="holds no checkpoint"):
        checkpoint.find(partial)
    save(out, 2)
    assert names(out) == ["step_0000001", "step_0000002"]


def test_a_step_can_be_saved_again(tmp_path):
    save(tmp_path / "run", 3)
    save(tmp_path / "run", 3)
    assert names(tmp_path / "run") == ["step_0000003"]


def test_none_to_find_is_an_error(tmp_path):
    with pytest.raises(StateError, match=f"{tmp_path} holds no checkpoint"):
        checkpoint.find(tmp_path)


def test_another_number_of_ranks_is_an_error(tmp_path):
    folder = save(tmp_path / "run", 1)
    shared = torch.load(folder / "model.pt", weights_only=True)
    torch.save({**shared, "world_size": 4}, folder / "model.pt")
    with pytest.raises(StateError, match="was written by 4 ranks: it cannot be resumed by 1"):
        checkpoint.load(folder)
