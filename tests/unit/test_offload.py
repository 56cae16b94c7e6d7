"""Offloaded optimizers: the same training to the bit, over an emulated link that counts."""

import contextlib
import copy
import pickle
import random
import resource
import time
from unittest import mock

import pytest
import torch
from torch import nn

from commrt.errors import ConfigError, OffloadError
from commrt.optim import AdamMini, AdamW8bit, Adan, Lion, MoFO, offload
from commrt.optim.offloading import link as links
from commrt.optim.offloading import plan, slab
from commrt.optim.offloading.checksums import checksum
from commrt.training.config import ModelConfig
from commrt.training.model import GPT
from tests.unit.test_adam_mini import assert_same, backward, train

KINDS = {
    "adam-mini": lambda model: AdamMini(model, 1e-3, max_grad_norm=0.5),
    "adam-mini int8": lambda model: AdamMini(model, 1e-3, momentum_dtype="int8", max_grad_norm=0.5),
    "adam-mini by head": lambda model: AdamMini(model, 1e-3, partition=lambda *_: "tensor"),
    "residual": lambda model: AdamMini(model, 1e-3, weight_mode="residual"),
    "stochastic": lambda model: AdamMini(model, 1e-3, weight_mode="stochastic"),
    "adamw": lambda model: AdamW8bit(model, 1e-3, momentum_dtype="fp32", max_grad_norm=0.5),
    "adamw8": lambda model: AdamW8bit(model, 1e-3),
    "lion": lambda model: Lion(model, 1e-4, momentum_dtype="bf16"),
    "adan": lambda model: Adan(model, 1e-3),
    "mofo": lambda model: MoFO(model, 1e-3, fraction=0.2, max_grad_norm=0.5),
}
CHUNK = 40_000
HALF = plan.Rates(up=1e15, down=1e15, device=1e9, host=1e9)


def gpt(dtype=torch.float32, num_layers=2):
    torch.manual_seed(0)
    return GPT(ModelConfig(dim=64, num_layers=num_layers, num_heads=4, seq_len=32)).to(dtype)


def made(kind, mode=None, *, dtype=torch.float32, overlaps=False, **options):
    model = gpt(dtype)
    optimizer = KINDS[kind](model)
    if mode is not None:
        options.setdefault("chunk_bytes", CHUNK)
        offload(optimizer, mode, model=model if overlaps else None, **options)
    return model, optimizer


def is_same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b


def assert_same_run(one, other):
    """Weights and state, to the bit."""
    assert is_same(one[1].state_dict(), other[1].state_dict())
    assert_same(one[0], other[0])


@contextlib.contextmanager
def jitter(seed):
    """Copies and steps take random times."""
    chooser, run = random.Random(seed), links.ThreadLane.run

    def late(lane, job, after=()):
        delay = chooser.choice([0.0, 0.0, 0.001, 0.004])
        return run(lane, lambda: (time.sleep(delay), job())[1], after)

    with mock.patch.object(links.ThreadLane, "run", late):
        yield


BF16 = ("residual", "stochastic", "lion", "adam-mini int8")


