"""Which elements share a second moment in models of the transformers package, which has no say."""

import re

import torch
import transformers

from tests.unit.test_partition import blocks_of, lines

LAYERS = {"num_hidden_layers": 1, "vocab_size": 50}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, **LAYERS}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LATENT = {"kv_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 40, "first_k_dense_replace": 0}
BART = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50,
        "encoder_attention_heads": 4, "decoder_attention_heads": 8}  # fmt: skip
# Name of a model, its configuration; by the ends of names the blocks of what is neither an
# embedding nor has a block an output neuron: "row" or "column", and runs.
MODELS = [
    ("Llama", GROUPED, {"q_proj": [(64, 16)], "k_proj": [(32, 16)]}),
    ("Qwen3", {**GROUPED, "head_dim": 32}, {"q_proj": [(128, 32)], "k_proj": [(64, 32)]}),
    ("Gemma2", {**GROUPED, "head_dim": 32}, {"q_proj": [(128, 32)], "k_proj": [(64, 32)]}),
    ("Gemma4Text",
     {**GROUPED, "num_hidden_layers": 2, "head_dim": 32, "global_head_dim": 48,
      "layer_types": ["sliding_attention", "full_attention"]},
     {r"0\..*q_proj": [(128, 32)], r"0\..*k_proj": [(64, 32)],
      r"1\..*q_proj": [(192, 48)], r"1\..*k_proj": [(96, 48)]}),
    ("Mixtral", {**GROUPED, "num_local_experts": 4},
     {"q_proj": [(64, 16)], "k_proj": [(32, 16)]}),
    ("GptOss", {**GROUPED, "num_local_experts": 4, "head_dim": 32},
     {"q_proj": [(128, 32)], "k_proj": [(64, 32)],
      "gate_up_proj": ("column", [(192, 1)]), "down_proj": ("column", [(64, 1)]),
      "proj_bias": "element"}),
    ("DeepseekV2", {**SIZES, **LATENT, **EXPERTS, "q_lora_rank": None},
     {"q_proj": [(96, 24)], "kv_b_proj": [(16, 16), (12, 1)] * 4}),
    ("DeepseekV3",
     {**SIZES, **LATENT, **EXPERTS, "q_lora_rank": 24, "num_key_value_heads": 4, "n_group": 2,
      "topk_group": 1, "num_experts_per_tok": 2},
     {"q_b_proj": [(96, 24)], "kv_b_proj": [(16, 16), (12, 1)] * 4}),
    ("Phi3", {**GROUPED, "pad_token_id": 0}, {"qkv_proj": [(96, 16), (32, 1)]}),
    ("GPTNeoX", SIZES, {"query_key_value": [(32, 16), (16, 1)] * 4}),
    ("Falcon", {**GROUPED, "new_decoder_architecture": True, "num_kv_heads": 2},
     {"query_key_value": [(48, 16), (16, 1)] * 2}),
    ("Bloom", {"hidden_size": 64, "n_head": 4, "n_layer": 1, "vocab_size": 50},
     {"query_key_value": [(32, 16), (16, 1)] * 4}),
    ("GPT2", {"n_embd": 64, "n_head": 4, "n_layer": 1, "vocab_size": 50},
     {"c_attn": ("column", [(128, 16), (64, 1)]), "attn.c_proj": ("column", [(64, 1)]),
      "c_fc": ("column", [(256, 1)]), "mlp.c_proj": ("column", [(64, 1)])}),
    ("GPTBigCode", {"n_embd": 64, "n_head": 4, "n_layer": 1, "vocab_size": 50},
     {"c_attn": [(80, 16), (16, 1)]}),
    ("GPTBigCode",
     {"n_embd": 64, "n_head": 4, "n_layer": 1, "vocab_size": 50, "multi_query": False},
     {"c_attn": [(32, 16), (16, 1)] * 4}),
    ("GPTJ", {"n_embd": 64, "n_head": 4, "n_layer": 1, "rotary_dim": 8, "vocab_size": 50},
     {"q_proj": [(64, 16)], "k_proj": [(64, 16)]}),
    ("Bert", SIZES, {"self.query": [(64, 16)], "self.key": [(64, 16)]}),
    ("ModernBert", {**SIZES, "pad_token_id": 0}, {"Wqkv": [(128, 16), (64, 1)]}),
    ("DistilBert", {"dim": 64, "n_heads": 4, "hidden_dim": 96, "n_layers": 1, "vocab_size": 50},
     {"q_lin": [(64, 16)], "k_lin": [(64, 16)]}),
    ("T5", {"d_model": 64, "d_kv": 24, "num_heads": 4, "num_layers": 1, "d_ff": 96,
            "vocab_size": 50},
     {"Attention.q": [(96, 24)], "Attention.k": [(96, 24)]}),
    ("Bart", BART,
     {r"encoder\..*q_proj": [(64, 16)], r"encoder\..*k_proj": [(64, 16)],
      r"decoder\..*q_proj": [(64, 8)], r"decoder\..*k_proj": [(64, 8)]}),
    ("Whisper", {**BART, "pad_token_id": 0},
     {r"encoder\..*q_proj": [(64, 16)], r"encoder\..*k_proj": [(64, 16)],
      r"decoder\..*q_proj": [(64, 8)], r"decoder\..*k_proj": [(64, 8)], r"conv\d": [(64, 1)]}),
    ("OPT", {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64},
     {"q_proj": [(64, 16)], "k_proj": [(64, 16)]}),
    ("ViT", {**SIZES, "image_size": 32, "patch_size": 8},
     {"q_proj": [(64, 16)], "k_proj": [(64, 16)]}),
    ("CLIPText", SIZES, {"q_proj": [(64, 16)], "k_proj": [(64, 16)]}),
]  # fmt: skip


def make(name, options):
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.device("meta"):
        return getattr(transformers, f"{name}Model")(config)


def usual(parameter):
    """A block an element of a vector, else a block a row."""
    rows = parameter.shape[: 2 if parameter.dim() == 3 else 1].numel()
    return "element" if sum(size > 1 for size in parameter.shape) < 2 else ("row", [(rows, 1)])


def shown(blocks):
    return "element" if blocks.axis == "element" else lines(blocks)


def test_models_of_the_field(subtests):
    for name, options, special in MODELS:
        with subtests.test(name, **options):
            model = make(name, options)
            expected = {name: usual(p) for name, p in model.named_parameters()}
            for end, blocks in special.items():
                found = [n for n in expected if re.search(rf"{end}(\.weight)?$", n)]
                assert found, end
                value = ("row", blocks) if isinstance(blocks, list) else blocks
                expected.update(dict.fromkeys(found, value))
            assert {n: shown(b) for n, b in blocks_of(model).items()} == expected
