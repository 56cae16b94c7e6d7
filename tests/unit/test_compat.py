"""``compat="v1.1.1"`` against the package of Adam-mini's authors itself."""

import copy
import pickle
import types

import pytest
import torch
from adam_mini import Adam_mini
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from commrt.errors import ConfigError
from commrt.optim import AdamMini
from commrt.optim.compat import OfficialPartition

DIM, HEADS = 32, 4
SIZES = f"v1.1.1:dim={DIM},num_heads={HEADS}"
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """The official package takes the number of devices for that of ranks."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def official(named_parameters):
    return Adam_mini(named_parameters, **OPTIONS, dim=DIM, n_heads=HEADS, verbose=False)


def difference(first, second):
    """The largest of the parameters', relative to their norms."""
    pairs = zip(first, second, strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def test_a_llama_trains_as_with_the_official_package():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=DIM, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=2,
        intermediate_size=80, vocab_size=64,
    )  # fmt: skip
    torch.set_num_threads(1)  # of more, on a busy machine, most time is waiting for each other
    first = LlamaForCausalLM(config)
    second = copy.deepcopy(first)
    ours, theirs = AdamMini(first, compat="v1.1.1", **OPTIONS), official(second.named_parameters())
    for batch in torch.randint(64, (100, 4, 16)):
        for model, optimizer in (first, ours), (second, theirs):
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
    assert difference(first.parameters(), second.parameters()) <= 1e-6


def parameters(shapes):
    torch.manual_seed(0)
    return [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]


def test_every_rule_of_names():
    first = parameters(
        {
            "embed_tokens.weight": (50, 32),
            "lm_head.weight": (50, 32),
            "attn.q_proj.weight": (64, 32),  # heads of 16 rows, which it takes for 8
            "attn.k_proj.weight": (16, 32),
            "Attn.WQ.weight": (32, 32),
            "attention.query_key_value.weight": (96, 32),
            "attn.wk.stack": (8, 4, 8),
            "attn.query_scale": (512,),
            "attn.v_proj.weight": (32, 32),
            "attn.c_attn.weight": (32, 96),
            "attn.q_proj.bias": (32,),
            "mlp.up.weight": (80, 32),
            "mlp.up.bias": (80,),
            "relative_attention_bias.weight": (8, 4),
            "ln_1.weight": (32,),
            "q_norm.weight": (8,),
            "conv.weight": (4, 3, 5, 5),
            "scale": (),
        }
    )
    second = copy.deepcopy(first)
    ours, theirs = AdamMini(first, compat=SIZES, **OPTIONS), official(second)
    for _ in range(20):
        for (_, a), (_, b) in zip(first, second, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    assert difference([p for _, p in first], [p for _, p in second]) <= 1e-6


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp.norm.weight", (32,)),
        ("mlp.experts.down", (4, 8, 8)),
        ("key_norm.weight", (32,)),
        ("q_proj.lora_A.weight", (4, 32)),
    ],
)
def test_where_the_official_package_stops(name, shape):
    [(_, parameter)] = named = parameters({name: shape})
    theirs = official(named)
    parameter.grad = torch.ones(shape)
    with pytest.raises((IndexError, RuntimeError)):
        theirs.step()
    with pytest.raises(ConfigError, match=f"{name}.*leave compat out, or"):
        AdamMini(named, compat=SIZES)
    AdamMini(named, compat=SIZES, partition={".*": "element"})
    parameter.requires_grad_(False)
    AdamMini(named, compat=SIZES)


@pytest.mark.parametrize("shape", [(64, 512), (16, 32, 3)])
def test_blocks_across_rows_are_refused(shape):
    with pytest.raises(ConfigError, match=r"wq of shape .* 1024 / 4 elements"):
        AdamMini(parameters({"wq": shape}), compat=SIZES)


class Attention(nn.Module):
    def __init__(self, **told):
        super().__init__()
        self.wq = nn.Linear(DIM, DIM, bias=False)
        for name, value in told.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    "told",
    [
        {"hidden_size": DIM, "num_heads": HEADS},
        {"config": types.SimpleNamespace(n_embd=DIM, n_head=HEADS)},
        {"args": types.SimpleNamespace(dim=DIM, n_heads=HEADS, hidden_dim=96)},
    ],
)
def test_the_model_tells_its_heads(told):
    for model in Attention(**told), nn.Sequential(Attention(**told)):
        optimizer = AdamMini(model, compat="v1.1.1")
        [layout] = optimizer._layouts[next(model.parameters())]
        assert list(layout.blocks.block_sizes()) == [(32, 8)]
        assert "v1.1.1: a head" in optimizer.describe()


@pytest.mark.parametrize(
    ("told", "missing"), [({}, "dim and num_heads"), ({"n_heads": HEADS}, "nothing says dim:")]
)
def test_heads_that_nothing_tells(told, missing):
    with pytest.raises(ConfigError, match=missing):
        AdamMini(Attention(**told), compat="v1.1.1")
    AdamMini(nn.Linear(4, 4), compat="v1.1.1")


def test_what_is_not_decayed():
    model = nn.ModuleDict({"mlp": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    optimizer = AdamMini(model, weight_decay=0.3, compat="v1.1.1")
    late = parameters({"ln.weight": (3,), "wv.weight": (3, 3)})
    optimizer = pickle.loads(pickle.dumps(optimizer))
    optimizer.add_param_group({"params": late, "weight_decay": 0.2})
    assert [(g["weight_decay"], g["param_names"]) for g in optimizer.param_groups] == [
        (0.3, ["mlp.weight"]),
        (0.0, ["mlp.bias", "norm.weight", "norm.bias"]),
        (0.2, ["wv.weight"]),
        (0.0, ["ln.weight"]),
    ]


def test_names_are_needed():
    for params in nn.Linear(4, 4).parameters(), [{"params": nn.Parameter(torch.zeros(3))}]:
        with pytest.raises(ConfigError, match="needs names"):
            AdamMini(params, compat="v1.1.1")


@pytest.mark.parametrize("text", ["v1.1", "v1.1.1:dim=32", "v1.1.1:dim=0,num_heads=4"])
def test_texts_that_are_none(text):
    with pytest.raises(ConfigError, match=r"must be 'v1\.1\.1'"):
        AdamMini(nn.Linear(4, 4), compat=text)


def test_names_that_a_model_gives():
    """To parameters without, and to all tensors that FSDP has flattened into one."""
    model = nn.ModuleDict({"mlp": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    optimizer = AdamMini(model.parameters(), model=model, compat="v1.1.1", weight_decay=0.3)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]
    flat = nn.Parameter(torch.zeros(9))
    partition = OfficialPartition(dim=DIM, num_heads=HEADS)
    [group] = partition.groups({"params": [flat]}, {flat: ["wo", "wv"]})
    assert "weight_decay" not in group
    with pytest.raises(ConfigError, match=r"does not decay ln_1.*use_orig_params=True"):
        partition.groups({"params": [("_flat_param", flat)]}, {flat: ["wo", "ln_1"]})