@pytest.mark.parametrize("mode", ["stream", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_training_to_the_bit(kind, mode):
    mode = "cpu" if kind == "mofo" else mode
    dtype = torch.bfloat16 if kind in BF16 else torch.float32
    expected = made(kind, dtype=dtype)
    losses = train(*expected, 5)
    for overlaps in (False, True):
        run = made(kind, mode, dtype=dtype, overlaps=overlaps)
        with jitter(1):
            assert train(*run, 5) == losses
        assert_same_run(run, expected)


@pytest.mark.parametrize(
    ("kind", "dtype", "mode"),
    [
        ("adam-mini int8", torch.bfloat16, "changed"),
        ("adan", torch.float32, "changed"),
        ("mofo", torch.float32, "changed"),
        ("adam-mini int8", torch.bfloat16, "folder"),
        ("adan", torch.float32, "folder"),
        ("adam-mini", torch.float32, "auto"),
    ],
)
def test_patches_and_files_and_both_ways_lose_nothing(kind, dtype, mode, tmp_path):
    options = {"weights": "changed"} if mode == "changed" else {}
    if mode == "folder":
        options["folder"] = tmp_path
    mode = {"changed": "cpu", "folder": "stream", "auto": "auto"}[mode]
    expected = made(kind, dtype=dtype)
    losses = train(*expected, 5)
    for overlaps in (False, True):
        half = mock.patch.object(plan, "measure", return_value=HALF)
        with jitter(2), half if mode == "auto" else contextlib.nullcontext():
            run = made(kind, mode, dtype=dtype, overlaps=overlaps, **options)
            assert train(*run, 5) == losses
        if mode == "auto":
            assert 2 < len(run[1].offloaded.plan.hosted) < len(list(run[0].parameters())) - 2
        assert_same_run(run, expected)
    assert not list(tmp_path.iterdir())


BYTES = [
    ("adamw", torch.float32, "stream", {}, 16.0),
    ("adam-mini", torch.float32, "stream", {}, 8.0),
    ("adam-mini int8", torch.float32, "stream", {}, 2.05),
    ("adam-mini", torch.float32, "cpu", {}, 8.01),
    ("adam-mini", torch.float32, "cpu", {"grads": "bf16"}, 6.01),
    ("adam-mini int8", torch.bfloat16, "cpu", {}, 4.01),
    ("adam-mini int8", torch.bfloat16, "cpu", {"grads": "loco4"}, 2.6),
]


@pytest.mark.parametrize(("kind", "dtype", "mode", "options", "most"), BYTES)
def test_bytes_a_parameter_and_step(kind, dtype, mode, options, most):
    """As counted by the engine; GPT-2's shapes, four layers."""
    model = GPT(ModelConfig(dim=768, num_layers=1, num_heads=12, seq_len=64)).to(dtype)
    optimizer = KINDS[kind](model)
    offload(optimizer, mode, **options)
    numel, counted = sum(p.numel() for p in model.parameters()), []
    link = optimizer.offloaded.link
    for step in range(3):
        backward_of(model, step)
        optimizer.step()
        optimizer.offloaded.settle()
        counted.append(link.up.num_bytes + link.down.num_bytes)
    assert (counted[2] - counted[1]) / numel <= most
    assert (counted[2] - counted[1]) / numel > 0.9 * most


def backward_of(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1


def test_bytes_of_what_changes():
    """At a small rate, and where few weights move: a bit for each, and what has changed."""
    for make, dtype, grads, most in (
        (lambda m: AdamMini(m, 1e-5, momentum_dtype="int8"), torch.bfloat16, "loco4", 1.0),
        (
            lambda m: MoFO(m, 1e-3, fraction=0.05),
            torch.float32,
            "bf16",
            2 + 1 / 8 + 0.05 * 4.5 + 0.02,
        ),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 512)).to(dtype)
        nn.init.normal_(model[0].weight, std=0.02)
        nn.init.normal_(model[1].weight, std=0.02)
        optimizer = offload(make(model), "cpu", grads=grads, weights="changed")
        for step in range(4):
            before = optimizer.offloaded.link.up.num_bytes
            down = optimizer.offloaded.link.down.num_bytes
            backward_of(model, step)
            optimizer.step()
            optimizer.offloaded.settle()
        link, numel = optimizer.offloaded.link, sum(p.numel() for p in model.parameters())
        sent = link.up.num_bytes - before + link.down.num_bytes - down
        assert sent / numel < most


def test_resuming_in_another_mode(tmp_path):
    expected = made("adam-mini int8")
    train(*expected, 8)
    model, optimizer = made("adam-mini int8", "stream")
    train(model, optimizer, 2)
    for first, (mode, options) in enumerate(
        [("cpu", {}), (None, {}), ("stream", {"folder": tmp_path}), ("auto", {})]
    ):
        weights = copy.deepcopy(model.state_dict())
        state = copy.deepcopy(optimizer.state_dict())
        model, optimizer = made("adam-mini int8", mode, overlaps=bool(first % 2), **options)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, 1 if first else 3, 2 + first + 2 * bool(first))
    assert_same_run((model, optimizer), expected)


@pytest.mark.parametrize("mode", ["stream", "cpu", "changed"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("adam-mini", torch.float32),
        ("adam-mini", torch.bfloat16),
        ("residual", torch.bfloat16),
        ("stochastic", torch.bfloat16),
    ],
)
def test_weights_that_others_change(kind, dtype, mode):
    """By loading them after the state, or by hand, past what torch counts."""
    options = {"weights": "changed"} if mode == "changed" else {}
    mode = "cpu" if mode == "changed" else mode
    expected = made(kind, dtype=dtype)
    train(*expected, 3)
    run = made(kind, mode, dtype=dtype, overlaps=True, **options)
    train(*run, 2, 7)
    run[1].load_state_dict(copy.deepcopy(expected[1].state_dict()))
    run[0].load_state_dict(copy.deepcopy(expected[0].state_dict()))
    train(*expected, 2, 3)
    train(*run, 2, 3)
    run[1].offloaded.wait()
    for model, _ in (run, expected):
        model.blocks[0].qkv.weight.data[3].mul_(3)
        model.norm.weight.data.mul_(0.5)
    train(*expected, 2, 5)
    train(*run, 2, 5)
    assert_same_run(run, expected)


def test_a_state_that_is_there_already_moves():
    expected, run = made("adam-mini"), made("adam-mini")
    train(*expected, 4)
    train(*run, 2)
    offload(run[1], "cpu", chunk_bytes=CHUNK)
    train(*run, 1, 2)
    run[1].offloaded.release()
    assert run[1].offloaded is None
    train(*run, 1, 3)
    assert_same_run(run, expected)


@pytest.mark.parametrize("mode", ["stream", "cpu"])
def test_schedulers_and_scalers_and_accumulation(mode):
    def run(offloaded):
        model = gpt(torch.bfloat16)
        optimizer = AdamMini(model, lr=1e-3, max_grad_norm=0.5)
        if offloaded:
            offload(optimizer, mode, model=model, chunk_bytes=CHUNK)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        for step in range(9):
            for micro in range(2 if step < 5 else 1):
                loss = backward_scaled(model, scaler, 2 * step + micro)
            if step == 3:
                next(model.parameters()).grad[0] = float("inf")
            if step == 6:
                scaler.unscale_(optimizer)
            if step == 7:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad(set_to_none=bool(step % 2))
        return (model, optimizer), loss.item()

    (one, loss), (other, other_loss) = run(False), run(True)
    assert loss == other_loss
    assert_same_run(other, one)


def backward_scaled(model, scaler, step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(8, (2, 32), generator=generator)
    loss = model(tokens).float().logsumexp(-1).mean()
    scaler.scale(loss).backward()
    return loss


def test_gradients_come_during_backward():
    """From the second step on; with as many backwards a step as before; unless they are changed."""
    model, optimizer = made("adam-mini", "cpu", overlaps=True)
    down = optimizer.offloaded.link.down
    train(model, optimizer, 2)
    before = down.num_bytes
    backward(model, 2)
    early = down.num_bytes - before
    numel = sum(p.numel() for p in model.parameters())
    assert early > 3.9 * numel
    optimizer.step()
    optimizer.zero_grad()
    optimizer.offloaded.settle()
    assert down.num_bytes - before <= 4 * numel + 4
    backward(model, 3)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-4)
    optimizer.step()
    optimizer.zero_grad()
    before = down.num_bytes
    backward(model, 4)
    assert down.num_bytes == before


class Tied(nn.Module):
    """Uses weights of modules that it does not call, and one module twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(64, 4, 128, 0.0) for _ in range(3)])
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return nn.functional.linear(self.norm(x), self.head.weight) + self.embed.weight.sum()


@pytest.mark.parametrize("mode", ["stream", "cpu"])
def test_every_layer_waits_for_its_weights(mode):
    """Also for weights that are read past their modules; step() itself does not wait."""

    def run(offloaded):
        torch.manual_seed(0)
        model = Tied()
        optimizer = AdamMini(model, 1e-2, max_grad_norm=0.5)
        if offloaded:
            offload(optimizer, mode, model=model, chunk_bytes=CHUNK, link_rate="20MB/s")
        losses, is_pending = [], []
        for step in range(4):
            tokens = torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(step))
            loss = model(tokens).logsumexp(-1).mean()
            loss.backward()
            optimizer.step()
            if offloaded:
                chunks = running(optimizer)
                is_pending.append(not all(chunk.ready._future.done() for chunk in chunks))
            optimizer.zero_grad()
            losses.append(loss.item())
        assert any(is_pending) or not offloaded
        return losses, copy.deepcopy(model.state_dict())

    losses, weights = run(False)
    assert losses == run(True)[0]
    assert is_same(dict(weights), dict(run(True)[1]))


def running(optimizer):
    return [] if optimizer.offloaded is None else optimizer.offloaded._running


def test_a_model_compiled_in_place_is_refused():
    model, optimizer = made("adam-mini")
    model.compile(backend="eager")
    with pytest.raises(ConfigError, match=r"must be torch.compile\(model\)"):
        offload(optimizer, "cpu", model=model)


def test_a_compiled_model():
    expected = made("adam-mini")
    losses = train(*expected, 4)
    model, optimizer = made("adam-mini")
    compiled = torch.compile(model, backend="eager")
    offload(optimizer, "cpu", model=compiled, chunk_bytes=CHUNK)
    assert train(compiled, optimizer, 4) == losses


@pytest.mark.parametrize("codec", ["bf16", "loco4", "block8"])
def test_gradients_through_a_codec_train_as_well(codec):
    losses = train(*made("adam-mini"), 30)
    found = train(*made("adam-mini", "cpu", grads=codec, overlaps=True), 30)
    assert found[-1] == pytest.approx(losses[-1], abs=0.02 * (losses[0] - losses[-1]))


def test_what_a_codec_owes_is_saved():
    run = made("adam-mini", "cpu", grads="loco4")
    train(*run, 3)
    weights, state = copy.deepcopy((run[0].state_dict(), run[1].state_dict()))
    assert sum("grad_residual" in own for own in state["state"].values()) > 3
    resumed = made("adam-mini", "cpu", grads="loco4", overlaps=True, chunk_bytes=3 * CHUNK)
    resumed[0].load_state_dict(weights)
    resumed[1].load_state_dict(state)
    for own, loaded in zip(
        state["state"].values(), resumed[1].state_dict()["state"].values(), strict=True
    ):
        assert own.keys() == loaded.keys()
        owed, expected = loaded.pop("grad_residual", None), own.pop("grad_residual", None)
        assert is_same(loaded, own)
        if expected is not None:  # coded anew
            torch.testing.assert_close(owed, expected, rtol=0, atol=expected.abs().max() / 200)
    assert train(*resumed, 3, 3) == pytest.approx(train(*run, 3, 3), rel=1e-4)
    state = copy.deepcopy(run[1].state_dict())
    with pytest.warns(UserWarning, match="grad_residual of a parameter of shape"):
        made("adam-mini")[1].load_state_dict(state)


def test_nothing_of_a_gradient_is_lost():
    """What arrived, and what is owed, are all gradients; Lion's momentum is their average."""
    torch.manual_seed(0)
    model = nn.Linear(64, 128, bias=False)
    optimizer = AdamMini(model, lr=0.0, betas=(0.0, 0.999))
    offload(optimizer, "cpu", grads="loco4")
    total, arrived = torch.zeros(128, 64), torch.zeros(128, 64)
    for step in range(20):
        backward_of(model, step)
        total += model.weight.grad
        optimizer.step()
        arrived += optimizer.state[model.weight]["exp_avg"]
    owed = optimizer.state_dict()["state"][0]["grad_residual"] / (1 - 0.8)
    torch.testing.assert_close(arrived + owed, total, rtol=0, atol=2e-3)
    assert not torch.allclose(arrived, total, rtol=0, atol=2e-3)


def test_second_moments_are_of_the_gradients_as_they_were():
    exact, coded = made("adam-mini"), made("adam-mini", "cpu", grads="loco2")
    for run in (exact, coded):
        backward_of(run[0], 0)
        run[1].step()
    for one, other in zip(exact[0].parameters(), coded[0].parameters(), strict=True):
        if one.dim() > 1:
            second, of_coded = exact[1].state[one], coded[1].state[other]
            torch.testing.assert_close(of_coded["exp_avg_sq"], second["exp_avg_sq"])


# -- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("mode", ["stream", "cpu", "changed", "loco4"])
def test_a_copy_that_fails(mode, at, overlaps):
    """The step is taken all the same, and the next one raises; nothing hangs."""
    options = {"changed": {"weights": "changed"}, "loco4": {"grads": "loco4"}}.get(mode, {})
    mode = mode if mode == "stream" else "cpu"
    expected = made("adam-mini int8", mode if options.get("grads") else None, **options)
    run = made("adam-mini int8", mode, overlaps=overlaps, **options)
    train(*expected, 3)
    train(*run, 2)
    run[1].offloaded.begin()
    calls, copies = [], links.copy

    def fail(*args):
        calls.append(args)
        if len(calls) == at + 1:
            raise ConnectionError("cable unplugged")
        copies(*args)

    with mock.patch.object(links, "copy", fail):
        train(*run, 1, 2)
        run[1].offloaded.wait()
        with contextlib.suppress(ConnectionError):
            run[1].offloaded.settle()
    assert len(calls) > at
    assert_same_run(run, expected)
    backward(run[0], 3)
    with pytest.raises(OffloadError, match="cable unplugged"):
        run[1].step()
    assert_same_run(run, expected)


def test_a_disk_that_is_full(tmp_path):
    with (
        mock.patch("os.posix_fallocate", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OffloadError, match="No space left on device"),
    ):
        made("adam-mini", "stream", folder=tmp_path)
    with pytest.raises(OffloadError, match="No such file"):
        made("adam-mini", "stream", folder=tmp_path / "nowhere")


def test_a_disk_that_fails_in_a_step(tmp_path):
    """By a limit of the system to the size of files, which writes run into."""
    expected = made("adam-mini")
    train(*expected, 3)
    run = made("adam-mini", "stream", folder=tmp_path)
    train(*run, 2)
    run[1].offloaded.settle()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        train(*run, 1, 2)
        run[1].offloaded.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same_run(run, expected)
    backward(run[0], 3)
    with pytest.raises(OffloadError, match="File too large"):
        run[1].step()
    assert_same_run(run, expected)


def test_too_little_memory():
    with (
        mock.patch.object(slab, "_available", return_value=10_000),
        pytest.raises(OffloadError, match=r"needs 0\.00 GiB of host memory, and 0\.00 GiB are"),
    ):
        made("adam-mini", "cpu")


# -- the rest of the contract ---------------------------------------------------------------------


def test_copies_are_not_offloaded():
    run = made("adam-mini int8", "stream")
    train(*run, 2)
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        model, optimizer = duplicate(run)
        assert optimizer.offloaded is None
        expected = made("adam-mini int8")
        train(*expected, 3)
        train(model, optimizer, 1, 2)
        assert_same_run((model, optimizer), expected)


def test_parameters_that_have_no_gradient_or_are_not_contiguous():
    def run(mode):
        torch.manual_seed(0)
        plain = [nn.Parameter(torch.randn(shape)) for shape in [(64, 80), (), (0, 4), (3000,)]]
        turned = nn.Parameter(torch.randn(60, 50).t())
        frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        parameters = [*plain, turned, frozen]
        optimizer = AdamMini([{"params": parameters[:2], "lr": 1e-2}, {"params": parameters[2:]}])
        if mode:
            offload(optimizer, mode, chunk_bytes=4000)
        for step in range(4):
            for i, parameter in enumerate((*plain, turned)):
                parameter.grad = torch.full_like(parameter, 0.1 + step) if step != i else None
            optimizer.step()
        return [p.detach() for p in parameters], optimizer.state_dict()

    expected = run(None)
    for mode in ("stream", "cpu", "auto"):
        assert is_same(list(run(mode)), list(expected))


def test_zero_gradients_at_rate_zero_change_no_bit():
    for mode in ("stream", "cpu"):
        model, optimizer = made("adam-mini int8", mode, dtype=torch.bfloat16)
        before = copy.deepcopy(model.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert is_same(dict(model.state_dict()), dict(before))
        assert len(optimizer.state) == len(list(model.parameters()))


def test_gradients_are_not_kept():
    for mode in (None, "stream", "cpu"):
        model, optimizer = made("adam-mini", mode)
        backward(model)
        storages = [p.grad.untyped_storage()._weak_ref() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        if mode:
            optimizer.offloaded.settle()
        alive = [torch.UntypedStorage._new_with_weak_ptr(ref) is not None for ref in storages]
        assert not any(alive), mode


def test_the_report_and_the_plan():
    _, optimizer = made("adam-mini", "auto", link_rate="2GB/s")
    assert "emulated link: " in optimizer.offloaded.report()
    assert "predicted: " in optimizer.offloaded.report()


def test_auto_takes_the_faster_way():
    """Slow steps of the host, and then a slow link, on measured rates put in their place."""
    _, optimizer = made("adam-mini", "stream")
    loads = optimizer.offloaded.plan.loads
    numel = sum(load.numel for load in loads)

    def chosen(**rates):
        rates = {"up": 1e9, "down": 1e9, "device": 1e12, "host": 1e12} | rates
        hosted = plan.choose(loads, plan.Rates(**rates)).hosted
        return sum(load.numel for load in loads if load.parameter in hosted) / numel

    assert chosen(host=1.0) == 0
    assert chosen(device=1.0) == 1
    assert 0.2 < chosen(up=1e15, down=1e15, device=1e9, host=1e9) < 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "gpu"}, "mode='gpu': must be one of stream, cpu, auto"),
        ({"mode": "cpu", "grads": "lowrank4"}, "grads='lowrank4': must be none, bf16"),
        ({"mode": "cpu", "weights": "some"}, "weights='some': must be one of whole, changed"),
        ({"mode": "cpu", "folder": "."}, "folder='.' with mode='cpu': must be stream"),
        ({"mode": "stream", "grads": "loco4"}, "grads='loco4', weights='whole': must be none"),
        ({"link_rate": "fast"}, "link rate 'fast': must be bytes a second"),
        ({"link_rate": -1}, "link rate -1: must be"),
        ({"chunk_bytes": 0}, "chunk_bytes=0: must be at least 1"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ConfigError, match=message):
        offload(AdamMini(gpt()), **options)


def test_optimizers_that_cannot():
    model = gpt()
    with pytest.raises(ConfigError, match=r"optimizer is a AdamW: must be one of commrt's"):
        offload(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ConfigError, match="reads all momenta before it steps: must be cpu"):
        offload(MoFO(model), "stream")
    optimizer = offload(AdamMini(model))
    with pytest.raises(ConfigError, match="offloaded already"):
        offload(optimizer)


@pytest.mark.parametrize("mode", ["stream", "cpu"])
def test_gradients_that_change_too_early(mode):
    """What a step that overlaps has still to read."""
    model, optimizer = made("adam-mini", mode, overlaps=True, link_rate="3MB/s")
    train(model, optimizer, 1)
    backward(model, 1)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad.zero_()
    with pytest.raises(OffloadError, match="a gradient was changed while a step had still"):
        backward(model, 2)


@pytest.mark.parametrize("kind", ["adamw", "adam-mini int8", "lion"])
def test_steps_in_backward(kind):
    """With two backwards a step, rates that change, and an embedding that is tied."""

    def run(in_backward):
        model, optimizer = made(kind)
        optimizer.max_grad_norm = None
        if in_backward:
            offload(optimizer, "stream", model=model, chunk_bytes=CHUNK, in_backward=True)
        begun = []
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
        losses = []
        for step in range(6):
            for micro in range(2):
                losses.append(backward(model, 2 * step + micro).item())
            begun.append(
                0 if optimizer.offloaded is None else len(optimizer.offloaded._backward.begun)
            )
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return (model, optimizer), losses, begun

    expected, losses, _ = run(False)
    with jitter(3):
        found, other_losses, begun = run(True)
    assert losses == other_losses
    assert_same_run(found, expected)
    assert begun[0] == 0
    assert min(begun[2:]) >= len(found[1].offloaded._backward.schedule.streamed) - 1


def test_what_may_not_be_between_backward_and_step():
    for change in (
        lambda model, optimizer: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
        lambda model, optimizer: optimizer.param_groups[0].update(lr=1.0),
        lambda model, optimizer: backward(model, 9),
        lambda model, optimizer: setattr(model.blocks[0].up.weight, "grad", None),
    ):
        model = gpt()
        optimizer = AdamMini(model, lr=1e-3)
        offload(optimizer, "stream", model=model, chunk_bytes=CHUNK, in_backward=True)
        train(model, optimizer, 3)
        backward(model, 3)
        change(model, optimizer)
        with pytest.raises(OffloadError, match=r"they must not be|must come first"):
            optimizer.step()
    model, optimizer = made("adam-mini")
    with pytest.raises(ConfigError, match=r"max_grad_norm=0.5: must be stream, with a model"):
        offload(optimizer, "stream", model=model, in_backward=True)


def test_parameters_that_come_and_go():
    """What was fetched for a step must not be old when it comes."""

    def run(mode):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(2000)) for _ in range(4)]
        optimizer = AdamW8bit([{"params": [p]} for p in parameters], 1e-2, momentum_dtype="fp32")
        if mode:
            offload(optimizer, mode, chunk_bytes=8000)
        for step, those in enumerate([{0, 1, 2}, {2}, {0, 1, 2}, {3, 0}, {2, 1}, {0, 1, 2}]):
            for i, parameter in enumerate(parameters):
                parameter.grad = torch.full_like(parameter, 0.1 + step) if i in those else None
            optimizer.step()
        return [p.detach() for p in parameters], optimizer.state_dict()

    expected = run(None)
    for mode in ("stream", "cpu"):
        assert is_same(list(run(mode)), list(expected))


