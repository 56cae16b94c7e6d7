"""The optimizer steps: bit-identical on every path, and what they compute against float64."""

import math

import pytest
import torch

from commrt import ops
from commrt.errors import ConfigError
from commrt.ops import Second, StepOptions
from tests.native import cases, steps
from tests.native.steps import FORMATS, OPTIONS, OTHERS, SIGNED, Formats, make, run_everywhere


def awkward(name: str, formats: Formats) -> list[ops.StepTensor]:
    """Shapes that fit no vector, and enough of them for two launches."""
    signed = SIGNED[name]
    if name != "adam_mini_":
        shapes = [(6, 300), (1, 3000), (3, 31), (0, 5), *[(2, 8)] * 20]
        return [
            make(
                *shape, signed, formats, seed=i, stochastic=i % 2 == 0, first_index=7,
                index_stride=512, **OTHERS.get(name, {}),
            )
            for i, shape in enumerate(shapes)
        ]  # fmt: skip
    kinds = [
        (6, 300, 3, Second.UPDATED),
        (5, 1, 1, Second.OF_ROW),
        (3, 1100, 1, Second.OF_COLUMN),
        (64, 256, 64, Second.UPDATED),
        (0, 9, 1, Second.UPDATED),
        *[(4, 40, 2, Second.UPDATED)] * 20,
    ]
    return [
        make(
            rows, cols, signed, formats, seed=i, second=second, block_rows=block,
            stochastic=i % 2 == 0, first_index=2**40 + i, index_stride=512,
        )
        for i, (rows, cols, block, second) in enumerate(kinds)
    ]  # fmt: skip


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize(("weights", "grad", "moments"), FORMATS, ids=str)
def test_every_path_equals_the_specification(name, weights, grad, moments):
    tensors = awkward(name, Formats(*weights, grad, moments))
    run_everywhere(name, tensors, grad_factor=torch.tensor(0.25))


@pytest.mark.parametrize("name", SIGNED)
def test_numbers_that_are_not_finite_stay_where_they_are(name):
    """In their segment, where a moment has 8 bits, and for adam_mini_ in their block."""
    for moments in steps.STORAGES:
        tensor = make(8, 600, SIGNED[name], Formats(moments=moments), **OTHERS.get(name, {}))
        tensor.grad[3 * 600 + 300] = math.nan
        tensor.grad[5 * 600 + 599] = math.inf
        [stepped] = run_everywhere(name, [tensor])
        is_bad = ~stepped.weights.view(8, 600).isfinite()
        rows = is_bad.any(dim=1).nonzero().flatten().tolist()
        assert set(rows) <= {3, 5}
        if name == "lion_":
            assert not stepped.moments[0].float().view(8, 600)[[0, 1, 2, 4, 6, 7]].isnan().any()
        else:
            assert 3 in rows


def test_tiny_moments_are_zero_and_none_is_lost_to_zero():
    """Segments below the least magnitude are zeros; unsigned codes never round to zero."""
    tensor = make(2, 256, SIGNED["adamw_"], Formats(moments=torch.int8))
    for scale in tensor.scales:
        scale.zero_()
    tensor.grad.view(2, 256)[0].mul_(1e-36)
    tensor.grad.view(2, 256)[1, 1:].mul_(1e-6)
    [stepped] = run_everywhere("adamw_", [tensor])
    assert (stepped.moments[0].view(2, 256)[0] == 0).all()
    assert (stepped.moments[1].view(2, 256)[0] == -128).all()
    assert (stepped.moments[1].view(2, 256)[1] > -128).all()


