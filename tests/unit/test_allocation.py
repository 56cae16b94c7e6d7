"""Rate allocation against all K! corners, closed forms and random alternatives."""

import dataclasses
import math

import numpy as np
import pytest

from commrt.errors import ConfigError
from commrt.federated import limits
from commrt.federated.allocation import (
    Allocation,
    allocate,
    allocate_distortion,
    allocate_total,
    convergence_bound,
)
from commrt.federated.gaussian import FactorCovariance
from commrt.federated.limits import Symmetric
from commrt.federated.region import Region, time_sharing
from tests.unit.gaussians import (
    LIBRARIES,
    best_corner,
    corner_noise,
    equicorrelated,
    information,
    mean_error,
    random_covariance,
    subset_information,
    subset_sums,
)

UNBIASED = pytest.mark.parametrize("unbiased", [False, True])


def problem(seed: int, num_clients: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariance, rates and weights."""
    rng = np.random.default_rng(seed)
    covariance = random_covariance(num_clients, seed)
    return covariance, rng.uniform(0.2, 2.0, num_clients), rng.dirichlet(np.full(num_clients, 3.0))


def error(covariance, noise, weights, unbiased: bool) -> float:
    return weights**2 @ noise if unbiased else mean_error(covariance, noise, weights)


def assert_achievable(found: Allocation, covariance, rates) -> None:
    """The region has room for the rates, and so have the orders, on average."""
    noise = np.minimum(np.asarray(found.noise), 1e12)
    assert (subset_sums(rates) - subset_information(covariance, noise)).min() > -1e-9
    assert sum(found.shares) == pytest.approx(1.0)
    corners = [limits.corner_rates(covariance, noise, order) for order in found.orders]
    needed = np.array(found.shares) @ np.array(corners)
    assert (needed <= rates + 1e-9).all()
    assert np.asarray(found.rates) == pytest.approx(needed, abs=1e-9)


@UNBIASED
@pytest.mark.parametrize("seed", range(6))
def test_exact_against_all_corners(seed: int, unbiased: bool) -> None:
    """Equal to 1e-3 where one order does; better than every order where several share."""
    covariance, rates, weights = problem(seed)
    found = allocate(covariance, rates, weights, unbiased=unbiased)
    best = best_corner(covariance, rates, weights, unbiased=unbiased)
    assert_achievable(found, covariance, rates)
    assert found.distortion == pytest.approx(error(covariance, found.noise, weights, unbiased))
    assert found.distortion <= best * (1 + 1e-3)
    if len(found.orders) == 1:
        assert found.distortion == pytest.approx(best, rel=1e-3)
    assert (np.diff(found.history) <= 1e-9 * found.distortion).all()
    assert found.history[-1] <= best * (1 + 1e-3)
    assert found.distortion <= found.history[-1] * (1 + 1e-4)


@UNBIASED
def test_equal_clients_share_orders(unbiased: bool) -> None:
    """No single order is as good: the limit of the symmetric case is reached by taking turns."""
    covariance, rates = equicorrelated(5, 0.9), np.full(5, 1.0)
    found = allocate(covariance, rates, unbiased=unbiased)
    source = Symmetric(num_clients=5, correlation=0.9)
    assert found.distortion == pytest.approx(source.distortion_at(1.0, unbiased=unbiased), rel=1e-5)
    assert_achievable(found, covariance, rates)
    assert len(found.orders) > 1
    assert best_corner(covariance, rates, np.full(5, 0.2), unbiased=unbiased) > (
        1.05 * found.distortion
    )


def test_any_point_of_the_region_is_shared_by_corners() -> None:
    """Also close to a corner, which rounding moves it to, and away from the face."""
    rng = np.random.default_rng(6)
    covariance, noise = random_covariance(5, 6), rng.uniform(0.05, 1.0, 5)
    model = limits.factored(covariance)
    for shares in (*rng.dirichlet(np.ones(4), 8), [1 - 3e-7, 1e-7, 1e-7, 1e-7]):
        orders = [tuple(rng.permutation(5).tolist()) for _ in shares]
        face = limits.shared_rates(covariance, noise, orders, shares)
        for rates in (face, face + rng.choice([0.0, 0.4], 5)):
            precision, found, parts = time_sharing(model, 1 / noise, rates)
            assert precision == pytest.approx(1 / noise, rel=1e-5)
            assert len(found) <= 5
            needed = limits.shared_rates(covariance, 1 / precision, found, parts)
            assert (needed <= rates + 1e-9).all()


def test_where_it_starts_does_not_matter() -> None:
    covariance, rates, weights = problem(7)
    region = Region(limits.factored(covariance), rates, weights, unbiased=False)
    ends = []
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1)):
        inside = 0.99 / corner_noise(covariance, rates, order)
        ends.append(region.distortion(region.minimise(inside)[0]))
    alone = 0.9 * np.expm1(2 * math.log(2) * rates) / np.diag(covariance)
    ends.append(region.distortion(region.minimise(alone)[0]))
    assert max(ends) == pytest.approx(min(ends), rel=1e-6)


@UNBIASED
def test_greedy_is_close(unbiased: bool) -> None:
    """To the best corner, and, where rates differ, to the exact optimum."""
    for seed in range(6):
        covariance, rates, weights = problem(seed)
        found = allocate(covariance, rates, weights, unbiased=unbiased, exact=False)
        assert_achievable(found, covariance, rates)
        assert found.distortion <= 1.01 * best_corner(covariance, rates, weights, unbiased=unbiased)
        if len(found.orders) == 1:
            assert found.noise == pytest.approx(corner_noise(covariance, rates, found.order))
            assert found.rates == pytest.approx(rates)


@UNBIASED
def test_rotations_reach_the_symmetric_limit(unbiased: bool) -> None:
    source = Symmetric(num_clients=16, correlation=0.9)
    rates = np.full(16, 0.66)
    found = allocate(equicorrelated(16, 0.9), rates, unbiased=unbiased)
    assert found.distortion == pytest.approx(
        source.distortion_at(0.66, unbiased=unbiased), rel=1e-4
    )
    assert len(found.orders) == 16
    assert (found.rates <= rates + 1e-12).all()


@UNBIASED
def test_factor_models_are_the_dense_ones(unbiased: bool) -> None:
    rng = np.random.default_rng(8)
    model = FactorCovariance(rng.standard_normal((10, 2)), rng.uniform(0.2, 1.0, 10))
    rates = rng.uniform(0.5, 2.0, 10)
    thin, dense = (allocate(x, rates, unbiased=unbiased) for x in (model, model.dense()))
    assert thin.orders == dense.orders
    assert thin.noise == pytest.approx(dense.noise)
    assert thin.distortion == pytest.approx(dense.distortion)
    total = [allocate_total(x, 6.0, unbiased=unbiased) for x in (model, model.dense())]
    assert total[0].distortion == pytest.approx(total[1].distortion)
    assert total[0].noise == pytest.approx(total[1].noise, rel=1e-3)


def test_many_clients() -> None:
    rng = np.random.default_rng(9)
    model = FactorCovariance(rng.standard_normal((100, 4)), rng.uniform(0.2, 1.0, 100))
    rates = rng.uniform(0.1, 2.0, 100)
    found = allocate(model, rates)
    order = tuple(np.argsort(-rates, kind="stable").tolist())
    high_first = mean_error(model.dense(), corner_noise(model.dense(), rates, order), np.ones(100))
    assert found.distortion < high_first / 100**2
    assert (found.rates <= rates + 1e-9).all()
    total = allocate_total(model, float(rates.sum()))
    assert total.distortion < found.distortion


@LIBRARIES
@UNBIASED
def test_every_library_gives_the_same(xp, unbiased: bool) -> None:
    covariance, rates, weights = problem(10, num_clients=3)
    arrays = [xp.asarray(value) for value in (covariance, rates, weights)]
    for exact in (False, True):
        found = allocate(*arrays, unbiased=unbiased, exact=exact)
        expected = allocate(covariance, rates, weights, unbiased=unbiased, exact=exact)
        assert isinstance(found.noise, type(arrays[0]))
        assert isinstance(found.rates, type(arrays[0]))
        assert np.asarray(found.noise) == pytest.approx(expected.noise, rel=1e-4)
        assert found.order == expected.order
        assert found.distortion == pytest.approx(expected.distortion)
    total = allocate_total(arrays[0], 3.0, arrays[2], unbiased=unbiased)
    back = allocate_distortion(arrays[0], total.distortion, arrays[2], unbiased=unbiased)
    assert float(xp.sum(total.rates)) == pytest.approx(3.0)
    assert float(xp.sum(back.rates)) == pytest.approx(3.0, rel=1e-6)


def test_a_total_of_uncorrelated_clients_is_reverse_water_filling() -> None:
    variances, weights = np.array([4.0, 1.0, 0.3, 0.02, 0.0]), np.full(5, 0.2)
    for distortion in (0.1, 0.02, 0.001):
        for unbiased in (False, True):
            expected = limits.independent_rates(variances, distortion, weights, unbiased=unbiased)
            found = allocate_distortion(np.diag(variances), distortion, weights, unbiased=unbiased)
            assert found.rates == pytest.approx(expected, abs=1e-4)
            total = allocate_total(
                np.diag(variances), float(expected.sum()), weights, unbiased=unbiased
            )
            assert total.distortion == pytest.approx(distortion, rel=1e-6)
            assert (np.isinf(total.noise) == (expected == 0)).all()


@UNBIASED
def test_a_total_of_equal_clients_is_divided_equally(unbiased: bool) -> None:
    found = allocate_total(equicorrelated(8, 0.6), 8.0, unbiased=unbiased)
    source = Symmetric(num_clients=8, correlation=0.6)
    assert found.distortion == pytest.approx(source.distortion_at(1.0, unbiased=unbiased))
    assert found.noise == pytest.approx(found.noise[0], rel=1e-5)


@UNBIASED
@pytest.mark.parametrize("seed", range(3))
def test_no_other_division_of_a_total_is_better(seed: int, unbiased: bool) -> None:
    covariance, rates, weights = problem(seed)
    total = float(rates.sum())
    found = allocate_total(covariance, total, weights, unbiased=unbiased)
    assert float(found.rates.sum()) == pytest.approx(total, abs=1e-9)
    own = allocate(covariance, rates, weights, unbiased=unbiased)
    assert found.distortion <= own.distortion * (1 + 1e-6)
    rng = np.random.default_rng(seed)
    for spread in (0.03, 0.3, 1.0) * 10:
        noise = np.minimum(found.noise, 1e3) * np.exp(rng.normal(0, spread, 5))
        for _ in range(40):  # to the same sum rate
            noise = noise * 2 ** (0.4 * (information(covariance, noise, range(5)) - total))
        assert information(covariance, noise, range(5)) == pytest.approx(total, abs=1e-6)
        assert error(covariance, noise, weights, unbiased) > found.distortion * (1 - 1e-6)


def test_silence_is_enough() -> None:
    covariance = equicorrelated(4, 0.5)
    size = 0.625
    found = allocate_distortion(covariance, 2 * size)
    assert found.distortion == pytest.approx(size)
    assert np.isinf(found.noise).all()
    assert not found.rates.any()
    assert allocate(covariance, np.zeros(4)).distortion == pytest.approx(size)
    assert allocate_total(np.zeros((2, 2)), 1.0).distortion == 0.0


@pytest.mark.parametrize("exact", [False, True])
def test_clients_without_rate_are_predicted(exact: bool) -> None:
    """From client 2, who matters for that; clients without updates cost nothing."""
    covariance = np.diag([4.0, 1.0, 1.0, 1.0, 0.0]) + 0.1
    covariance[4, :] = covariance[:, 4] = 0.0
    covariance[0, 2] = covariance[2, 0] = 1.9
    covariance[1, 3] = covariance[3, 1] = 0.9
    rates, weights = np.array([0.0, 1.0, 1.0, 1.2, 1.0]), np.full(5, 0.2)
    found = allocate(covariance, rates, weights, exact=exact)
    assert np.isinf(found.noise[[0, 4]]).all()
    assert not found.rates[[0, 4]].any()
    assert_achievable(found, covariance, rates)
    noise = np.minimum(found.noise, 1e15)
    assert found.distortion == pytest.approx(mean_error(covariance, noise, weights))
    best = best_corner(covariance + 1e-12 * np.eye(5), rates + 1e-9, weights)
    assert found.distortion <= best * (1 + 1e-6)
    if exact:
        assert found.history[-1] <= best * (1 + 1e-3)


@UNBIASED
@pytest.mark.parametrize("exact", [False, True])
def test_updates_that_follow_from_others(exact: bool, unbiased: bool) -> None:
    covariance, rates = random_covariance(5, 12, rank=2), np.array([0.5, 1.0, 1.5, 2.0, 2.5])
    found = allocate(covariance, rates, exact=exact, unbiased=unbiased)
    assert_achievable(found, covariance, rates)
    best = best_corner(covariance, rates, np.full(5, 0.2), unbiased=unbiased)
    assert found.distortion <= best * (1.001 if exact else 1.1)


@pytest.mark.parametrize("exact", [False, True])
def test_one_client(exact: bool) -> None:
    found = allocate(np.array([[2.0]]), np.array([1.5]), exact=exact)
    assert found.distortion == pytest.approx(2.0 / 8, rel=1e-6)
    assert found.order == (0,)


def test_mistakes_are_named() -> None:
    eye = np.eye(3)
    with pytest.raises(ConfigError, match=r"rates must be 3 numbers from 0 to 64\.0"):
        allocate(eye, np.array([1.0, -1.0, 2.0]))
    with pytest.raises(ConfigError, match="unbiased mean"):
        allocate(eye, np.array([1.0, 0.0, 2.0]), unbiased=True)
    with pytest.raises(ConfigError, match="at most 8"):
        allocate(np.eye(9), np.ones(9), exact=True)
    with pytest.raises(ConfigError, match="rate is 0"):
        allocate_total(eye, 0)
    with pytest.raises(ConfigError, match="distortion is nan"):
        allocate_distortion(eye, math.nan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        allocate_total(eye, 1.0).distortion = 0.0


@LIBRARIES
def test_the_bound_falls_with_every_distortion(xp) -> None:
    settings = {"num_weights": 100, "smoothness": 2.0, "learning_rate": 0.1, "local_steps": 5}
    first = convergence_bound(xp.asarray([0.01, 0.03]), initial_gap=3.0, drift=0.5, **settings)
    assert first == pytest.approx(2 * 3.0 / (0.5 * 2) + 0.5 + 2.0 / 0.5 * 100 * 0.02)
    lower = convergence_bound(xp.asarray([0.01, 0.02]), initial_gap=3.0, drift=0.5, **settings)
    assert lower < first
    biased = convergence_bound(
        xp.asarray([0.01, 0.03]), initial_gap=3.0, drift=0.5, bias=0.25, **settings
    )
    assert biased == pytest.approx(first + 6.0 / 3)
    with pytest.raises(ConfigError, match="0 rounds"):
        convergence_bound(xp.asarray([]), initial_gap=1.0, **settings)


def test_a_weight_whose_square_is_none() -> None:
    apart = FactorCovariance(np.zeros((2, 1)), np.ones(2))
    found = allocate_total(apart, 3.0, np.array([1.0, 1e-200]), unbiased=True)
    np.testing.assert_allclose(found.rates, [3.0, 0.0])


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("nmse", [1e-3, 0.3, 20.0])
def test_independent_clients(count: int, nmse: float) -> None:
    """In closed form, what passes over all covariances find."""
    rng = np.random.default_rng(count)
    variances, weights = rng.uniform(0, 2, count) ** 3, rng.uniform(0.1, 1, count)
    variances[1:2], weights[2:3] = 0.0, 0.0
    apart = FactorCovariance(np.zeros((count, 1)), variances)
    same = FactorCovariance(np.diag(np.sqrt(variances)), np.zeros(count))
    distortion = nmse * float(weights**2 @ variances)
    found = allocate_distortion(apart, distortion, weights, unbiased=True)
    searched = allocate_distortion(same, distortion, weights, unbiased=True)
    np.testing.assert_allclose(found.distortion, distortion, rtol=1e-9)
    np.testing.assert_allclose(found.rates.sum(), searched.rates.sum(), rtol=1e-6)
    assert np.isinf(found.noise[1:3]).all()
    back = allocate_total(apart, float(found.rates.sum()), weights, unbiased=True)
    np.testing.assert_allclose(back.distortion, distortion, rtol=1e-9)
    given = allocate(apart, found.rates, np.where(found.rates > 0, weights, 0.0), unbiased=True)
    np.testing.assert_allclose(given.distortion, distortion, rtol=1e-9)
