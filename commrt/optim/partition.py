"""Which elements of a parameter share a second moment.

Adam-mini gives one to each smallest dense block of the Hessian (arXiv 2406.16793, section 2.3): a
token of an embedding, a head of queries or keys, an output neuron of any other matrix. What a
parameter is follows from the type, the attributes and the configuration of its module. Names of
parameters mean nothing; the names of a module's own attributes only tell queries, keys and values
apart, and only where their sizes fit the heads.

Where nothing says what a matrix is, its blocks are rows. Rows are parts of heads, so a query that
is not recognised has more second moments than it needs, not fewer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from commrt.errors import ConfigError
from commrt.ops import SEGMENT

Axis = Literal["row", "column", "element"]
Shape = tuple[int, ...]
Place = tuple[nn.Module, str]
"""A module and the name of a parameter in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of one parameter.

    The parameter is one matrix, or a stack of them: the first ``stack_dims`` dimensions number the
    matrices, those up to ``row_dims`` their rows, the others their columns.

    Attributes:
        shape: Of the parameter.
        axis: Whether lines are rows or columns; "element": each element is a block.
        runs: Consecutive lines as (number of lines, lines that share a second moment), repeated to
            the end.
        row_dims: See above.
        stack_dims: See above.
        why: What the parameter was taken for.
        is_embedding: Whether rows are tokens, few of which have a gradient in each step.
    """

    shape: Shape
    axis: Axis
    runs: tuple[tuple[int, int], ...] = ((1, 1),)
    row_dims: int = 1
    stack_dims: int = 0
    why: str = ""
    is_embedding: bool = False

    def __post_init__(self) -> None:
        period = sum(lines for lines, _ in self.runs)
        fits = all(size >= 1 and lines % size == 0 for lines, size in self.runs)
        if self.axis != "element" and (not fits or period < 1 or self.num_lines % period):
            raise ConfigError(
                f"blocks {self.runs} of {self.num_lines} {self.axis}s: each run must be a multiple "
                "of its block, and all together a divisor of the lines"
            )

    @property
    def rows(self) -> int:
        """Of all matrices together."""
        return math.prod(self.shape[: self.row_dims])

    @property
    def cols(self) -> int:
        """Of each matrix."""
        return math.prod(self.shape[self.row_dims :])

    @property
    def matrix_rows(self) -> int:
        """Of each matrix."""
        return math.prod(self.shape[self.stack_dims : self.row_dims])

    @property
    def num_lines(self) -> int:
        """Rows of all matrices, or columns of one."""
        return self.rows if self.axis == "row" else self.cols

    @property
    def second_shape(self) -> Shape:
        """Of the second moments: an element a line, which can be broadcast to the parameter."""
        stack, row, ones = self.stack_dims, self.row_dims, (1,)
        if self.axis == "row":
            return self.shape[:row] + ones * (len(self.shape) - row)
        if self.axis == "column":
            return self.shape[:stack] + ones * (row - stack) + self.shape[row:]
        return self.shape

    @property
    def scale_shape(self) -> Shape:
        """Of the scales of an 8-bit moment."""
        return (*self.shape[: self.row_dims], -(-self.cols // SEGMENT))

    @property
    def num_blocks(self) -> int:
        """Different second moments."""
        if self.axis == "element":
            return math.prod(self.shape)
        period = sum(lines for lines, _ in self.runs)
        each = sum(lines // size for lines, size in self.runs)
        matrices = math.prod(self.shape[: self.stack_dims]) if self.axis == "column" else 1
        return self.num_lines // period * each * matrices

    def block_sizes(self) -> Iterator[tuple[int, int]]:
        """Runs of lines with blocks of one size, as (number of lines, lines a block), merged."""
        pending, size = 0, 0
        for _ in range(self.num_lines // sum(lines for lines, _ in self.runs)):
            for lines, of in self.runs:
                if of != size and pending:
                    yield pending, size
                    pending = 0
                pending, size = pending + lines, of
        if pending:
            yield pending, size


def by_row(shape: Shape, why: str, *, row_dims: int = 1) -> Blocks:
    """One second moment a row."""
    return Blocks(shape=shape, axis="row", row_dims=row_dims, why=why)


def by_element(shape: Shape, why: str) -> Blocks:
    """One second moment an element."""
    return Blocks(shape=shape, axis="element", row_dims=len(shape), why=why)


def whole(shape: Shape, why: str) -> Blocks:
    """One second moment for all."""
    if math.prod(shape) <= 1:
        return by_element(shape, why)
    lines = math.prod(shape[:1])
    return Blocks(shape=shape, axis="row", runs=((lines, lines),), why=why)


def parse(text: str, shape: Shape) -> Blocks:
    """Blocks from a text.

    It is ``row``, ``row:64`` (64 rows a block), ``column``, ``column:64``, ``element`` or
    ``tensor``.

    Raises:
        ConfigError: It is none of these, or does not fit the shape.
    """
    name, _, number = text.partition(":")
    if name in ("row", "column") and len(shape) >= 2 and (not number or number.isdecimal()):
        size = int(number or 1)
        row_dims = len(shape) - 1 if name == "column" or len(shape) == 3 else 1
        stack_dims = row_dims - 1 if name == "column" else 0
        axis: Axis = "row" if name == "row" else "column"
        return Blocks(
            shape=shape,
            axis=axis,
            runs=((size, size),),
            row_dims=row_dims,
            stack_dims=stack_dims,
            why="given",
        )
    if text == "element":
        return by_element(shape, "given")
    if text == "tensor":
        return whole(shape, "given")
    raise ConfigError(
        f"blocks {text!r} of a parameter of shape {shape}: must be row, row:N, column, column:N "
        "(of two dimensions or more), element or tensor"
    )


def by_shape(shape: Shape) -> Blocks:
    """What a parameter is taken for of which only the shape is known."""
    if sum(size > 1 for size in shape) < 2:
        return by_element(shape, "vector")
    return by_row(shape, "matrix", row_dims=_row_dims(shape))


def _row_dims(shape: Shape) -> int:
    """Of what may be a stack of matrices, a convolution, or vectors of a batch of one."""
    return len(shape) - 1 if len(shape) == 3 or shape[0] == 1 else 1


def find_blocks(model: nn.Module, shapes: Mapping[Place, Shape]) -> dict[Place, Blocks]:
    """The blocks of the parameters of a model.

    Args:
        model: Wrapped or not.
        shapes: The whole shape of each parameter, of which this rank may have a part, by the module
            that has it and its name there.
    """
    found: dict[Place, Blocks] = {}
    own: dict[nn.Module, dict[str, Shape]] = {}
    for (module, name), shape in shapes.items():
        own.setdefault(module, {})[name] = shape
    for module in model.modules():
        for child, blocks in _attention(module, shapes).items():
            found.setdefault((child, "weight"), blocks)
        for name in own.get(module, {}):
            found.setdefault((module, name), _of_module(model, module, name, own[module]))
    return found


def find_sizes(model: nn.Module) -> tuple[int | None, int | None]:
    """Width and number of heads, of the first module that tells both; else the width is None."""
    some_heads = None
    for module in model.modules():
        places = _places(module)
        width, heads = _first_number(places, _WIDTH), _first_number(places, _NUM_HEADS)
        if width and heads:
            return width, heads
        some_heads = some_heads or heads
    return None, some_heads


def _of_module(
    model: nn.Module, module: nn.Module, name: str, shapes: Mapping[str, Shape]
) -> Blocks:
    shape = shapes[name]
    if sum(size > 1 for size in shape) < 2:
        return by_element(shape, "vector")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        why = "embedding: a token"
        return Blocks(shape=shape, axis="row", why=why, is_embedding=True)
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(module, name, shape)
    if isinstance(module, _ConvNd):
        return _convolution(module, shape)
    if _is_conv1d(module):
        return Blocks(shape=shape, axis="column", why="output neuron")
    if len(shape) == 3 and shape[0] > 1:
        return _experts(model, module, name, shapes)
    if len(shape) == 2 and any(len(s) == 3 and s[0] == shape[0] for s in shapes.values()):
        return by_element(shape, "stack of vectors")
    if isinstance(module, nn.Linear):
        return by_row(shape, "output neuron")
    return by_shape(shape)


def _multihead(module: nn.MultiheadAttention, name: str, shape: Shape) -> Blocks:
    """Queries, keys and values lie one below the other in ``in_proj_weight``."""
    dim, width = module.head_dim, module.embed_dim
    if name == "in_proj_weight":
        runs = ((2 * width, dim), (width, 1))
        return Blocks(shape=shape, axis="row", runs=runs, why="queries, keys: a head; values")
    if name in ("q_proj_weight", "k_proj_weight"):
        return Blocks(shape=shape, axis="row", runs=((dim, dim),), why="queries or keys: a head")
    return by_row(shape, "output neuron")


def _convolution(module: nn.Module, shape: Shape) -> Blocks:
    if not isinstance(module, _ConvTransposeNd):
        return by_row(shape, "convolution: an output channel")
    if module.groups > 1:
        return by_row(shape, "transposed convolution in groups: an input channel")
    size = math.prod(shape[2:])
    why = "transposed convolution: an output channel"
    return Blocks(shape=shape, axis="column", runs=((size, size),), why=why)


def _is_conv1d(module: nn.Module) -> bool:
    """The linear layer of GPT-2 in transformers, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


