"""Which elements share a second moment, for modules as they are built in the field."""

import types

import pytest
import torch
from torch import nn

from commrt.errors import ConfigError
from commrt.optim.partition import Blocks, by_shape, find_blocks, parse
from commrt.training.config import TrainConfig
from commrt.training.model import GPT


def blocks_of(model):
    """By name, for what is tested; the partition itself sees no names."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    places = {
        (module, name): parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    found = find_blocks(model, {place: tuple(p.shape) for place, p in places.items()})
    first_last = reversed(found.items())
    return {names[places[place]]: blocks for place, blocks in first_last}


def lines(blocks):
    return blocks.axis, list(blocks.block_sizes())


class Attention(nn.Module):
    """Separate projections, as in Llama and its relatives."""

    def __init__(self, dim, config=None, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        if config:
            self.config = types.SimpleNamespace(**config)
        for name, (inputs, outputs) in dim.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))


class Conv1D(nn.Module):
    """That of transformers: the weight is (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.empty(nf))


def test_the_main_job():
    found = blocks_of(GPT(TrainConfig.make(preset="1m").model))
    dim, head = 128, 32
    assert lines(found["embedding.weight"]) == ("row", [(256, 1)])
    assert lines(found["positions"]) == ("row", [(128, 1)])
    assert lines(found["blocks.0.qkv.weight"]) == ("row", [(2 * dim, head), (dim, 1)])
    assert lines(found["blocks.0.project.weight"]) == ("row", [(dim, 1)])
    assert lines(found["blocks.0.up.weight"]) == ("row", [(4 * dim, 1)])
    assert found["blocks.0.qkv.bias"].axis == found["norm.weight"].axis == "element"


@pytest.mark.parametrize(
    ("attributes", "config"),
    [
        ({"n_heads": 8, "n_kv_heads": 2, "head_dim": 24}, None),
        ({"head_dim": 24}, {"num_attention_heads": 8, "num_key_value_heads": 2}),
        ({}, {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24}),
        ({"heads": 8, "kv_heads": 2}, None),
    ],
)
@pytest.mark.parametrize(
    "names", [("q_proj", "k_proj", "v_proj", "o_proj"), ("wq", "wk", "wv", "wo"),
              ("to_q", "to_k", "to_v", "to_out"), ("query", "key", "value", "dense")]
)  # fmt: skip
def test_heads_have_their_true_width(names, attributes, config):
    """Which need not be the model's width over the number of heads, here 128 / 8."""
    q, k, v, o = names
    sizes = {q: (128, 192), k: (128, 48), v: (128, 48), o: (192, 128)}
    found = blocks_of(Attention(sizes, config=config, **attributes))
    assert lines(found[f"{q}.weight"]) == ("row", [(192, 24)])
    assert lines(found[f"{k}.weight"]) == ("row", [(48, 24)])
    assert lines(found[f"{v}.weight"]) == ("row", [(48, 1)])
    assert lines(found[f"{o}.weight"]) == ("row", [(128, 1)])


def test_names_of_the_model_mean_nothing():
    """A norm called key_norm, an embedding called value, a layer called query without heads."""
    model = nn.ModuleDict(
        {
            "query": nn.Linear(16, 16),
            "key_norm": nn.LayerNorm(16),
            "value": nn.Embedding(10, 16),
            "mlp_norm": nn.RMSNorm(16),
        }
    )
    found = blocks_of(model)
    assert lines(found["query.weight"]) == ("row", [(16, 1)])
    assert found["key_norm.weight"].axis == found["mlp_norm.weight"].axis == "element"
    assert found["value.weight"].num_blocks == 10


def test_heads_that_do_not_fit_are_rows():
    found = blocks_of(Attention({"q_proj": (64, 100)}, num_heads=8, head_dim=16))
    assert lines(found["q_proj.weight"]) == ("row", [(100, 1)])


def test_fused_projections():
    whole = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    concatenated = Attention({"qkv_proj": (128, 192), "o_proj": (128, 128)}, config=whole)
    assert lines(blocks_of(concatenated)["qkv_proj.weight"]) == ("row", [(160, 16), (32, 1)])
    by_group = Attention({"query_key_value": (128, 192), "dense": (128, 128)}, config=whole)
    expected = [(80, 16), (16, 1)] * 2
    assert lines(blocks_of(by_group)["query_key_value.weight"]) == ("row", expected)
    by_head = Attention({"query_key_value": (64, 192), "dense": (64, 64)}, num_heads=4)
    expected = [(32, 16), (16, 1)] * 4
    assert lines(blocks_of(by_head)["query_key_value.weight"]) == ("row", expected)


