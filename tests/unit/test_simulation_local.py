"""Local training: what it computes, and that no client's depends on the others."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from commrt.errors import ConfigError
from commrt.simulation.batches import Batches
from commrt.simulation.data import Dataset, cross_entropy, load, mlp, seeded, squared_error
from commrt.simulation.local import LocalConfig, LocalTraining
from commrt.simulation.partition import partition

SIZES = [14, 33, 1, 16, 7, 0, 40, 15, 14, 3, 22, 64, 5, 9, 31, 2, 8, 17, 12, 30]
CLIENTS = range(len(SIZES))


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5, bias=False))


def convolutions():
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 5))


def normed():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))


def dropping():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Dropout(0.5), nn.Linear(7, 5))


class Unknown(nn.Sequential):
    """Any module of which the layers are not known."""


def aligned():
    return Unknown(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5, bias=False))


MODELS = {
    "batched": small,
    "vmap": convolutions,
    "aligned": aligned,
    "odd": lambda: Unknown(*small()),
    "loop": normed,
    "random": dropping,
}


def data_of(make, **others):
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(2 * sum(SIZES), 1, 3, 4, generator=draw)
    targets = torch.randint(5, (len(inputs),), generator=draw)
    values = {
        "name": "test", "inputs": inputs, "targets": targets, "labels": targets.numpy(),
        "groups": None, "test_inputs": inputs[:50], "test_targets": targets[:50],
        "metric": "accuracy", "model": seeded(make), "loss": cross_entropy,
    }  # fmt: skip
    return Dataset(**(values | others))


def shares_of(sizes=SIZES):
    order = np.random.default_rng(2).permutation(sum(sizes))
    return np.split(order, np.cumsum(sizes)[:-1])


def training(make=small, sizes=SIZES, data=None, device="cpu", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LocalConfig(**({"batch_size": 16} | options))
        return LocalTraining(data or data_of(make), shares_of(sizes), config, device=device)


# -- what is computed -----------------------------------------------------------------------------


def plainly(trained, client, *, seed=3, round_index=2):
    """The client's update by torch's own optimizer, on batches in the runtime's order."""
    config, data = trained.config, trained.dataset
    module = data.model(0).train()
    before = [p.detach().clone() for p in module.parameters()]
    kinds = {
        "sgd": lambda: torch.optim.SGD(
            module.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        ),
        "adam": lambda: torch.optim.Adam(
            module.parameters(), config.lr, weight_decay=config.weight_decay
        ),
    }
    optimizer = kinds[config.optimizer]()
    batches = Batches(
        shares_of(), batch_size=config.batch_size, steps=config.steps, granule=1,
        epochs=config.epochs if config.steps else config.epochs or 1,
    )  # fmt: skip
    for (picked,) in batches.draw(np.array([client]), seed=seed, round_index=round_index):
        chosen = picked.examples[0]
        loss = F.cross_entropy(module(data.inputs[chosen]), data.targets[chosen])
        moved = zip(module.parameters(), before, strict=True)
        loss = loss + config.prox / 2 * sum((p - b).square().sum() for p, b in moved)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = zip(module.parameters(), before, strict=True)
    return torch.cat([(p.detach() - b).flatten() for p, b in moved])


OPTIONS = [
    {},
    {"epochs": 3, "momentum": 0.9},
    {"steps": 7, "weight_decay": 0.1},
    {"epochs": 2, "prox": 0.5},
    {"epochs": 2, "optimizer": "adam", "lr": 1e-2, "weight_decay": 0.01},
    {"steps": 5, "prox": 0.1, "weight_decay": 0.1, "momentum": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize(
    ("make", "way"),
    [(small, "batched"), (aligned, "vmap"), (small, "loop")],
    ids=["batched", "vmap", "loop"],
)
def test_an_update_is_that_of_torch_s_optimizer(make, way, options):
    trained = training(make, vectorise=way != "loop", **options)
    assert trained.way == way
    updates = trained.updates(trained.start(0), CLIENTS, 2, 3)
    assert not updates[SIZES.index(0)].any()
    for client in (0, 1, 2, 6, 11):
        expected = plainly(trained, client)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(updates[client], expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["digits-mlp", "digits-cnn"])
def test_all_ways_agree_on_digits(name):
    pytest.importorskip("sklearn")
    data = load(name)
    shares = partition(
        "dirichlet:alpha=0.5", labels=data.labels, groups=None, num_clients=30, seed=0
    )
    many, single = (
        LocalTraining(data, shares, LocalConfig(batch_size=16, vectorise=v)) for v in (True, False)
    )
    start = many.start(0)
    updates = many.updates(start, range(30), 0, 0)
    torch.testing.assert_close(
        updates, single.updates(start, range(30), 0, 0), rtol=1e-3, atol=1e-6
    )


def partly_frozen():
    module = small()
    module[1].requires_grad_(False)
    return module


def tied():
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    module[3].weight = module[1].weight
    return module


@pytest.mark.parametrize(
    ("make", "is_batched"),
    [
        (lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU()), True),
        (lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.ReLU(), nn.Linear(12, 8)), True),
        (lambda: nn.Sequential(nn.Flatten(2), nn.Flatten(), nn.Linear(12, 8)), False),
        (partly_frozen, False),
        (tied, False),
    ],
)
def test_unusual_models_are_trained_as_by_the_loop(make, is_batched):
    single, many = training(make, vectorise=False), training(make)
    assert (many.way == "batched") == is_batched
    start = many.start(0)
    assert len(start) == sum(p.numel() for p in make().parameters() if p.requires_grad)
    updates = many.updates(start, CLIENTS, 0, 0)
    torch.testing.assert_close(updates, single.updates(start, CLIENTS, 0, 0), rtol=1e-4, atol=1e-6)


