"""Checkpoints: whole or refused, the newest two, and one whole whenever the job dies."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from commrt.errors import StateError
from commrt.training import checkpoint

CPU = torch.device("cpu")
FILES = ["comm_0.pt", "comm_0.pt.sha256", "model.pt", "model.pt.sha256"]


@pytest.fixture(autouse=True)
def _one_rank(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(out, step):
    shared = {"model": torch.full((3000,), float(step))}
    return checkpoint.save(out, step=step, shared=shared, own={"rank": 0})


def load(out):
    return checkpoint.load_newest(checkpoint.find(out), CPU, {})


def names(out):
    return sorted(path.name for path in out.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    folder = save(tmp_path / "run", 7)
    found, refused = load(folder)
    assert torch.equal(found.shared["model"], torch.full((3000,), 7.0))
    assert (found.folder, found.step, found.world_size) == (folder, 7, 1)
    assert found.states == [{"rank": 0}]
    assert refused == []


def test_sha256sum_can_check_it(tmp_path):
    folder = save(tmp_path / "run", 7)
    assert names(folder) == FILES
    command = ["sha256sum", "--check", "--strict", "comm_0.pt.sha256", "model.pt.sha256"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30)
    assert result.stdout == "comm_0.pt: OK\nmodel.pt: OK\n"


def test_the_newest_two_are_kept(tmp_path):
    out = tmp_path / "run"
    for step in (5, 50, 500, 10_000_000):
        save(out, step)
    assert names(out) == ["step_0000500", "step_10000000"]
    assert [path.name for path in checkpoint.find(out)] == ["step_10000000", "step_0000500"]


def test_later_ones_are_set_aside_until_the_next(tmp_path):
    out = tmp_path / "run"
    for step in (10, 20):
        save(out, step)
    checkpoint.set_aside_later(out, 10)
    assert names(out) == ["step_0000010", "step_0000020.removed"]
    assert names(out / "step_0000020.removed") == FILES
    assert checkpoint.find(out / "step_0000020.removed") == []
    save(out, 15)
    assert names(out) == ["step_0000010", "step_0000015"]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.pt", "comm_0.pt"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: os.truncate(path, path.stat().st_size // 2), "{0} is cut short or corrupt"),
        (lambda path: os.truncate(path, 0), "{0} is cut short or corrupt"),
        (flip_a_bit, "{0} is cut short or corrupt: {0}.sha256 does not match it"),
        (Path.unlink, "{0} is missing"),
        (lambda path: path.with_name(f"{path.name}.sha256").unlink(), "{0}.sha256 is missing"),
        (lambda path: os.truncate(f"{path}.sha256", 0), "{0} is cut short or corrupt"),
        (lambda path: Path(f"{path}.sha256").write_bytes(b"\xff\0"), "{0} is cut short or corrupt"),
    ],
)
def test_one_that_is_not_whole_is_refused_and_the_one_before_taken(tmp_path, name, harm, message):
    out = tmp_path / "run"
    save(out, 1)
    harm(save(out, 2) / name)
    found, [refused] = load(out)
    assert found.step == 1
    assert refused.startswith(f"{out}/step_0000002 is refused: {message.format(name)}")


def test_without_a_whole_one_each_is_named_with_its_fault(tmp_path):
    out = tmp_path / "run"
    (save(out, 1) / "comm_0.pt").unlink()
    os.truncate(save(out, 2) / "model.pt", 10)
    with pytest.raises(StateError) as error:
        load(out)
    assert str(error.value) == (
        f"no checkpoint is whole: {out}/step_0000002 is refused: model.pt is cut short or corrupt: "
        f"model.pt.sha256 does not match it. {out}/step_0000001 is refused: comm_0.pt is missing"
    )


def test_one_of_more_ranks_needs_the_states_of_all(tmp_path):
    out = tmp_path / "run"
    with mock.patch.object(dist, "get_world_size", return_value=3):
        folder = save(out, 1)
    for rank in (1, 2):
        for name in ("comm_0.pt", "comm_0.pt.sha256"):
            path = folder / name.replace("0", str(rank))
            path.write_bytes(
                (folder / name).read_bytes().replace(b"comm_0", path.name[:6].encode())
            )
    found, _ = load(out)
    assert found.world_size == len(found.states) == 3
    (folder / "comm_2.pt").unlink()
    with pytest.raises(StateError, match=r"comm_2\.pt is missing"):
        load(out)


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
    assert checkpoint.find(out) == [older]
    partial = out / "step_0000002.partial"
    assert partial.exists()
    (partial / "model.pt").touch()
    assert checkpoint.find(partial) == []
    save(out, 2)
    assert names(out) == ["step_0000001", "step_0000002"]


class CrashError(Exception):
    """The job dies here."""


class Crash:
    """Lets a number of changes of the disk happen and ends the job before or within the next."""

    def __init__(self, after):
        self.left = after

    def __call__(self, change, half_way=None):
        def counted(*args, **options):
            self.left -= 1
            if self.left >= 0:
                return change(*args, **options)
            if half_way is not None:
                half_way(*args)
            raise CrashError

        return counted

    def patches(self):
        def remove_half(folder):
            for path in sorted(folder.iterdir())[::2]:
                path.unlink()

        return (
            mock.patch.object(Path, "rename", self(Path.rename)),
            mock.patch.object(Path, "mkdir", self(Path.mkdir)),
            mock.patch.object(shutil, "rmtree", self(shutil.rmtree, remove_half)),
            mock.patch.object(os, "fsync", self(os.fsync)),
            mock.patch.object(torch, "save", self(torch.save, lambda _, file: file.write(b"PK"))),
        )


def crashed(after, act):
    """Whether an act dies when only so many changes of the disk may happen."""
    patches = Crash(after).patches()
    try:
        for patch in patches:
            patch.start()
        act()
    except CrashError:
        return True
    finally:
        for patch in patches:
            patch.stop()
    return False


def save_newest(out):
    """The usual: a third one comes and the first one goes."""
    save(out, 30)


def save_again(out):
    """After going on from the older one, steps that exist are written once more."""
    checkpoint.set_aside_later(out, 10)
    save(out, 20)


def save_over(out):
    save(out, 20)


@pytest.mark.parametrize("act", [save_newest, save_again, save_over])
def test_wherever_the_job_dies_a_whole_one_is_left(tmp_path, act):
    for after in itertools.count():
        out = tmp_path / str(after)
        for step in (10, 20):
            save(out, step)
        died = crashed(after, lambda out=out: act(out))
        found, refused = load(out)
        assert refused == []  # what is no longer whole is no longer named like a checkpoint
        assert found.step in (10, 20, 30)
        save(out, 40)
        assert names(out)[-1] == "step_0000040"
        assert len(names(out)) == 2
        if not died:
            break
    assert after > 10


def test_none_to_find_are_none(tmp_path):
    assert checkpoint.find(tmp_path) == []
    assert checkpoint.find(tmp_path / "nowhere") == []