@pytest.mark.parametrize(
    ("name", "attribute", "by_head"),
    [
        ("c_attn", {}, False),
        ("c_attn", {"multi_query": False}, True),  # GPTBigCode
        ("query_key_value", {}, True),
        ("query_key_value", {"multi_query": True}, True),  # Falcon
        ("query_key_value", {"multi_query_attention": True}, False),  # ChatGLM
    ],
)
def test_order_in_fused_projections(name, attribute, by_head):
    found = blocks_of(
        Attention({name: (64, 128)}, num_heads=4, kv_heads=2, head_dim=16, **attribute)
    )
    expected = [(48, 16), (16, 1)] * 2 if by_head else [(96, 16), (32, 1)]
    assert lines(found[f"{name}.weight"]) == ("row", expected)


def test_a_feed_forward_part_as_large_as_fused_projections():
    """It has the model's configuration too, so seems to have heads."""
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    found = blocks_of(Attention({"gate_up_proj": (64, 192), "down_proj": (96, 64)}, config=config))
    assert lines(found["gate_up_proj.weight"]) == ("row", [(192, 1)])


def test_keys_and_values_from_a_latent_vector():
    """As in DeepSeek, whose configuration has the width of rotated keys for head_dim."""
    sizes = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "head_dim": 8}
    config = {"num_attention_heads": 4, **sizes}
    projections = {"q_a_proj": (64, 24), "q_b_proj": (24, 96), "kv_a_proj_with_mqa": (64, 28),
                   "kv_b_proj": (20, 112), "o_proj": (48, 64)}  # fmt: skip
    found = blocks_of(Attention(projections, config=config))
    assert lines(found["q_b_proj.weight"]) == ("row", [(96, 24)])
    assert lines(found["kv_b_proj.weight"]) == ("row", [(16, 16), (12, 1)] * 4)
    for name in "q_a_proj", "kv_a_proj_with_mqa", "o_proj":
        assert lines(found[f"{name}.weight"]) == ("row", [(projections[name][1], 1)])
    whole_queries = blocks_of(Attention({"q_proj": (64, 96)}, config=config))
    assert lines(whole_queries["q_proj.weight"]) == ("row", [(96, 24)])
    unfit = blocks_of(Attention({"kv_b_proj": (20, 100), "q_b_proj": (24, 100)}, config=config))
    assert (
        lines(unfit["kv_b_proj.weight"]) == lines(unfit["q_b_proj.weight"]) == ("row", [(100, 1)])
    )


def test_what_a_configuration_does_not_tell_for_all_layers():
    class Config:
        num_attention_heads = 8

        @property
        def num_key_value_heads(self):
            raise RuntimeError("varies across layers")

    model = Attention({"q_proj": (64, 128), "k_proj": (64, 32)}, num_key_value_groups=4)
    model.config = Config()
    found = blocks_of(model)
    assert lines(found["q_proj.weight"]) == ("row", [(128, 16)])
    assert lines(found["k_proj.weight"]) == ("row", [(32, 16)])


def test_gpt2_of_transformers():
    model = nn.Module()
    model.num_heads, model.head_dim = 4, 16
    model.c_attn, model.c_proj = Conv1D(192, 64), Conv1D(64, 64)
    found = blocks_of(model)
    assert lines(found["c_attn.weight"]) == ("column", [(128, 16), (64, 1)])
    assert found["c_attn.weight"].second_shape == (1, 192)
    assert lines(found["c_proj.weight"]) == ("column", [(64, 1)])
    assert found["c_attn.bias"].axis == "element"


def test_multihead_attention():
    found = blocks_of(nn.TransformerEncoderLayer(32, 4, 64))
    assert lines(found["self_attn.in_proj_weight"]) == ("row", [(64, 8), (32, 1)])
    assert lines(found["self_attn.out_proj.weight"]) == ("row", [(32, 1)])
    assert found["self_attn.in_proj_bias"].axis == "element"
    apart = blocks_of(nn.MultiheadAttention(32, 4, kdim=16, vdim=24, add_bias_kv=True))
    assert lines(apart["q_proj_weight"]) == lines(apart["k_proj_weight"]) == ("row", [(32, 8)])
    assert lines(apart["v_proj_weight"]) == ("row", [(32, 1)])
    assert apart["bias_k"].axis == "element"


