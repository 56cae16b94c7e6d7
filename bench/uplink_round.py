"""A round of an uplink for `bench.uplink`: bytes there and back, timed, compared with the truth."""

import dataclasses
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from commrt.federated import Layout, parse_uplink


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a round came to.

    Attributes:
        mean: As decoded, fp32 (N,).
        bits: Uplink bits a weight and client, everything counted.
        answer_bits: Of these, what the server asked for once more.
        down_bits: Parameters and requests, bits a weight and client; not the model.
        distortion: |mean - true|^2 over sum_k w_k^2 |update_k|^2.
        alignment: <mean, true> / |true|^2; 1 where nothing is lost and nothing shrunk.
        asked: Share of the clients that were asked for more.
        encode_s: Of one client, answers included.
        decode_s: Of the server, a client.
    """

    mean: Tensor
    bits: float
    answer_bits: float
    down_bits: float
    distortion: float
    alignment: float
    asked: float
    encode_s: float
    decode_s: float


class Cohort:
    """A server and clients that take part in every round.

    Args:
        spec: Of the uplink.
        layout: Of the updates.
        weights: Of the clients, positive.
        seed: Of all that the codec draws.
    """

    def __init__(self, spec: str, layout: Layout, weights: Sequence[float], seed: int) -> None:
        uplink = parse_uplink(spec)
        self._server = uplink.server(layout, seed=seed)
        self._clients = [uplink.client(layout, k, seed=seed) for k in range(len(weights))]
        self._weights = dict(enumerate(weights))
        self._previous: Tensor | None = None
        self._encode_s = 0.0

    def round(self, index: int, updates: Sequence[Tensor]) -> Outcome:
        """Send the updates, all clients knowing the mean of the round before."""
        self._encode_s, asked, begin = 0.0, set[int](), time.perf_counter()
        told = self._server.begin(index, list(self._weights), weights=self._weights)
        for k, client in enumerate(self._clients):
            encode = time.perf_counter()
            payload = client.encode(index, updates[k], told[k], self._previous)
            self._encode_s += time.perf_counter() - encode
            self._server.receive(k, payload)
        while requests := self._server.requests():
            asked |= requests.keys()
            self._answer(requests)
        aggregate = self._server.finish()
        decode_s = time.perf_counter() - begin - self._encode_s
        self._previous = aggregate.mean

        traffic, num_clients = aggregate.traffic, len(self._clients)
        bits = 8 / (aggregate.mean.numel() * num_clients)
        distortion, alignment = _compare(aggregate.mean, updates, list(self._weights.values()))
        return Outcome(
            mean=aggregate.mean,
            bits=bits * traffic.uplink_bytes,
            answer_bits=bits * traffic.answer_bytes,
            down_bits=bits * traffic.downlink_bytes,
            distortion=distortion,
            alignment=alignment,
            asked=len(asked) / num_clients,
            encode_s=self._encode_s / num_clients,
            decode_s=decode_s / num_clients,
        )

    def _answer(self, requests: dict[int, bytes]) -> None:
        for k, request in requests.items():
            begin = time.perf_counter()
            payload = self._clients[k].answer(request)
            self._encode_s += time.perf_counter() - begin
            self._server.receive(k, payload)


def _compare(
    mean: Tensor, updates: Sequence[Tensor], weights: Sequence[float]
) -> tuple[float, float]:
    share_K = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    update_KN = torch.stack(list(updates)).double()
    true = share_K @ update_KN
    energy = (share_K.square() @ update_KN.square().sum(1)).item()
    size = true.square().sum().item()
    error = (mean.double() - true).square().sum().item()
    return error / energy, (mean.double() @ true).item() / size