# -- attention ------------------------------------------------------------------------------------

_NUM_HEADS = (
    *("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_attn_heads"),
)
_NUM_KV_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_query_groups"),
    *("num_query_groups", "multi_query_group_num", "kv_heads"),
)
_QUERIES_PER_KEY = ("num_key_value_groups", "n_rep")
_HEAD_DIM = (
    *("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv", "dim_head"),
    "hidden_size_per_attention_head",
)
_QUERY = {
    *("q_proj", "wq", "query", "to_q", "q", "q_lin", "q_linear", "linear_q", "query_proj"),
    *("project_q", "projection_query", "to_query", "q_b_proj", "wq_b"),
}
_KEY = {
    *("k_proj", "wk", "key", "to_k", "k", "k_lin", "k_linear", "linear_k", "key_proj"),
    *("project_k", "projection_key", "to_key"),
}
_LATENT_KEY_VALUE = {"kv_b_proj", "wkv_b"}
# Fused projections that hold the queries, keys and values of one head, or of one group of heads
# that share keys and values, after another; others hold all queries, then all keys, all values.
_INTERLEAVED = {"query_key_value", "attn"}
_FUSED = {
    *("qkv", "qkv_proj", "qkv_linear", "to_qkv", "linear_qkv", "wqkv", "c_attn", "w_pack"),
    *_INTERLEAVED,
}
_KEY_VALUE = "queries, keys: a head; values"
Runs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Heads:
    """Of an attention, as far as it says so.

    Attributes:
        num: Heads.
        num_kv: Heads of keys and values.
        dim: Width of a head.
        latent: Where keys and values come from a latent vector (DeepSeek-V2, arXiv 2405.04434,
            section 2.1), the width of a head's keys without position, of those with, of its values.
    """

    num: int
    num_kv: int
    dim: int | None
    latent: tuple[int, int, int] | None