def test_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5), nn.ConvTranspose2d(8, 6, 3), nn.Conv1d(4, 8, 3, groups=2),
        nn.BatchNorm2d(8), nn.ConvTranspose1d(8, 4, 3, groups=2),
    )  # fmt: skip
    found = blocks_of(model)
    assert lines(found["0.weight"]) == ("row", [(8, 1)])
    assert found["0.weight"].second_shape == (8, 1, 1, 1)
    assert lines(found["1.weight"]) == ("column", [(54, 9)])
    assert found["1.weight"].num_blocks == 6
    assert found["1.weight"].second_shape == (1, 6, 3, 3)
    assert lines(found["2.weight"]) == ("row", [(8, 1)])
    assert found["3.weight"].axis == "element"
    assert lines(found["4.weight"]) == ("row", [(8, 1)])


@pytest.mark.parametrize(
    ("shapes", "axis"),
    [
        ({"gate_up": (4, 48, 32), "down": (4, 32, 24)}, "row"),
        ({"gate_up": (4, 32, 48), "down": (4, 24, 32)}, "column"),
        ({"w1": (4, 24, 32), "w2": (4, 32, 24), "w3": (4, 24, 32)}, "row"),
        ({"w1": (4, 32, 24), "w2": (4, 24, 32), "w3": (4, 32, 24)}, "column"),
    ],
)
def test_stacks_of_experts(shapes, axis):
    model = nn.Module()
    model.router = nn.Linear(32, 4)
    model.experts = nn.Module()
    for name, shape in shapes.items():
        setattr(model.experts, name, nn.Parameter(torch.empty(shape)))
    for name, blocks in blocks_of(model).items():
        if not name.startswith("experts"):
            continue
        experts, rows, cols = blocks.shape
        assert blocks.axis == axis
        expected = (experts, rows, 1) if axis == "row" else (experts, 1, cols)
        assert blocks.second_shape == expected
        assert blocks.num_blocks == experts * (rows if axis == "row" else cols)


def test_biases_of_experts():
    model = nn.Module()
    model.down, model.down_bias = (nn.Parameter(torch.empty(s)) for s in ((4, 8, 16), (4, 8)))
    assert blocks_of(model)["down_bias"].axis == "element"


def test_a_stack_that_nothing_explains_has_rows():
    model = nn.Module()
    model.stack = nn.Parameter(torch.empty(4, 8, 16))
    assert blocks_of(model)["stack"].second_shape == (4, 8, 1)


def test_tied_weights_are_tokens():
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 11, bias=False))
    model[1].weight = model[0].weight
    [blocks] = blocks_of(model).values()
    assert blocks.why == "embedding: a token"
    assert blocks.num_blocks == 11


def test_shapes_alone():
    assert by_shape((5, 7)).second_shape == (5, 1)
    assert by_shape((3, 5, 7)).second_shape == (3, 5, 1)
    assert by_shape((8, 3, 5, 5)).second_shape == (8, 1, 1, 1)
    assert by_shape((1, 7, 8, 5)).second_shape == (1, 7, 8, 1)
    for vector in ((), (9,), (1, 1, 9)):
        assert by_shape(vector).axis == "element"


def test_texts():
    assert lines(parse("row:4", (8, 3))) == ("row", [(8, 4)])
    assert lines(parse("column", (8, 3))) == ("column", [(3, 1)])
    assert parse("column:2", (5, 8, 6)).second_shape == (5, 1, 6)
    assert parse("tensor", (8, 3)).num_blocks == 1
    assert parse("element", (8, 3)).num_blocks == 24


@pytest.mark.parametrize("text", ["rows", "row:x", "row:3", "column:0", "head", "row:-1"])
def test_texts_that_are_none(text):
    with pytest.raises(ConfigError, match="blocks"):
        parse(text, (8, 4))


def test_runs_have_to_fit():
    with pytest.raises(ConfigError, match="must be a multiple"):
        Blocks(shape=(10, 4), axis="row", runs=((6, 3), (3, 1)))