# -- no client depends on the others -------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS[:5:2], ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_company_and_order_change_no_bit(name, options):
    sizes = [2 * size for size in SIZES]  # BatchNorm refuses a batch of one
    trained = training(MODELS[name], sizes, **options)
    start = trained.start(0)
    every = trained.updates(start, CLIENTS, 2, 3)
    for some in ([4], [11, 0], [0, 1, 2], [19, 6, 6, 3, 5], list(reversed(CLIENTS)), range(1, 18)):
        assert torch.equal(trained.updates(start, some, 2, 3), every[list(some)]), some
    assert torch.equal(
        training(MODELS[name], sizes, **options).updates(start, CLIENTS, 2, 3), every
    )


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("make", [small, mlp])
def test_chunks_change_no_bit(make, chunk):
    data = data_of(make)
    if make is mlp:
        data = dataclasses.replace(data, inputs=torch.rand(len(data), 1, 8, 8))
    start = training(data=data).start(0)
    expected = training(data=data, epochs=2).updates(start, CLIENTS, 0, 0)
    chunked = training(data=data, epochs=2, chunk=chunk)
    assert chunked.way == "batched"
    assert torch.equal(chunked.updates(start, CLIENTS, 0, 0), expected)


def test_the_global_generator_is_neither_used_nor_changed():
    trained = training(dropping)
    start = trained.start(0)
    torch.manual_seed(1)
    first = trained.updates(start, [1, 2], 0, 0)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(trained.updates(start, [1, 2], 0, 0), first)
    assert not torch.equal(trained.updates(start, [1, 2], 1, 0), first)


def test_rounds_and_seeds_draw_anew():
    trained = training()
    start = trained.start(0)
    first = trained.updates(start, [1], 0, 0)
    assert not torch.equal(trained.updates(start, [1], 1, 0), first)
    assert not torch.equal(trained.updates(start, [1], 0, 1), first)
    assert torch.equal(trained.updates(start, [1], 0, 0), first)


# -- batches --------------------------------------------------------------------------------------


def drawn(client, sizes=SIZES, others=(), **options):
    """A client's batches: the examples that count, of each step."""
    values = {"batch_size": 16, "epochs": 1, "steps": None, "granule": 8} | options
    batches = Batches(shares_of(sizes), **values)
    found = []
    for step in batches.draw(np.array([client, *others]), seed=0, round_index=0):
        own = [picked for picked in step if picked.rows.start == 0]
        for picked in own:
            counted = picked.shares[0] > 0
            torch.testing.assert_close(picked.shares[0].sum(), torch.tensor(1.0))
            found.append(picked.examples[0][counted].tolist())
    return found


def flat(lists):
    return [entry for some in lists for entry in some]


@pytest.mark.parametrize(
    "options", [{"epochs": 3}, *({"epochs": None, "steps": n} for n in (1, 7))]
)
def test_it_says_on_how_many_examples_a_client_trains(options):
    """Small batches of small clients, and last ones of epochs, are not counted as whole ones."""
    told = Batches(shares_of(SIZES), **{"batch_size": 16, "steps": None, "granule": 8} | options)
    found = [len(flat(drawn(client, **options))) for client in range(len(SIZES))]
    assert told.num_examples.tolist() == found
    assert 0 in found


