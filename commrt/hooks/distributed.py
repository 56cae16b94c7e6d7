"""Residuals in a checkpoint of ``torch.distributed.checkpoint``.

Every rank's tensors have the rank in their key, so that all of them are written; all else is JSON,
so nothing is unpickled. A key is ``RANK.KIND.NAME``.
"""

import json
import re
from collections.abc import ItemsView, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from commrt.errors import StateError

_KINDS = ("residuals", "carries", "bases", "weights")


def flatten(state: Mapping[str, Any], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """A state dict as tensors that ``torch.distributed.checkpoint`` writes."""
    rank, weights = dist.get_rank(), state.get("weights", {})
    tensors = {**state, "weights": {name: values for name, (_, values) in weights.items()}}
    rest = {name: value for name, value in state.items() if name not in _KINDS}
    rest["members"] = dist.get_process_group_ranks(group)
    rest["weight_shards"] = {name: shard for name, (shard, _) in weights.items()}
    flat = {
        f"{rank}.{kind}.{name}": tensor for kind in _KINDS for name, tensor in tensors[kind].items()
    }
    flat[f"{rank}.rest"] = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
    return flat


def read_states(
    source: str | Path | dcp.StorageReader, key: str, group: dist.ProcessGroup | None
) -> list[dict[str, Any]]:
    """The state dicts of all ranks that wrote a checkpoint; residuals are read when asked for.

    Where several groups wrote it (with tensor parallelism, say), those of the ranks of this one.

    Raises:
        StateError: There is none under this key, or none of this group.
    """
    reader = source if isinstance(source, dcp.StorageReader) else dcp.FileSystemReader(source)
    metadata = reader.read_metadata()
    prefix = f"{key}." if key else ""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.rest")
    found = map(pattern.fullmatch, metadata.state_dict_metadata)
    ranks = sorted(int(match[1]) for match in found if match)
    if not ranks:
        raise StateError(f"checkpoint has no {prefix}*.rest: it must hold comm.distributed_state()")
    states = [_read_state(reader, metadata, f"{prefix}{rank}.") for rank in ranks]
    own = dist.get_process_group_ranks(group)
    if len({repr(state["members"]) for state in states}) > 1:
        states = [state for state in states if state["members"] == own]
    if not states:
        raise StateError(f"checkpoint is of several groups of ranks, none of them {own}")
    return states


class _Saved(Mapping[str, Tensor]):
    """Tensors of a checkpoint by name, read one at a time; ``items()`` only describes them."""

    def __init__(self, reader: dcp.StorageReader, metadata: Metadata, prefix: str) -> None:
        self._reader = reader
        self._prefix = prefix
        self._found = {
            name.removeprefix(prefix): entry
            for name, entry in metadata.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._empty(name, torch.device("cpu"))
        dcp.load({self._prefix + name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def items(self) -> ItemsView[str, Tensor]:
        """Names, and tensors on the meta device."""
        return {name: self._empty(name, torch.device("meta")) for name in self._found}.items()

    def _empty(self, name: str, device: torch.device) -> Tensor:
        entry = self._found[name]
        return torch.empty(entry.size, dtype=entry.properties.dtype, device=device)


def _read_state(reader: dcp.StorageReader, metadata: Metadata, prefix: str) -> dict[str, Any]:
    rest = json.loads(bytes(_Saved(reader, metadata, prefix)["rest"].tolist()))
    state: dict[str, Any] = {kind: _Saved(reader, metadata, f"{prefix}{kind}.") for kind in _KINDS}
    shards = rest.pop("weight_shards")
    state["weights"] = {name: (shards[name], state["weights"][name]) for name in shards}
    return {**rest, **state}
