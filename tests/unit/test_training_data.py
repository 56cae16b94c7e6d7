"""Text: a split that depends on nothing but the text, samples that depend on nothing but a step."""

import os

import pytest
import torch

from commrt.errors import ConfigError
from commrt.training.data import load_corpus, train_batch, validation_batches

TEXT = torch.arange(1000).to(torch.uint8)


@pytest.fixture
def folder(tmp_path):
    for index in range(100):
        path = tmp_path / f"part{index % 3}" / f"{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([index]) * 10 if index else b"text")
    return tmp_path


def batch(**changed):
    arguments = {"seed": 0, "step": 5, "rank": 0, "batch_size": 4, "seq_len": 8}
    return train_batch(TEXT, **(arguments | changed))


def test_a_folder_is_split_by_whole_files(folder):
    corpus = load_corpus(folder)
    train, validation = set(corpus.train.tolist()), set(corpus.validation.tolist())
    assert len(corpus.train) + len(corpus.validation) == 994
    assert train & validation <= set(b"text")
    assert 20 <= len(corpus.validation) <= 120


def test_a_file_stays_on_its_side_when_others_come(folder):
    before = load_corpus(folder)
    (folder / "later").mkdir()
    for index in range(100, 200):
        (folder / "later" / f"{index}.txt").write_bytes(bytes([index]) * 10)
    after = load_corpus(folder)
    assert set(before.validation.tolist()) <= set(after.validation.tolist())
    assert set(before.train.tolist()) <= set(after.train.tolist())


def test_the_tail_of_a_file_is_for_validation(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(1, 101)))
    corpus = load_corpus(path)
    assert corpus.train.tolist() == list(range(1, 96))
    assert corpus.validation.tolist() == list(range(96, 101))


def test_a_folder_with_few_files_is_split_like_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"a" * 50)
    corpus = load_corpus(tmp_path)
    assert (len(corpus.train), len(corpus.validation)) == (48, 2)


def test_binary_files_are_left_out(folder):
    whole = load_corpus(folder)
    (folder / "picture").write_bytes(b"\1\0\2" * 100)
    assert len(load_corpus(folder).train) == len(whole.train)


def test_the_default_is_the_standard_library():
    corpus = load_corpus()
    assert len(corpus.train) > 4_000_000
    assert 0.01 < len(corpus.validation) / len(corpus.train) < 0.1
    assert b"site-packages" not in os.fsencode(corpus.source)
    assert torch.equal(load_corpus().validation, corpus.validation)


@pytest.mark.parametrize("text", [b"", b"\0binary"])
@pytest.mark.parametrize("place", [".", "file"])
def test_no_text_is_an_error(tmp_path, text, place):
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(ConfigError, match=f"{tmp_path}.* holds no text"):
        load_corpus(tmp_path / place)


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="nowhere is neither a file nor a folder"):
        load_corpus(tmp_path / "nowhere")


def test_an_unreadable_file_is_an_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret").write_bytes(b"text")
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(ConfigError, match="secret cannot be read: Permission denied"):
        load_corpus(tmp_path)


def test_too_short_a_text_is_an_error(tmp_path):
    (tmp_path / "text").write_bytes(b"x" * 100)
    corpus = load_corpus(tmp_path / "text")
    corpus.check(seq_len=4)
    with pytest.raises(ConfigError, match="5 bytes of validation text: seq_len 5 needs at least 6"):
        corpus.check(seq_len=5)


def test_samples_do_not_depend_on_history():
    first, _ = batch()
    batch(step=17)
    torch.rand(3)
    assert torch.equal(batch()[0], first)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"step": 6}, {"rank": 1}])
def test_each_seed_step_and_rank_has_samples_of_its_own(changed):
    assert not torch.equal(batch(**changed)[0], batch()[0])


def test_ranks_together_draw_what_one_rank_would():
    parts = [batch(rank=rank, batch_size=2)[0] for rank in range(3)]
    assert torch.equal(torch.cat(parts), batch(batch_size=6)[0])


def test_targets_are_the_next_bytes():
    inputs, targets = batch()
    assert inputs.shape == targets.shape == (4, 8)
    assert torch.equal((inputs + 1) % 256, targets)


def test_every_window_can_be_drawn():
    text = torch.arange(6, dtype=torch.uint8)
    drawn = {
        tuple(train_batch(text, seed=0, step=s, rank=0, batch_size=1, seq_len=3)[1][0].tolist())
        for s in range(100)
    }
    assert drawn == {(1, 2, 3), (2, 3, 4), (3, 4, 5)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_ranks_share_the_validation_windows(world_size):
    def windows(rank, world_size):
        batches = validation_batches(
            TEXT, num_windows=7, rank=rank, world_size=world_size, batch_size=2, seq_len=8
        )
        return {
            int(index): (inputs.tolist(), targets.tolist())
            for indices, *pair in batches
            for index, inputs, targets in zip(indices, *pair, strict=True)
        }

    alone = windows(0, 1)
    together = [windows(rank, world_size) for rank in range(world_size)]
    assert sum(map(len, together)) == len(alone) == 7
    assert {index: pair for part in together for index, pair in part.items()} == alone
    assert alone[0][0] == TEXT[:8].tolist()
    assert alone[6][1] == TEXT[-8:].tolist()