def test_models_are_copied_without_their_engine():
    model, optimizer = made("adam-mini", "cpu", overlaps=True)
    train(model, optimizer, 2)
    optimizer.offloaded.wait()
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(duplicate, model)
        backward(duplicate)
    frozen, optimizer = made("adam-mini")
    frozen.embedding.weight.requires_grad_(False)
    offload(optimizer, "cpu", model=frozen, chunk_bytes=CHUNK)
    train(frozen, optimizer, 3)


@pytest.mark.parametrize("weights", ["whole", "changed"])
def test_weights_that_change_while_a_step_is_on_its_way(weights):
    """Loaded into the model, or turned around, which a sum of all does not see."""

    def run(offloaded):
        model, optimizer = made("adam-mini")
        if offloaded:
            offload(
                optimizer,
                "cpu",
                model=model,
                chunk_bytes=CHUNK,
                weights=weights,
                link_rate="30MB/s",
            )
        train(model, optimizer, 2)
        loaded = {name: value.flip(0) + 0.1 for name, value in gpt().state_dict().items()}
        model.load_state_dict(loaded)
        train(model, optimizer, 2, 2)
        if offloaded:
            optimizer.offloaded.wait()
        with torch.no_grad():
            model.blocks[0].up.weight.copy_(model.blocks[0].up.weight.flip(0))
        train(model, optimizer, 2, 4)
        return model, optimizer

    assert_same_run(run(True), run(False))


