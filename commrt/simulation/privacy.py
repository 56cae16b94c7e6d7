"""Updates that are clipped and noised by their clients, and what the models say of a client then.

Every update is clipped to an L2 norm of C and gets Gaussian noise of standard deviation ``z C /
sqrt(m)`` an element before it is encoded, m the fewest updates of an aggregation (``schedule.
least``): the sum of m or more then has noise of z C at least, whoever is missing.

Epsilon is stated for clients: two runs are neighbours if the data of one client is replaced by any
other. That moves a sum by 2 C at most, so all Gaussian mechanisms below have the noise multiplier z
/ 2 or less. It is that of the models alone, all of them, seen by somebody who sees neither payloads
nor metrics nor the seed; the server is trusted. Whoever knows the seed knows the noise, and whoever
sees a payload sees an update with one m-th of the sum's variance only. How many examples a client
has is taken to be public.

What quantisation does to it depends on what the mean is a function of.

The sum of the noised updates: ``fp32``, and ``secure``, whose step is fixed beforehand. A
subtractive dither's error is uniform on a step and independent of what was quantised, so the mean
is that of a Gaussian mechanism plus noise that depends on no data, modulo M or not: it is
post-processed. Then

* where a round is always of ``cohort`` clients drawn uniformly, and all of them arrive, it is a
  Gaussian mechanism on a sample without replacement, once a model;
* where over-selection, deadlines, dropouts or absences have a say, who is in is no uniform sample
  and nothing is gained by sampling: a Gaussian mechanism in each round that a client begins, of
  which the client with the most counts.

The updates one by one: all others. Also those whose errors are dithered, ``mbtc`` and ``spread``:
their step, and so the size of the error, follows from single updates (their energies, this round's
or earlier ones'), and a function of single updates is no function of their sum. So each noised
update is taken to be released, of multiplier z / (2 sqrt(m)), in each round that its client begins,
and the rest is post-processing.

Noise is of finite precision, which Gaussian mechanisms are not (Mironov, "On Significance of the
Least Significant Bits for Differential Privacy", CCS 2012).

Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016; McMahan et al., "Learning
Differentially Private Recurrent Language Models", ICLR 2018; sampling without replacement: Wang,
Balle and Kasiviswanathan, "Subsampled Renyi Differential Privacy and Analytical Moments
Accountant", AISTATS 2019. The accountant is that of the package dp-accounting.
"""

