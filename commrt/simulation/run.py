"""A simulated run: clients train, real payloads cross, the server decodes, on one rank or many.

Every rank carries out the same schedule. A client belongs to one rank, which trains it and keeps
what it remembers; a payload goes to the rank that decodes it, and the mean of all goes to all.
"""

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from commrt.errors import ConfigError, StateError
from commrt.federated import Client, parse_uplink
from commrt.federated.layout import is_finite
from commrt.federated.secure import SecureUplink
from commrt.federated.store import StateStore
from commrt.metrics import Row
from commrt.simulation import checkpoint, data
from commrt.simulation.aggregation import make_schedule
from commrt.simulation.config import Config
from commrt.simulation.devices import device_of
from commrt.simulation.exchange import Exchange, Rounds, Singles
from commrt.simulation.local import LocalTraining
from commrt.simulation.partition import partition
from commrt.simulation.policies import FedAsync, FedAvg, FedBuff
from commrt.simulation.privacy import Privacy
from commrt.simulation.server import ServerStep
from commrt.simulation.steps import Aggregate, Lost, Start
from commrt.simulation.traces import Traces
from commrt.simulation.transport import Ranks

Report = Callable[[Row], None]
_TRAINED_BYTES = 256 << 20  # of updates that wait to be encoded


class Run:
    """A run, from its beginning or from a checkpoint.

    Args:
        config: Its settings.
        ranks: Those that simulate it; all must make it, with the same settings.

    Raises:
        ConfigError: Settings that do not go together.

    Cost: on every rank, on its device, the data, the models that somebody trains on and ``chunk``
    clients' weights; 256 MB of updates, on a GPU and the host; with an uplink that remembers, what
    the rank's clients do, and what the server does of those that are decoded here, up to
    ``clients.state_mb`` of either.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self._ranks = config, ranks
        dataset = data.load(config.data.name, seed=config.run.seed, model=config.data.model)
        shares = partition(
            config.clients.partition,
            labels=dataset.labels,
            groups=dataset.groups,
            num_clients=config.clients.count,
            seed=config.run.seed,
            num_examples=len(dataset),
            least=config.clients.least,
        )
        self._device = device_of(config.run.device, ranks.local_rank)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # whose context MPI and kernels go by
            ranks.use_gpus(config.run.cuda_aware)
        self.training = LocalTraining(dataset, shares, config.local, device=self._device)
        self.layout = self.training.layout
        self._metric = dataset.metric
        self._uplink = parse_uplink(config.uplink)
        first = self.training.start(config.run.seed).to(self._device)
        self._server = ServerStep(config.server, self.layout, first)
        self._models = {0: self._server.weights}
        self._previous: Tensor | None = None
        self._states = self._store()
        # Those that the server may ask for more in the running round.
        self._answering: dict[int, Client] = {}
        self._privacy = Privacy(
            config.privacy,
            policy=config.schedule,
            traces=config.traces,
            uplink=self._uplink,
            num_clients=config.clients.count,
            seed=config.run.seed,
        )
        self._exchange = self._make_exchange()
        self._lost = 0
        self.schedule = make_schedule(
            config.schedule,
            Traces(config.traces, config.clients.count, config.run.seed),
            examples=self.training.num_examples,
            down_bytes=4 * self.layout.numel,
            importance=self._importance(),
            seed=config.run.seed,
            aggregations=config.run.aggregations,
            until_s=config.run.until_s,
        )

    @property
    def weights(self) -> Tensor:
        """Of the newest model, fp32 (N,), on the rank's device."""
        return self._server.weights

    def carry_out(self, report: Report | None = None, out: Path | None = None) -> None:
        """Go on to the end.

        Args:
            report: Called on the first rank with a row for each aggregation, and with one of kind
                ``"val"`` where nobody knew that the last one was the last.
            out: Where checkpoints go, if the settings ask for any.
        """
        begun = time.perf_counter()
        while step := self.schedule.next():
            if isinstance(step, Start):
                self._start(step)
            elif isinstance(step, Lost):
                self._exchange.drop(step.clients)
                self._lost += len(step.clients)
            else:
                row = self._aggregate(step)
                if report is not None and self._ranks.is_root:
                    report({**row, "wall_s": time.perf_counter() - begun})
                self._keep(step.version, out)
            self._models = {each: self._models[each] for each in self.schedule.alive}
        last, at_s = self.schedule.version, self.schedule.now_s
        if report is not None and self._ranks.is_root and not self._is_evaluated(last):
            row = {"kind": "val", "step": last, "virtual_s": at_s, **self._evaluated(self.weights)}
            report({**row, "wall_s": time.perf_counter() - begun})

    def save(self, folder: Path) -> None:
        """Write a checkpoint, between steps of which none waits to be carried out.

        Ranks: all, together.
        """
        self._close_round()
        files = self._save_parts(folder)
        exchange = checkpoint.pack(self._exchange.state_dict())
        parts = self._ranks.all_gather(exchange)
        if not self._ranks.is_root:
            return
        state = {
            "config": repr(self._without_length()),
            "schedule": self.schedule.state_dict(),
            "server": self._server.state_dict(),
            "models": self._models,
            "previous": self._previous,
            "lost": self._lost,
            "privacy": self._privacy.state_dict(),
            "exchange": parts,
            "files": files,
        }
        checkpoint.write(folder, state)
        checkpoint.remove_others(folder, files)

    def resume(self, folder: Path) -> None:
        """Go on from the checkpoint in a folder, with any number of ranks.

        Raises:
            StateError: There is none, it is damaged, or of a run with other settings.
        """
        state = checkpoint.read(folder)
        if state["config"] != repr(self._without_length()):
            raise StateError(
                f"{folder} has a run of other settings: {state['config']}; "
                f"must be {self._without_length()!r}"
            )
        self.schedule.load_state_dict(state["schedule"])
        # Copies, since these are mapped from a file that the first rank will replace.
        self._server.load_state_dict(copy.deepcopy(state["server"]))
        models, self._previous = copy.deepcopy((state["models"], state["previous"]))
        self._models = {version: model.to(self._device) for version, model in models.items()}
        self._exchange.load_state_dicts([checkpoint.unpack(part) for part in state["exchange"]])
        self._lost = state["lost"]
        self._privacy.load_state_dict(state["privacy"])
        self._answering = {}
        for kind, (states, home) in self._kept().items():
            states.clear()

            def is_own(client: int, home: Callable[[int], int] = home) -> bool:
                return home(client) == self._ranks.rank

            for client, kept in checkpoint.read_clients(folder, kind, state["files"], is_own):
                states[client] = kept

    def _kept(self) -> dict[str, tuple[StateStore, Callable[[int], int]]]:
        """What is kept of clients, and on which rank of each."""
        return {
            "clients": (self._states, self._ranks.owner),
            "histories": (self._exchange.histories, self._exchange.home),
        }

    def _save_parts(self, folder: Path) -> dict[str, int]:
        """Write what is kept of clients on all ranks; the files' sizes."""
        number = checkpoint.new_number(folder) if self._ranks.is_root else 0
        told = self._ranks.broadcast({0: str(number).encode()} if self._ranks.is_root else None)
        number, rank = int(told[0]), self._ranks.rank
        files = dict(
            checkpoint.write_clients(folder, kind, number, rank, states)
            for kind, (states, _) in self._kept().items()
        )
        written = self._ranks.all_gather(json.dumps(files).encode())
        return {name: size for part in written for name, size in json.loads(part).items()}

    # -- steps ------------------------------------------------------------------------------------

    def _start(self, step: Start) -> None:
        """Train, encode, and send to where it is decoded."""
        self._close_round()
        told = self._exchange.begin(step, self._previous)
        self._privacy.begin(step.clients)
        frames = dict[int, bytes]()
        for clients, updates in self._trained(step):
            for client, update in zip(clients, updates, strict=True):
                update.copy_(self._privacy.protect(update, step.index, client))
            frames |= self._encode(clients, step.index, updates, told)
        sizes = self._exchange.send(frames)
        for client in step.clients:
            if client in sizes:
                self.schedule.sent(client, sizes[client])
            else:
                self.schedule.failed(client)

    def _trained(self, step: Start) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Some of the rank's clients and their updates (K, N), until the next are asked for."""
        own = self._ranks.own(step.clients)
        fitting = max(self.config.local.chunk or 1, _TRAINED_BYTES // (4 * self.layout.numel))
        room = self.training.room(min(fitting, len(own)))
        for begin in range(0, len(own), fitting):
            some = own[begin : begin + fitting]
            updates = self.training.updates(
                self._models[step.version],
                some,
                step.index,
                self.config.run.seed,
                out=room[: len(some)],
            )
            yield some, updates

    def _encode(
        self, clients: Sequence[int], round_index: int, updates: Tensor, told: Mapping[int, bytes]
    ) -> dict[int, bytes]:
        """The payloads of those whose update is finite.

        What a client remembers is kept, and itself while it may be asked.
        """
        if not is_finite(updates):
            finite = [k for k, update in enumerate(updates) if is_finite(update)]
            clients, updates = [clients[k] for k in finite], updates[finite]
        encoding = {client: self._client(client) for client in clients}
        payloads = self._uplink.encode(
            list(encoding.values()),
            round_index,
            updates,
            [told[client] for client in clients],
            self._previous,
        )
        for client, each in encoding.items():
            if self._exchange.has_rounds and each.may_be_asked:
                self._answering[client] = each
            else:
                self._remember(client, each)
        return dict(zip(clients, payloads, strict=True))

    def _aggregate(self, step: Aggregate) -> Row:
        """Decode what arrived, and make a new model of it."""
        mean = self._exchange.decode(step, self._answers)
        if step.mixes:
            [update] = step.updates
            moved = self._models[update.version] + mean - self.weights
            weights = self._server.replace(self.weights + update.weight * moved)
        else:
            weights = self._server.step(mean)
        self._models[step.version] = weights
        self._previous = mean.cpu() if self._exchange.has_rounds else None
        row: dict[str, Any] = {"kind": "round", "step": step.version, "virtual_s": step.at_s}
        if self._ranks.is_root:
            row |= {"clients": len(step.updates), "lost": self._lost, **self._exchange.figures}
            row |= self._privacy.figures(step.version)
            if self._is_evaluated(step.version):
                row |= self._evaluated(weights)
        self._lost = 0
        return row

    def _is_evaluated(self, version: int) -> bool:
        """Whether its row says how good it is."""
        run = self.config.run
        return version % run.evaluate_every == 0 or version == run.aggregations

    def _evaluated(self, weights: Tensor) -> Row:
        return {self._metric: self.training.evaluate(weights)}

    def _answers(self, requests: Mapping[int, bytes] | None) -> dict[int, bytes] | None:
        """What clients answer, where it is decoded; None once nobody is asked any more."""
        asked = self._ranks.broadcast(requests)
        if not asked:
            return None
        own = {
            client: self._client(client).answer(asked[client]) for client in self._ranks.own(asked)
        }
        return self._ranks.deliver(own, self._exchange.home)[0]

    def _keep(self, version: int, out: Path | None) -> None:
        every = self.config.run.checkpoint_every
        if out is not None and every and version % every == 0:
            self.save(out)

    # -- parts ------------------------------------------------------------------------------------

    def _client(self, client: int) -> Client:
        """The one that may be asked in the running round, or one as it was after its last."""
        if client in self._answering:
            return self._answering[client]
        found = self._uplink.client(self.layout, client, seed=self.config.run.seed)
        if client in self._states:
            found.load_state_dict(self._states[client])
        return found

    def _close_round(self) -> None:
        """Nobody is asked any more."""
        for client, each in self._answering.items():
            self._remember(client, each)
        self._answering = {}

    def _remember(self, client: int, encoded: Client) -> None:
        if state := encoded.state_dict():
            self._states[client] = state

    def _make_exchange(self) -> Exchange:
        if isinstance(self._uplink, SecureUplink):
            self._check_secure(self._uplink)
        if isinstance(self.config.schedule, FedAvg):
            shares = dict(enumerate(self._importance() or [1.0] * self.config.clients.count))
            return Rounds(
                self._uplink,
                self.layout,
                self.config.run.seed,
                self._ranks,
                self._device,
                shares=shares,
                histories=self._store(),
            )
        if getattr(self._uplink, "memory", False):
            raise ConfigError(
                f"uplink {self._uplink.spec} remembers rounds, which {self.config.schedule} "
                "has not: must have memory=False"
            )
        return Singles(self._uplink, self.layout, self.config.run.seed, self._ranks, self._device)

    def _check_secure(self, uplink: SecureUplink) -> None:
        policy, importance = self.config.schedule, self.config.clients.importance
        if not isinstance(policy, FedAvg):
            raise ConfigError(f"uplink {uplink.spec} adds up rounds, which {policy} has not")
        if importance != "equal":
            raise ConfigError(
                f"clients: importance is {importance}: must be equal with a secure sum"
            )
        if policy.least < uplink.least:
            raise ConfigError(f"schedule: least is {policy.least}: must be {uplink.least} at least")
        noisy = self._privacy.norm(self.layout.numel)
        if uplink.norm < noisy:
            raise ConfigError(
                f"uplink: norm is {uplink.norm}: must be {noisy:.4g} at least, that of a clipped "
                "update with its noise"
            )
        uplink.step(min(policy.asked, self.config.clients.count), self.layout.numel)

    def _store(self) -> StateStore:
        clients = self.config.clients
        return StateStore(clients.state_mb * 1e6, clients.state_folder)

    def _importance(self) -> list[float] | None:
        if isinstance(self.config.schedule, FedAsync | FedBuff):
            return None
        if self.config.clients.importance == "equal":
            return None
        return [float(max(size, 1)) for size in self.training.sizes]

    def _without_length(self) -> Config:
        """The settings that a run must go on with; how long it takes, and where, may change."""
        plain = dataclasses.replace(
            self.config.run,
            aggregations=1,
            until_s=float("inf"),
            evaluate_every=1,
            checkpoint_every=0,
            device="cpu",
            cuda_aware="auto",
        )
        clients = dataclasses.replace(self.config.clients, state_mb=float("inf"), state_folder=None)
        return dataclasses.replace(self.config, run=plain, clients=clients)