def _attention(module: nn.Module, shapes: Mapping[Place, Shape]) -> dict[nn.Module, Blocks]:
    """The projections of a module that attends, by its attributes' names."""
    heads = _heads(module)
    if heads is None:
        return {}
    found = {}
    weights = {
        name: (child, shapes[child, "weight"])
        for name, child in module.named_children()
        if (isinstance(child, nn.Linear) or _is_conv1d(child)) and (child, "weight") in shapes
    }
    inputs = {_in_out(child, shape)[0] for child, shape in weights.values()}
    for name, (child, shape) in weights.items():
        outputs = _in_out(child, shape)[1]
        runs, why = _runs(module, name.lower(), outputs, heads, inputs)
        if runs is not None:
            axis: Axis = "column" if _is_conv1d(child) else "row"
            found[child] = Blocks(shape=shape, axis=axis, runs=runs, why=why)
    return found


def _heads(module: nn.Module) -> _Heads | None:
    places = _places(module)
    num = _first_number(places, _NUM_HEADS)
    if num is None:
        return None
    nope, rope, value = (
        _first_number(places, (name,))
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    return _Heads(
        num=num,
        num_kv=_first_number(places, _NUM_KV_HEADS)
        or max(1, num // (_first_number(places, _QUERIES_PER_KEY) or 1)),
        dim=_first_number(places, _HEAD_DIM),
        latent=(nope, rope, value) if nope and rope and value else None,
    )


def _places(module: nn.Module) -> list[Any]:
    """Where a module's sizes may be told."""
    names = ("config", "args", "params", "model_args")
    return [module, *(getattr(module, name, None) for name in names)]


def _first_number(places: list[Any], names: tuple[str, ...]) -> int | None:
    for place in places:
        for name in names:
            try:
                value = getattr(place, name, None)
            except RuntimeError:  # transformers: a configuration whose layers differ in it
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _in_out(child: nn.Module, shape: Shape) -> tuple[int, int]:
    first, second = shape
    return (first, second) if _is_conv1d(child) else (second, first)


def _runs(
    module: nn.Module, name: str, outputs: int, heads: _Heads, inputs: set[int]
) -> tuple[Runs | None, str]:
    """Of a projection, and what it is; None where its size is not that of the heads.

    Args:
        module: That attends.
        name: Of the projection in it, in small letters.
        outputs: Of the projection.
        heads: Of the module.
        inputs: Of its projections.
    """
    if name in _QUERY:
        dims = [heads.dim, *([sum(heads.latent[:2])] if heads.latent else [])]
        fitting = (_head_runs(outputs, heads.num, dim) for dim in dims)
        return next(filter(None, fitting), None), "queries: a head"
    if name in _KEY:
        counts = (heads.num_kv, heads.num)
        fitting = (_head_runs(outputs, num, heads.dim) for num in counts)
        return next(filter(None, fitting), None), "keys: a head"
    if name in _LATENT_KEY_VALUE and heads.latent:
        keys, _, values = heads.latent
        fits = outputs == heads.num * (keys + values)
        return ((keys, keys), (values, 1)) if fits else None, "keys: a head; values"
    if name in _FUSED:
        return _fused_runs(_is_interleaved(module, name), outputs, heads, inputs), _KEY_VALUE
    return None, ""


def _head_runs(outputs: int, num: int, dim: int | None) -> Runs | None:
    if outputs % num or dim not in (None, outputs // num):
        return None
    return ((outputs // num, outputs // num),)


def _is_interleaved(module: nn.Module, name: str) -> bool:
    """Of two that say whether heads share keys, one interleaves if not, the other only then."""
    if getattr(module, "multi_query", None) is False:
        return True
    return name in _INTERLEAVED and not getattr(module, "multi_query_attention", False)


def _fused_runs(is_interleaved: bool, outputs: int, heads: _Heads, inputs: set[int]) -> Runs | None:
    """Of a projection as large as all queries, keys and values.

    Where the heads' width is not known, a projection has to take as many inputs as all heads put
    out.
    """
    all_heads = heads.num + 2 * heads.num_kv
    dim = outputs // all_heads
    if outputs % all_heads or heads.num % heads.num_kv:
        return None
    if heads.dim is None and heads.num * dim not in inputs:
        return None
    if heads.dim not in (None, dim):
        return None
    if is_interleaved:
        per_group = heads.num // heads.num_kv
        return (((per_group + 1) * dim, dim), (dim, 1))
    return (((heads.num + heads.num_kv) * dim, dim), (heads.num_kv * dim, 1))


# -- experts --------------------------------------------------------------------------------------

# The last is that of the feed-forward part in some models which have one of the others too.
_WIDTH = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim")


def _experts(model: nn.Module, module: nn.Module, name: str, shapes: Mapping[str, Shape]) -> Blocks:
    """A stack of matrices, of which one dimension is the inputs: which one, the module has to say.

    Those that lead away from the model's width are as large as the gate and the way up together, or
    there are two of them for one that leads back; so where their inputs lie, all have them.
    """
    shape = shapes[name]
    num = shape[0]
    stacks = [other for other in shapes.values() if len(other) == 3 and other[0] == num]
    width = _router_width(model, num) or _first_number(_places(module), _WIDTH)
    ups = max(stacks, key=lambda other: (other[1] * other[2], stacks.count(other)))
    is_known = width is not None and ups[1] != ups[2] and width in ups[1:]
    if is_known and len(stacks) > 1 and ups[1] == width:
        why = "experts: an output neuron"
        return Blocks(shape=shape, axis="column", row_dims=2, stack_dims=1, why=why)
    why = "experts: an output neuron" if is_known else "stack of matrices: a row"
    return by_row(shape, why, row_dims=2)


def _router_width(model: nn.Module, num_experts: int) -> int | None:
    """Inputs of the linear layer that chooses among so many experts, if the model has one."""
    widths = {
        module.in_features
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == num_experts
    }
    return widths.pop() if len(widths) == 1 else None
