"""The mean of a cohort's updates, from what was decoded of them."""

import torch
from torch import Tensor

from commrt import ops
from commrt.federated.gaussian import Array, factored
from commrt.federated.layout import Group
from commrt.federated.limits import combine_weights


def lmmse_mean_(
    mean: Tensor,
    group: Group,
    shares: Array,
    residuals: Tensor,
    predicted: Tensor,
    covariance: Array,
    noise: Array,
) -> float:
    """Replace a group's part of ``mean`` by the linear estimate of least expected error.

    Of what was not predicted: ``w^T Sigma (Sigma + Q)^-1 R``, with shares w, residuals R, their
    covariance Sigma and the quantizers' noise Q. Biased towards the prediction.

    Args:
        mean: fp32 (N,), changed in the group's part.
        group: Of which nothing is missing.
        shares: w, float64 (K,).
        residuals: R, fp32 (K, N).
        predicted: What was predicted, fp32 (K, N).
        covariance: Sigma, as it was known before the round.
        noise: Q's diagonal, (K,).

    Returns:
        The expected alignment with the true mean, ``<estimate, mean> / |mean|^2``; 1 is unbiased.

    Source: Berger-Tung coding's decoder, see :mod:`commrt.federated.limits`.
    """
    model = factored(covariance)
    weights = combine_weights(model, noise, shares)
    known, estimate = torch.empty(group.numel), torch.empty(group.numel)
    ops.lmmse_combine(group.of(predicted), torch.from_numpy(shares).float(), known)
    ops.lmmse_combine(group.of(residuals), torch.from_numpy(weights).float(), estimate)
    torch.add(known, estimate, out=group.of(mean))
    energy = float(known.double().square().mean())
    true = shares @ covariance @ shares
    return (
        float((energy + shares @ covariance @ weights) / (energy + true)) if energy + true else 1.0
    )