def test_gradients_clamped_past_what_torch_counts():
    def run(offloaded):
        model, optimizer = made("adam-mini")
        if offloaded:
            offload(optimizer, "cpu", model=model, chunk_bytes=CHUNK)
        for step in range(4):
            backward(model, step)
            if step > 1:
                for parameter in model.parameters():
                    parameter.grad.data.clamp_(-1e-4, 1e-4)
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    found = run(True)
    assert_same_run(found, run(False))
    assert "they were changed after backward" in found[1].offloaded.report()


def test_second_moments_after_a_codec_comes_and_goes():
    """Which sums are made beside the kernel changes with it."""
    exact, run = made("adam-mini"), made("adam-mini")
    for step in range(6):
        if step == 2:
            offload(run[1], "cpu", grads="loco8", chunk_bytes=CHUNK)
        if step == 4:
            run[1].offloaded.release()
        for model, optimizer in (exact, run):
            backward_of(model, step)
            optimizer.step()
    for one, other in zip(exact[0].parameters(), run[0].parameters(), strict=True):
        if one.dim() > 1:
            second, of_run = exact[1].state[one]["exp_avg_sq"], run[1].state[other]["exp_avg_sq"]
            torch.testing.assert_close(of_run, second)


def test_checksums_of_parts_add_up():
    """Wherever a tensor is cut."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(1003).to(dtype)
        for cut in (0, 1, 2, 3, 4, 500, 1003):
            parts = checksum(values[:cut]) + checksum(values[cut:], cut)
            assert parts == checksum(values)
        assert checksum(torch.cat([values[:1], values])[1:]) == checksum(values)
