"""A simulated run: clients train, real payloads cross, the server decodes, on one rank or many.

Every rank carries out the same schedule. A client belongs to one rank, which trains it and keeps
what it remembers; payloads go to the first rank, which decodes, and what it decoded goes to all.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from commrt.errors import ConfigError, StateError
from commrt.federated import Client, parse_uplink
from commrt.federated.secure import SecureUplink
from commrt.metrics import Row
from commrt.simulation import checkpoint, data
from commrt.simulation.aggregation import make_schedule
from commrt.simulation.config import Config
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


class Run:
    """A run, from its beginning or from a checkpoint.

    Args:
        config: Its settings.
        ranks: Those that simulate it; all must make it, with the same settings.

    Raises:
        ConfigError: Settings that do not go together.

    Cost: on every rank the data, the models that somebody trains on, and ``chunk`` clients'
    weights; with an uplink that remembers, its memory for the rank's clients, and all of it once
    more at the first rank.
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
        self.training = LocalTraining(dataset, shares, config.local)
        self.layout = self.training.layout
        self._metric = dataset.metric
        self._uplink = parse_uplink(config.uplink)
        self._server = ServerStep(config.server, self.layout, self.training.start(config.run.seed))
        self._models = {0: self._server.weights}
        self._previous: Tensor | None = None
        self._clients: dict[int, Client] = {}
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
            examples=[self._examples(size) for size in self.training.sizes],
            down_bytes=4 * self.layout.numel,
            importance=self._importance(),
            seed=config.run.seed,
            aggregations=config.run.aggregations,
            until_s=config.run.until_s,
        )

    @property
    def weights(self) -> Tensor:
        """Of the newest model, fp32 (N,)."""
        return self._server.weights

    def carry_out(self, report: Report | None = None, out: Path | None = None) -> None:
        """Go on to the end.

        Args:
            report: Called on the first rank with a row for each aggregation.
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

    def save(self, folder: Path) -> None:
        """Write a checkpoint, between steps of which none waits to be carried out.

        Ranks: all, together.
        """
        own = {
            "clients": {client: each.state_dict() for client, each in self._clients.items()},
            "exchange": self._exchange.state_dict(),
        }
        parts, _ = self._ranks.deliver({self._ranks.rank: checkpoint.pack(own)}, lambda _: 0)
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
            "ranks": [parts[rank] for rank in range(self._ranks.size)],
        }
        checkpoint.write(folder, state)

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
        self._server.load_state_dict(state["server"])
        self._models, self._previous = dict(state["models"]), state["previous"]
        parts = [checkpoint.unpack(packed) for packed in state["ranks"]]
        self._exchange.load_state_dicts([part["exchange"] for part in parts])
        self._lost = state["lost"]
        self._privacy.load_state_dict(state["privacy"])
        self._clients = {}
        for part in parts:
            for client in self._ranks.own(part["clients"]):
                self._client(client).load_state_dict(part["clients"][client])

    # -- steps ------------------------------------------------------------------------------------

    def _start(self, step: Start) -> None:
        """Train, encode, and send to where it is decoded."""
        told = self._exchange.begin(step, self._previous)
        own = self._ranks.own(step.clients)
        updates = self.training.updates(
            self._models[step.version], own, step.index, self.config.run.seed
        )
        self._privacy.begin(step.clients)
        frames = {}
        for client, trained in zip(own, updates, strict=True):
            update = self._privacy.protect(trained, step.index, client)
            if bool(update.isfinite().all()):
                frames[client] = self._client(client).encode(
                    step.index, update, told[client], self._previous
                )
        sizes = self._exchange.send(frames)
        for client in step.clients:
            if client in sizes:
                self.schedule.sent(client, sizes[client])
            else:
                self.schedule.failed(client)

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
        self._previous = mean if self._exchange.has_rounds else None
        row: dict[str, Any] = {"kind": "round", "step": step.version, "virtual_s": step.at_s}
        if self._ranks.is_root:
            row |= {"clients": len(step.updates), "lost": self._lost, **self._exchange.figures}
            row |= self._privacy.figures(step.version)
            is_last = step.version == self.config.run.aggregations
            if is_last or step.version % self.config.run.evaluate_every == 0:
                row[self._metric] = self.training.evaluate(weights)
        self._lost = 0
        return row

    def _answers(self, requests: Mapping[int, bytes] | None) -> dict[int, bytes] | None:
        """What clients answer, at the first rank; None once nobody is asked any more."""
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
        if client not in self._clients:
            self._clients[client] = self._uplink.client(
                self.layout, client, seed=self.config.run.seed
            )
        return self._clients[client]

    def _make_exchange(self) -> Exchange:
        if isinstance(self._uplink, SecureUplink):
            self._check_secure(self._uplink)
        if isinstance(self.config.schedule, FedAvg):
            shares = dict(enumerate(self._importance() or [1.0] * self.config.clients.count))
            return Rounds(self._uplink, self.layout, self.config.run.seed, self._ranks, shares)
        if getattr(self._uplink, "memory", False):
            raise ConfigError(
                f"uplink {self._uplink.spec} remembers rounds, which {self.config.schedule} "
                "has not: must have memory=False"
            )
        return Singles(self._uplink, self.layout, self.config.run.seed, self._ranks)

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
        uplink.step(policy.asked, self.layout.numel)

    def _importance(self) -> list[float] | None:
        if isinstance(self.config.schedule, FedAsync | FedBuff):
            return None
        if self.config.clients.importance == "equal":
            return None
        return [float(max(size, 1)) for size in self.training.sizes]

    def _examples(self, size: int) -> float:
        local = self.config.local
        if local.steps is not None:
            return float(local.steps * local.batch_size)
        return float(size * (local.epochs or 1))

    def _without_length(self) -> Config:
        """The settings that a run must go on with; how long it takes may change."""
        plain = dataclasses.replace(
            self.config.run,
            aggregations=1,
            until_s=float("inf"),
            evaluate_every=1,
            checkpoint_every=0,
        )
        return dataclasses.replace(self.config, run=plain)