@pytest.mark.parametrize("client", [1, 2, 3, 11])
def test_an_epoch_has_every_example_once(client):
    steps = drawn(client, epochs=2)
    first, second = flat(steps[: len(steps) // 2]), flat(steps[len(steps) // 2 :])
    assert sorted(first) == sorted(second) == sorted(shares_of()[client].tolist())
    assert first != second or len(first) == 1
    assert [len(batch) for batch in drawn(client)][:-1] == [16] * ((SIZES[client] - 1) // 16)


def test_steps_go_on_over_epochs():
    steps = drawn(1, steps=8, epochs=None)
    assert [len(step) for step in steps] == [16, 16, 1] * 2 + [16, 16]
    assert flat(steps[:6]) == flat(drawn(1, epochs=2))


def test_batches_do_not_depend_on_company():
    assert drawn(1, epochs=2) == drawn(1, epochs=2, others=[11, 0, 5])


# -- models of all kinds --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [(normed, "BatchNorm1d.*: (vmap|examples)"), (dropping, "Dropout.*; vmap: .*random")],
)
def test_what_cannot_be_vectorised_is_said_once(make, reason):
    with pytest.warns(UserWarning, match="one after another") as caught:
        trained = LocalTraining(data_of(make), shares_of(), LocalConfig())
    assert len(caught) == 1
    assert trained.way == "loop"
    with pytest.raises(ConfigError, match="vectorise is True, but the model cannot be"):
        training(make, vectorise=True)


def test_examples_that_act_on_each_other_are_found():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 5)

        def forward(self, x):
            y = self.linear(x.flatten(1))
            return y - y.mean(0)

    trained = training(Centred)
    assert trained.way == "loop"
    assert "act on each other" in trained.reason


def test_statistics_of_batchnorm_are_trained_along():
    trained = training(normed)
    start = trained.start(0)
    assert set(trained.layout.shapes) > {"2.running_mean", "2.running_var"}
    updates = trained.updates(start, [0, 3], 0, 0)
    for name in ("2.running_mean", "2.running_var"):
        parts = [trained.layout.split(update)[name] for update in updates]
        assert parts[0].any()
        assert not torch.equal(*parts)
    moved = start.clone()
    trained.layout.split(moved)["2.running_mean"].fill_(30.0)
    assert trained.evaluate(moved) != trained.evaluate(start)


def test_buffers_that_no_one_changes_stay():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.ones(5))
            self.linear = nn.Linear(12, 5)

        def forward(self, x):
            return self.linear(x.flatten(1)) + self.shift

    trained = training(Shifted)
    assert trained.way == "vmap"
    update = trained.updates(trained.start(0), [0, 1, 2], 0, 0)[0]
    assert not trained.layout.split(update)["shift"].any()
    assert trained.layout.split(update)["linear.bias"].any()


def test_a_regression_has_a_loss():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * sum(SIZES), 4, generator=draw)
    data = data_of(
        lambda: nn.Linear(4, 1), inputs=inputs, targets=inputs.sum(1), test_inputs=inputs,
        test_targets=inputs.sum(1), labels=None, metric="loss", loss=squared_error,
    )  # fmt: skip
    trained = training(data=data, epochs=5)
    weights = trained.start(0)
    before = trained.evaluate(weights)
    for index in range(3):
        weights = weights + trained.updates(weights, CLIENTS, index, 0).mean(0)
    assert trained.evaluate(weights) < 0.05 * before


def test_federated_averaging_learns_digits():
    pytest.importorskip("sklearn")
    data = load("digits-mlp")
    shares = partition("iid", labels=data.labels, groups=None, num_clients=20, seed=0)
    trained = LocalTraining(data, shares, LocalConfig(batch_size=16, epochs=2))
    weights = trained.start(0)
    assert weights.shape == (17226,)
    out = torch.empty(20, len(weights))
    for index in range(15):
        assert trained.updates(weights, range(20), index, 0, out=out) is out
        weights = weights + out.mean(0)
    assert trained.evaluate(weights) > 0.8


# -- text and arrays ------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    pictures, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    data = load("digits-mlp", seed=3)
    inputs = torch.cat([data.inputs, data.test_inputs]).flatten(1) * 16
    targets = torch.cat([data.targets, data.test_targets])
    assert (len(data), data.targets.dtype, data.inputs.dtype) == (1437, torch.int64, torch.float32)

    def rows(images, numbers):
        return sorted(map(tuple, np.column_stack([images, numbers]).tolist()))

    assert rows(inputs, targets) == rows(pictures, labels)


