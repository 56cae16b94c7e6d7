"""States of clients: in memory up to a limit, in files beyond it, and never lost."""

import gc
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from commrt.errors import ConfigError, StateError
from commrt.federated import Layout, parse_uplink
from commrt.federated.store import StateStore

SIZE = 1000
STATE_BYTES = 2 * SIZE


def state(client: int) -> dict[str, Any]:
    return {"decoded": torch.full((SIZE,), client, dtype=torch.bfloat16)}


def assert_all(store: StateStore, clients: list[int]) -> None:
    assert sorted(store) == clients
    for client in clients:
        assert torch.equal(store[client]["decoded"], state(client)["decoded"])


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may be larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("fitting", [0, 1, 3, 7])
def test_memory_is_bounded(fitting: int, tmp_path: Path) -> None:
    store = StateStore(fitting * STATE_BYTES, tmp_path)
    for client in range(7):
        store[client] = state(client)
        assert store.memory_bytes == min(fitting, client + 1) * STATE_BYTES
    assert len(files(tmp_path)) == store.num_files == 7 - fitting
    assert_all(store, list(range(7)))


def test_least_recently_used_ones_go_to_files(tmp_path: Path) -> None:
    store = StateStore(3 * STATE_BYTES, tmp_path)
    for client in (1, 2, 3):
        store[client] = state(client)
    store[1], _ = state(1), store[2]
    store[4] = state(4)
    assert [path.name for path in files(tmp_path)] == ["3"]


def test_a_new_state_replaces_the_one_in_a_file(tmp_path: Path) -> None:
    store = StateStore(STATE_BYTES, tmp_path)
    store[1], store[2] = state(7), state(2)
    store[1] = state(1)
    assert_all(store, [1, 2])
    del store[1], store[2]
    assert not store
    assert not files(tmp_path)
    assert store.memory_bytes == 0
    with pytest.raises(KeyError):
        store[1]


def test_whatever_a_state_holds_comes_back_to_the_bit(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, 3.3])
    odd.view(torch.int32)[0] += 5  # a payload in the NaN
    held = {
        "fp32": odd,
        "bf16": odd.bfloat16(),
        "bytes": torch.arange(256).byte(),
        "plain": [3, (4, 5.5), b"six", "seven", None, 1 << 62],
        "empty": torch.empty(0),
        "large": torch.randn(3, 1 << 18).bfloat16().T,
    }
    for store in (StateStore(), StateStore(0, tmp_path)):
        store[5] = held
        found = store[5]
        assert found["plain"] == held["plain"]
        for name in ("fp32", "bf16", "bytes", "empty", "large"):
            assert found[name].dtype == held[name].dtype
            whole = found[name].contiguous(), held[name].contiguous()
            assert torch.equal(*(tensor.view(torch.uint8) for tensor in whole))
    assert store.num_files == 1


@pytest.mark.parametrize("spec", ["topk:share=0.1", "loco4", "mbtc:nmse=0.3"])
def test_clients_go_on_from_it(spec: str, tmp_path: Path) -> None:
    layout = Layout({"weight": (8, 40)})
    uplink = parse_uplink(spec)
    server, one = uplink.server(layout), uplink.client(layout, 3)
    store = StateStore(0, tmp_path)
    for index in range(4):
        update = torch.randn(layout.numel, generator=torch.Generator().manual_seed(index))
        told = server.begin(index, [3])[3]
        other = uplink.client(layout, 3)
        if 3 in store:
            other.load_state_dict(store[3])
        payload = one.encode(index, update, told)
        assert other.encode(index, update, told) == payload
        store[3] = other.state_dict()
        server.receive(3, payload)
        server.finish()
    assert store.num_files == 1


def test_the_folder_goes_with_the_store(tmp_path: Path) -> None:
    store, other = StateStore(0, tmp_path), StateStore(0, tmp_path)
    store[1], other[1] = state(1), state(2)
    del store
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(other[1]["decoded"], state(2)["decoded"])


def test_what_killed_processes_have_left_is_removed(tmp_path: Path) -> None:
    """And nothing that another one still has."""
    kept = StateStore(0, tmp_path)
    kept[1] = state(1)
    [own] = tmp_path.iterdir()
    code = f"""
import os, signal, pathlib
from commrt.federated.store import StateStore
store = StateStore(0, pathlib.Path({str(tmp_path)!r}))
store[7] = {{"number": 7}}
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (orphan,) = set(tmp_path.iterdir()) - {own}
    assert files(orphan)
    other = StateStore(0, tmp_path)
    other[2] = state(2)
    assert not orphan.exists()
    assert len(list(tmp_path.iterdir())) == 2
    assert_all(kept, [1])


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    store = StateStore(STATE_BYTES, tmp_path)
    store[1], store[2] = state(1), state(2)
    with full_disk(STATE_BYTES // 2), pytest.raises(StateError, match=rf"{tmp_path}.*/2, .*writ"):
        store[3] = state(3)
    assert [path.name for path in files(tmp_path)] == ["1"]
    assert_all(store, [1, 2, 3])
    store[4] = state(4)
    assert store.memory_bytes == STATE_BYTES
    assert_all(store, [1, 2, 3, 4])


def test_no_folder(tmp_path: Path) -> None:
    store = StateStore(0, tmp_path / "none")
    with pytest.raises(StateError, match=r"no folder for states in .*none"):
        store[1] = state(1)
    assert_all(store, [1])


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "changed"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    store = StateStore(0, tmp_path)
    store[1], store[2] = state(1), state(2)
    (path,) = (path for path in files(tmp_path) if path.name == "1")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"empty": b"", "cut": data[:-1]}.get(damage, data))
    if damage == "gone":
        path.unlink()
    with pytest.raises(StateError, match=rf"{path}, state of client 1, cannot be read"):
        store[1]
    assert torch.equal(store[2]["decoded"], state(2)["decoded"])


def test_a_limit_below_zero() -> None:
    with pytest.raises(ConfigError, match="limit_bytes is -1: must be at least 0"):
        StateStore(-1)