def test_adam_mini_is_the_paper_s_rule():
    """Algorithm 1 in float64, over ten steps."""
    rows, cols, block = 12, 50, 4
    tensor = make(rows, cols, second=Second.UPDATED, block_rows=block)
    tensor.moments[0].zero_()
    tensor.second.zero_()
    weights, moment = tensor.weights.double(), torch.zeros(rows * cols, dtype=torch.float64)
    second = torch.zeros(rows // block, dtype=torch.float64)
    lr, beta1, beta2, eps, decay = 1e-3, 0.9, 0.95, 1e-8, 0.1
    for step in range(1, 11):
        tensor.grad.copy_(torch.randn(rows * cols) * 1e-3)
        options = StepOptions(
            beta1=beta1, beta2=beta2, eps=eps, decay=1 - lr * decay,
            step_size=lr / (1 - beta1**step), root_correction=math.sqrt(1 - beta2**step),
        )  # fmt: skip
        ops.adam_mini_([tensor], options)
        grad = tensor.grad.double()
        second = beta2 * second + (1 - beta2) * (grad**2).view(-1, block * cols).mean(dim=1)
        moment = beta1 * moment + (1 - beta1) * grad
        root = (second / (1 - beta2**step)).sqrt() + eps
        factor = lr / (1 - beta1**step) / root.repeat_interleave(block * cols)
        weights = weights * (1 - lr * decay) - factor * moment
    torch.testing.assert_close(tensor.weights.double(), weights, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "peer"), [("adamw_", torch.optim.AdamW), ("mofo_", torch.optim.AdamW)]
)
def test_steps_are_those_of_torch(name, peer):
    """Mofo's with a threshold that leaves nothing out."""
    tensor = make(1, 1000, SIGNED[name], threshold=0.0)
    for moment in tensor.moments:
        moment.zero_()
    parameter = torch.nn.Parameter(tensor.weights.clone())
    optimizer = peer([parameter], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 6):
        tensor.grad.copy_(torch.randn(1000) * 1e-3)
        parameter.grad = tensor.grad.clone()
        optimizer.step()
        options = StepOptions(
            beta1=0.9, beta2=0.95, decay=1 - 1e-4, step_size=1e-3 / (1 - 0.9**step),
            root_correction=math.sqrt(1 - 0.95**step),
        )  # fmt: skip
        getattr(ops, name)([tensor], options)
    torch.testing.assert_close(tensor.weights, parameter.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("weights", "extra"), steps.WEIGHTS)
def test_mofo_is_adamw_where_the_moment_is_large_and_nothing_elsewhere(weights, extra):
    """A moment as large as the threshold is large, and so is what is not a number."""
    tensor = make(3, 601, SIGNED["mofo_"], Formats(weights, extra), threshold=0.0)
    if extra == torch.float32:
        tensor.weights.copy_(tensor.extra)
    tensor.grad[5] = math.nan
    [every] = steps.by_specification("adamw_", [tensor], options=OPTIONS)
    size = every.moments[0].abs()
    tensor.second.copy_(size.nanmedian())
    [stepped] = run_everywhere("mofo_", [tensor])
    is_small = size < tensor.second
    assert is_small.sum() == 900
    assert stepped.weights[5].isnan()
    for part in ("weights", "extra") if extra else ("weights",):
        found, before, moved = (getattr(t, part) for t in (stepped, tensor, every))
        cases.assert_same_bits(found, torch.where(is_small, before, moved))
    for found, wanted in zip(stepped.moments, every.moments, strict=True):
        cases.assert_same_bits(found, wanted)


def test_stochastic_rounding_has_no_bias():
    """The mean of many roundings, each with a seed of its own, is what was rounded."""
    kept = torch.zeros(4096, dtype=torch.float64)
    for seed in range(200):
        tensor = ops.StepTensor(
            weights=torch.ones(4096, dtype=torch.bfloat16), grad=torch.zeros(4096),
            moments=(torch.full((4096,), -1.0),), rows=1, cols=4096,
            second=torch.ones(1), second_from=Second.OF_ROW, seed=seed,
        )  # fmt: skip
        ops.adam_mini_([tensor], StepOptions(beta1=1.0, eps=0.0, step_size=2.0**-10))
        kept += tensor.weights.double()
    assert abs(kept.mean() / 200 - (1.0 + 2.0**-10)) < 2e-5


def test_stochastic_weights_that_do_not_move_do_not_change():
    tensor = make(4, 100, formats=Formats(torch.bfloat16), second=Second.UPDATED)
    [stepped] = run_everywhere("adam_mini_", [tensor], StepOptions(step_size=0.0))
    assert torch.equal(stepped.weights, tensor.weights)