def test_text_comes_by_package_and_by_file():
    packages, files = load("text"), load("text-files")
    assert len(np.unique(packages.groups)) == 16
    assert len(np.unique(files.groups)) > 100
    for data in (packages, files):
        assert torch.equal(data.inputs[:, 1:], data.targets[:, :-1])
        assert len(data.groups) == len(data)
    shares = partition("natural", labels=None, groups=packages.groups, num_clients=8, seed=0)
    trained = LocalTraining(packages, shares, LocalConfig(steps=2, batch_size=2))
    start = trained.start(0)
    assert 5 < trained.evaluate(start) < 6
    moved = start + trained.updates(start, [3, 5], 0, 0).mean(0)
    assert trained.evaluate(moved) < trained.evaluate(start)


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_arrays_of_a_file(tmp_path):
    inputs, targets = np.random.rand(50, 1, 8, 8), np.arange(50) % 10
    name = save(tmp_path / "a.npz", inputs=inputs, targets=targets, groups=targets // 2)
    data = load(name, model="commrt.simulation.data:mlp")
    assert (len(data), len(data.test_inputs)) == (40, 10)
    assert (data.metric, data.inputs.dtype) == ("accuracy", torch.float32)
    assert np.array_equal(data.labels // 2, data.groups)
    assert torch.equal(*(next(data.model(s).parameters()) for s in (1, 1)))
    assert not torch.equal(*(next(data.model(s).parameters()) for s in (1, 2)))
    name = save(tmp_path / "b.npz", inputs=inputs, targets=inputs[:, 0, 0, 0])
    data = load(name, model="commrt.simulation.data:mlp")
    assert (data.metric, data.labels, data.groups) == ("loss", None, None)


@pytest.mark.parametrize(
    ("arrays", "model", "message"),
    [
        ({"inputs": np.zeros(3)}, "a:b", "must have inputs and targets, as many"),
        ({"inputs": np.zeros(3), "targets": np.zeros(2)}, "a:b", "as many"),
        ({"inputs": np.zeros(3), "targets": np.zeros(3)}, "a:b", "too few to train and to test"),
        ({"inputs": np.zeros(9), "targets": np.zeros(9)}, None, "needs a model"),
        ({"inputs": np.zeros(9), "targets": np.zeros(9)}, "nowhere:b", "cannot be had"),
        ({"inputs": np.zeros(9), "targets": np.zeros(9)}, "math:pi", "is no function"),
        ({"inputs": np.zeros(9), "targets": np.zeros(9)}, ":b", "cannot be had"),
        ({"inputs": np.zeros(9), "targets": np.zeros(9)}, ".a:b", "cannot be had"),
        ({"inputs": np.zeros(()), "targets": np.zeros(())}, "a:b", "too few to train and to test"),
        ({"inputs": np.array(["a"] * 9), "targets": np.zeros(9)}, "a:b", "must be numbers"),
        (None, "a:b", "cannot be read"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, model, message):
    path = tmp_path / "a.npz"
    if arrays:
        save(path, **arrays)
    with pytest.raises(ConfigError, match=message):
        load(str(path), model=model)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 and no more", b"\x80\4."])
def test_a_file_that_has_no_arrays_is_refused(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(path), model="a:b")


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ConfigError, match="data='mnist': must be digits-mlp, "):
        load("mnist")
    with pytest.raises(ConfigError, match="digits-mlp has a model"):
        load("digits-mlp", model="a:b")


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer is 'lion': must be one of"),
        ({"lr": 0.0}, "lr is 0.0: must be positive and finite"),
        ({"momentum": 1.0}, "momentum is 1.0: must be from 0 to below 1"),
        ({"momentum": 0.5, "optimizer": "adam"}, "momentum is 0.5: adam has none"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0: must be from 0"),
        ({"prox": float("nan")}, "prox is nan: must be from 0"),
        ({"batch_size": 0}, "batch_size is 0: must be at least 1"),
        ({"epochs": 0}, "epochs is 0: must be at least 1"),
        ({"epochs": 1, "steps": 1}, "epochs is 1 and steps 1: give one of them"),
        ({"vectorise": "yes"}, "vectorise is 'yes': must be True, False or 'auto'"),
        ({"chunk": 0}, "chunk is 0: must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LocalConfig(**options)


def test_what_does_not_fit_is_refused():
    trained = training()
    start = trained.start(0)
    with pytest.raises(ConfigError, match="must be from 0 to 19"):
        trained.updates(start, [20], 0, 0)
    with pytest.raises(ConfigError, match="weights has shape"):
        trained.updates(start[1:], [0], 0, 0)
    with pytest.raises(ConfigError, match="not finite"):
        trained.updates(start * float("nan"), [0], 0, 0)
    with pytest.raises(ConfigError, match="must be fp32"):
        trained.updates(start, [0], 0, 0, out=torch.empty(2, len(start)))
    assert trained.updates(start, [], 0, 0).shape == (0, len(start))
