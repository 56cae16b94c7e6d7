"""A simulated run's settings: a TOML file, checked as a whole before anything starts.

Sections ``data``, ``clients``, ``local``, ``schedule``, ``traces``, ``server``, ``privacy`` and
``run``, and a key ``uplink`` before them. See ``launch/federated/`` for files that work.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from commrt.errors import ConfigError
from commrt.federated import parse_uplink
from commrt.simulation.devices import CudaAware, check_device
from commrt.simulation.local import LocalConfig
from commrt.simulation.policies import POLICIES, FedAvg, Policy
from commrt.simulation.privacy import PrivacyConfig
from commrt.simulation.server import ServerConfig
from commrt.simulation.traces import TraceConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned; see :func:`commrt.simulation.data.load`."""

    name: str = "digits-mlp"
    model: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientsConfig:
    """Who has the data.

    Attributes:
        count: Of the clients.
        partition: See :func:`commrt.simulation.partition.partition`.
        least: Examples of each.
        importance: Of a client in the mean: ``"examples"``, as many as it has, or ``"equal"``.
        state_mb: Of what clients remember from round to round, so many MB are in memory, on each
            rank; the rest is in files.
        state_folder: Where these are; default, where temporary files go, which should not be
            memory, as it is on some machines.

    Raises:
        ConfigError: A value out of range.
    """

    count: int = 100
    partition: str = "iid"
    least: int = 1
    importance: str = "examples"
    state_mb: float = math.inf
    state_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count is {self.count}: must be at least 1")
        if self.least < 0:
            raise ConfigError(f"least is {self.least}: must be at least 0")
        if self.importance not in ("examples", "equal"):
            raise ConfigError(f"importance is {self.importance!r}: must be examples or equal")
        if not self.state_mb >= 0:
            raise ConfigError(f"state_mb is {self.state_mb}: must be at least 0")
        if self.state_folder is not None and not self.state_folder.is_dir():
            raise ConfigError(f"state_folder is {str(self.state_folder)!r}: must be a folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, and what is kept.

    Attributes:
        seed: Of all that is drawn.
        aggregations: After how many the run ends.
        until_s: At what virtual time it ends, if that is sooner.
        evaluate_every: Aggregations; the last one is evaluated in any case.
        checkpoint_every: Aggregations; 0 for none.
        device: Where clients train and the server's model is: ``"cpu"``; ``"cuda"``, a GPU of its
            own for each rank of a machine, as far as there are so many; or ``"cuda:N"``.
        cuda_aware: Whether MPI reads GPU memory; ``"auto"`` asks it.

    Raises:
        ConfigError: A value out of range, or a GPU that is not here.
    """

    seed: int = 0
    aggregations: int = 30
    until_s: float = math.inf
    evaluate_every: int = 1
    checkpoint_every: int = 0
    device: str = "cpu"
    cuda_aware: CudaAware = "auto"

    def __post_init__(self) -> None:
        least = {"seed": 0, "aggregations": 1, "evaluate_every": 1, "checkpoint_every": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least {bound}")
        if self.seed >= 1 << 63:
            raise ConfigError(f"seed is {self.seed}: must be below 2**63")
        if not self.until_s > 0:
            raise ConfigError(f"until_s is {self.until_s}: must be above 0")
        check_device(self.device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run.

    Raises:
        ConfigError: Sections that do not go together.
    """

    uplink: str = "mbtc:nmse=0.5"
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    clients: ClientsConfig = dataclasses.field(default_factory=ClientsConfig)
    local: LocalConfig = dataclasses.field(default_factory=LocalConfig)
    schedule: Policy = dataclasses.field(default_factory=lambda: FedAvg(cohort=10))
    traces: TraceConfig = dataclasses.field(default_factory=TraceConfig)
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        try:
            self.privacy.check(self.schedule, self.clients.importance)
        except ConfigError as error:
            raise ConfigError(f"privacy: {error}") from error

    @classmethod
    def load(cls, path: Path, assignments: Iterable[str] = ()) -> "Config":
        """Read a file.

        Args:
            path: Of a TOML file.
            assignments: ``"section.key=value"`` each, which replace what is in the file; a value
                that is not TOML is text.

        Raises:
            ConfigError: It cannot be read, or any of its keys or values is wrong; names them all.
        """
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # also what is not UTF-8
            raise ConfigError(f"{path}: {error}") from error
        for assignment in assignments:
            _assign(tree, assignment)
        return cls.make(tree)

    @classmethod
    def make(cls, tree: Mapping[str, Any]) -> "Config":
        """The settings of a tree of sections.

        Raises:
            ConfigError: Any key or value is wrong; names them all, a line each.
        """
        found: dict[str, Any] = {}
        errors = [_unknown("", name, _SECTIONS) for name in tree if name not in _SECTIONS]
        for name, kind in _SECTIONS.items():
            if name not in tree:
                continue
            try:
                found[name] = kind(tree[name])
            except ConfigError as error:
                errors += [f"{name}: {line}" for line in str(error).splitlines()]
        if errors:
            raise ConfigError("\n".join(errors))
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The settings by the names that ``--set`` knows, as plain values, fit for JSON."""
        names = {kind: name for name, kind in POLICIES.items()}
        flat: dict[str, Any] = {"schedule.policy": names[type(self.schedule)]}
        for section, values in dataclasses.asdict(self).items():
            values = values if isinstance(values, dict) else {"": values}
            for name, value in values.items():
                key = f"{section}.{name}" if name else section
                flat[key] = str(value) if isinstance(value, Path) else value
        return flat


def _section(kind: type[Any]) -> Any:
    return lambda tree: _filled(kind, tree)


def _schedule(tree: Mapping[str, Any]) -> Policy:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"is {tree!r}: must be a section")
    policy = tree.get("policy", "fedavg")
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ConfigError(f"policy is {policy!r}: must be one of {', '.join(POLICIES)}")
    settings = {name: value for name, value in tree.items() if name != "policy"}
    filled: Policy = _filled(POLICIES[policy], settings)
    return filled


def _uplink(spec: Any) -> str:
    if not isinstance(spec, str):
        raise ConfigError(f"is {spec!r}: must be text, such as 'mbtc:nmse=0.5'")
    return parse_uplink(spec).spec


_SECTIONS = {
    "uplink": _uplink,
    "data": _section(DataConfig),
    "clients": _section(ClientsConfig),
    "local": _section(LocalConfig),
    "schedule": _schedule,
    "traces": _section(TraceConfig),
    "server": _section(ServerConfig),
    "privacy": _section(PrivacyConfig),
    "run": _section(RunConfig),
}


def _filled(kind: type[Any], tree: Any) -> Any:
    """A section's settings."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"is {tree!r}: must be a section")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    errors = [_unknown("", name, names) for name in tree if name not in names]
    values = {}
    for name in names:
        if name not in tree:
            continue
        try:
            values[name] = _typed(name, tree[name], hints[name])
        except ConfigError as error:
            errors.append(str(error))
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in tree
    ]
    errors += [f"{name} is missing" for name in missing]
    if not errors:
        return kind(**values)
    raise ConfigError("\n".join(errors))


def _typed(name: str, value: Any, hint: Any) -> Any:
    """A value, if it is of the type that the setting has."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    for option in options:
        if typing.get_origin(option) is typing.Literal and value in typing.get_args(option):
            return value
        if option is float and type(value) in (int, float):
            return float(value)
        if option is Path and isinstance(value, str):
            return Path(value)
        if type(value) is option:
            return value
    allowed = " or ".join(getattr(o, "__name__", str(o)) for o in options if o is not type(None))
    raise ConfigError(f"{name} is {value!r}: must be of type {allowed}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _unknown(section: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    hint = f", perhaps {near[0]}" if near else f": must be one of {', '.join(known)}"
    return f"{section}{name} is unknown{hint}"


def _assign(tree: dict[str, Any], assignment: str) -> None:
    place, is_given, text = assignment.partition("=")
    *sections, name = place.strip().split(".")
    if not is_given or len(sections) > 1 or not name:
        raise ConfigError(f"--set {assignment}: must be KEY=VALUE or SECTION.KEY=VALUE")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {assignment}: {section} is not a section")
    tree[name] = value