@pytest.mark.parametrize("extra", [torch.float32, torch.int8])
def test_small_steps_add_up_beyond_bfloat16(extra):
    """A thousand steps of an eighth of a unit in the last place move the weight by 125."""
    unit = 2.0**-7
    tensor = ops.StepTensor(
        weights=torch.ones(64, dtype=torch.bfloat16), grad=torch.zeros(64),
        moments=(torch.full((64,), -1.0),), rows=1, cols=64, second=torch.ones(1),
        second_from=Second.OF_ROW,
        extra=torch.ones(64) if extra == torch.float32 else torch.zeros(64, dtype=torch.int8),
    )  # fmt: skip
    for _ in range(1000):
        ops.adam_mini_([tensor], StepOptions(beta1=1.0, eps=0.0, step_size=unit / 8))
    assert (tensor.weights.float() - (1 + 125 * unit)).abs().max() <= unit


def test_sums_of_squares():
    for dtype in steps.DTYPES:
        shapes = [(1, 1), (3, 31), (7, 256), (5, 2000), (300, 64), *[(2, 2)] * 20]
        grads = [torch.randn(rows * cols).to(dtype) for rows, cols in shapes]
        by_column = [i % 2 == 1 for i in range(len(shapes))]
        counts = [shape[is_column] for shape, is_column in zip(shapes, by_column, strict=True)]
        expected = [torch.zeros(count, dtype=torch.float64) for count in counts]
        places = [int(v) for s, c in zip(shapes, by_column, strict=True) for v in (*s, c)]
        ops.reference.square_sums(grads, expected, places)
        for path, use in cases.paths().items():
            sums = [torch.full_like(total, -1) for total in expected]
            with use:
                ops.square_sums(grads, sums, shapes, by_column=by_column)
            for found, wanted in zip(sums, expected, strict=True):
                assert torch.equal(found, wanted), path
        for grad, shape, is_column, total in zip(grads, shapes, by_column, expected, strict=True):
            exact = (grad.double() ** 2).view(shape).sum(dim=0 if is_column else 1)
            torch.testing.assert_close(total, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    tensors = [make(700, 300, second=Second.UPDATED, block_rows=7, seed=i) for i in range(3)]
    expected = steps.by_specification("adam_mini_", tensors, options=OPTIONS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ops.adam_mini_(tensors, OPTIONS)
    finally:
        torch.set_num_threads(before)
    for found, wanted in zip(tensors, expected, strict=True):
        for (_, actual), (_, target) in zip(
            steps.tensors_of(found), steps.tensors_of(wanted), strict=True
        ):
            assert torch.equal(actual, target)


def bad(**changes):
    tensor = make(4, 10, formats=Formats(moments=torch.int8), second=Second.UPDATED)
    fields = {name: getattr(tensor, name) for name in tensor.__slots__}
    return ops.StepTensor(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 5}, "must be contiguous, 5 x 10"),
        ({"cols": 0}, "must have a column"),
        ({"grad": torch.zeros(40, dtype=torch.float64)}, "must be one of"),
        ({"weights": torch.zeros(40, dtype=torch.float16)}, "extra of tensor 0 is None"),
        ({"extra": torch.zeros(40, dtype=torch.int8)}, "extra of tensor 0 is torch.int8"),
        ({"moments": ()}, "has 0 moments: must be 1"),
        ({"moments": (torch.zeros(40, dtype=torch.int16),)}, "must be float32, bfloat16 or int8"),
        ({"scales": ()}, "must be fp32 of 4 elements"),
        ({"scales": (torch.zeros(3),)}, "must be fp32 of 4 elements"),
        ({"second": None}, "second of tensor 0: must be fp32 of 4 elements"),
        ({"second": torch.zeros(10)}, "second of tensor 0: must be fp32 of 4 elements"),
        ({"block_rows": 3}, "must divide its 4 rows"),
        ({"seed": -1}, "must be in"),
        ({"grad": torch.zeros(40, device="meta")}, "must be on one"),
    ],
)
def test_what_would_write_elsewhere_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ops.adam_mini_([bad(**changes)], OPTIONS)


def test_a_threshold_is_one_number():
    with pytest.raises(ConfigError, match="second of tensor 0: must be fp32 of 1 elements"):
        ops.mofo_([make(1, 10, SIGNED["mofo_"])], OPTIONS)


def test_an_empty_list_is_nothing_to_do():
    for name in SIGNED:
        getattr(ops, name)([], OPTIONS)
    ops.square_sums([], [], [])