import dataclasses
import importlib.util
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commrt.codecs import derive_seed
from commrt.codecs.sums import tree_sum
from commrt.errors import ConfigError
from commrt.federated import Uplink
from commrt.federated.secure import SecureUplink
from commrt.simulation.policies import FedAvg, Policy
from commrt.simulation.traces import TraceConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Clipping and noise; see :mod:`commrt.simulation.privacy`.

    Attributes:
        clip: L2 norm that updates are clipped to; None for no clipping.
        noise_multiplier: z, in ``clip``; 0 for no noise.
        delta: Of the guarantee; required with noise. Far less than one over the number of clients.

    Raises:
        ConfigError: A value out of range, noise without the others, or without dp-accounting.
    """

    clip: float | None = None
    noise_multiplier: float = 0.0
    delta: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ConfigError(f"clip is {self.clip}: must be positive and finite")
        # Beyond, the accountant's numbers are none.
        if self.noise_multiplier != 0 and not 1e-6 <= self.noise_multiplier <= 1e6:
            raise ConfigError(
                f"noise_multiplier is {self.noise_multiplier}: must be 0 or from 1e-6 to 1e6"
            )
        if self.delta is not None and not 0 < self.delta < 1:
            raise ConfigError(f"delta is {self.delta}: must be above 0 and below 1")
        if not self.noise_multiplier:
            return
        for name in ("clip", "delta"):
            if getattr(self, name) is None:
                raise ConfigError(f"{name} is missing: must be given with noise_multiplier")
        if importlib.util.find_spec("dp_accounting") is None:
            raise ConfigError(
                f"noise_multiplier is {self.noise_multiplier}: needs dp-accounting, which states "
                "epsilon: pip install 'commrt[privacy]'"
            )

    def check(self, policy: Policy, importance: str) -> None:
        """Whether anything can be stated of runs with this policy.

        Raises:
            ConfigError: There is noise, and weights or policy are others than was proven for.
        """
        if not self.noise_multiplier:
            return
        if not isinstance(policy, FedAvg):
            raise ConfigError(
                f"noise_multiplier is {self.noise_multiplier}: must be 0 with {policy}, "
                "of which nothing is proven, only of fedavg"
            )
        if importance != "equal":
            raise ConfigError(
                f"noise_multiplier is {self.noise_multiplier}: must be 0, or clients.importance "
                f"equal: it is {importance}, and who has many examples would count beyond the clip"
            )


class Privacy:
    """Clipping, noise and accounting of a run.

    Args:
        config: How much, for which :meth:`PrivacyConfig.check` holds.
        policy: Of the run.
        traces: Of the run.
        uplink: Of the run.
        num_clients: In all.
        seed: Of the noise: to be kept secret where there is something to protect.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        *,
        policy: Policy,
        traces: TraceConfig,
        uplink: Uplink,
        num_clients: int,
        seed: int,
    ) -> None:
        self._config, self._seed, self._num_clients = config, seed, num_clients
        self._deviation = 0.0
        self._begun = Counter[int]()
        self._spent = _Spent()
        if not config.noise_multiplier:
            return
        assert isinstance(policy, FedAvg)
        assert config.clip is not None
        self._deviation = config.noise_multiplier * config.clip / math.sqrt(policy.least)
        is_sum = uplink.spec == "fp32" or isinstance(uplink, SecureUplink)
        self._is_sampled = is_sum and _everyone_arrives(policy, traces)
        multiplier = config.noise_multiplier / (1 if is_sum else math.sqrt(policy.least))
        sample = (policy.cohort, num_clients) if self._is_sampled else None
        self._spent = _Spent.of(multiplier / 2, sample)

    def protect(self, update: Tensor, round_index: int, client: int) -> Tensor:
        """The update as it is encoded, fp32 (N,): clipped and noised.

        With ``clip``, one that is not finite counts as zero: that it does not arrive would say
        something of it.
        """
        if self._config.clip is None:
            return update
        wide = update.double()
        if not bool(wide.isfinite().all()):
            wide = torch.zeros_like(wide)
        norm = math.sqrt(float(tree_sum(wide.square())))
        wide = wide * min(1.0, self._config.clip / norm if norm else 1.0)
        if self._deviation:
            seed = derive_seed("privacy", self._seed, round_index, client)
            generator = np.random.Generator(np.random.Philox(key=seed))
            wide += self._deviation * torch.from_numpy(generator.standard_normal(len(wide)))
        return wide.float()

    def norm(self, numel: int) -> float:
        """Root mean square over draws that a clipped update's L2 norm has with its noise."""
        return math.sqrt((self._config.clip or 0.0) ** 2 + numel * self._deviation**2)

    def begin(self, clients: Iterable[int]) -> None:
        """These train now, and what they send is noised once more."""
        if self._deviation:
            self._begun.update(clients)

    def epsilon(self, version: int) -> float:
        """Of all models up to this one, at the settings' ``delta``; infinite without noise."""
        if not self._deviation:
            return math.inf
        times = version if self._is_sampled else max(self._begun.values(), default=0)
        return self._spent.epsilon(times, self._config.delta or 0.0)

    def figures(self, version: int) -> dict[str, float]:
        """What a round's row has of it."""
        return {"epsilon": self.epsilon(version)} if self._deviation else {}

    def state_dict(self) -> dict[str, Any]:
        """How often each client has begun."""
        return {"begun": dict(self._begun)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._begun = Counter(state["begun"])


@dataclasses.dataclass(frozen=True)
class _Spent:
    """Renyi divergences of one release, by order."""

    orders: Any = ()
    divergences: Any = ()

    @classmethod
    def of(cls, multiplier: float, sample: tuple[int, int] | None) -> "_Spent":
        """Of Gaussian noise so many sensitivities wide, on a sample (size, of how many) or all."""
        import dp_accounting as dp

        event: Any = dp.GaussianDpEvent(multiplier)
        events = [event]
        if sample is not None:  # which tells no more; for large samples its bound is not as tight
            events.append(dp.SampledWithoutReplacementDpEvent(sample[1], sample[0], event))
        relation = dp.NeighboringRelation.REPLACE_ONE
        accountants = [dp.rdp.RdpAccountant(neighboring_relation=relation) for _ in events]
        for accountant, each in zip(accountants, events, strict=True):
            accountant.compose(each)
        divergences = np.minimum.reduce([accountant.rdp for accountant in accountants])
        return cls(accountants[0].orders, divergences)

    def epsilon(self, times: int, delta: float) -> float:
        """After so many releases, each of which may depend on those before."""
        from dp_accounting.rdp import rdp_privacy_accountant as rdp

        return float(rdp.compute_epsilon(self.orders, times * self.divergences, delta)[0])


def _everyone_arrives(policy: FedAvg, traces: TraceConfig) -> bool:
    """Whether each round has exactly ``cohort`` clients, drawn uniformly from all."""
    return (
        policy.over_selection == 1
        and policy.deadline_s == math.inf
        and policy.sampling == "uniform"
        and traces.dropout == 0
        and traces.off_s == 0
        and traces.file is None
    )
