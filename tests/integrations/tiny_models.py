"""Tiny random language models of every type that the installed `transformers` knows, from their own configurations.

A type's default configuration is shrunk by rules that go by the names of attributes, through all sub-configurations,
and by a table of exceptions where the rules are not enough. Weights are drawn so that logits are several units in size
and every bias, scale and softcap shows in the loss.
"""

from __future__ import annotations

import copy
import inspect
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# A model is counted on the meta device before it is built.
LARGEST = 10_000_000
VOCABULARY, HIDDEN, HEADS, HEAD_DIM = 320, 32, 4, 8
# Ids from here on are never special, image or audio tokens; those before are given to these by turns.
FIRST_TOKEN, LENGTH = 64, 12
LOGIT_SIZE = 4.0
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

Kwargs = dict[str, Any]

CAUSAL, MULTIMODAL, ENCODER_DECODER = "causal", "multimodal", "encoder-decoder"
_MAPPINGS = {
    CAUSAL: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    MULTIMODAL: "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    ENCODER_DECODER: "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}

KINDS = tuple(_MAPPINGS)

# The first pattern found in an integer's name decides on it: it becomes at most this, or stays where this is None.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"type_vocab|n_langs|rel_extent|d_rel$|patch_embed", None),
    (r"latent_query_num", 3),
    (r"unpadded_vocab_size", VOCABULARY - 20),
    (r"vocab_size|_vocab$|codebook_size|^num_embeddings$", VOCABULARY),
    (r"first_k_dense|num_dense_layers|topk_group", 1),
    (r"num_nextn|kv_shared_layers", 0),
    (r"sparse_step|layer_offset", 1),
    (r"layer_period", 2),
    (r"num_([a-z]+_)*(layers|blocks)$|^(n_)?layers?$|^n_layers?$|coder_layers$|_num_(hidden_)?layers$|^depth$", 2),
    (
        r"experts_per_tok|top_?k$|moe_k$|key_value_heads|kv_n?_?heads|query_groups|num_kv|key_heads|n_group$|expert_group",
        2,
    ),
    (r"experts$|zero_expert_num", 4),
    (r"(?<!head_)heads?$", HEADS),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"head_dim$|dim_head$|headdim$|d_head$|d_kv$|head_size$|kv_channels|rotary_dim", HEAD_DIM),
    (r"intermediate_size|ffn_(hidden_size|dim)|d_ff$|^dff$|mlp_dim|n_inner|dim_ff|feed_forward_size|expert_dim", 48),
    (r"lora_rank|dt_rank|time_step_rank|state_size|d_state|lowrank", 16),
    (r"position_embeddings|n_positions|n_ctx|model_max_length|max_seq_len|_positions$|context_length", 128),
    (
        r"hidden_size|hidden_dim|d_model|n_embd|^dim$|emb(ed)?(ding)?_(dim|size)$|width$|proj(ection|ector)?_.*(dim|size)$",
        HIDDEN,
    ),
    (r"out(put)?_(hidden_size|dim|size)$|in(put)?_(dim|size)$|channels$|rank$|_dim$", HIDDEN),
)
# What a configuration that has such an attribute gets, whatever its default: transforms of the logits that matter.
TRANSFORMS: Kwargs = {
    "final_logit_softcapping": 5.0,
    "logits_soft_cap": 5.0,
    "output_logit_soft_cap": 5.0,
    "logit_softcap": 5.0,
    "logit_scale": 0.7,
    "logits_scaling": 1.7,
    "lm_head_multiplier": 0.7,
    "output_multiplier": 0.7,
    "logits_mup_width_multiplier": 1.7,
    "output_router_logits": True,
}
_MAMBA_2: Kwargs = {"mamba_n_heads": 8, "mamba_d_head": 8}
_HYBRID_NEMOTRON: Kwargs = {"n_groups": 2, "mamba_num_heads": 8}
_ROUTED: Kwargs = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_COMPASS: Kwargs = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
_DAVIT: Kwargs = {"embed_dim": (8, 8, 16, 16), "depths": (1,) * 4, "num_heads": (2,) * 4, "num_groups": (2,) * 4}


def _rotary(*sections: int) -> Kwargs:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


# Where the rules are not enough, by the type of a configuration, also of one within another.
OVERRIDES: dict[str, Kwargs] = {
    "apertus1p5": {"image_token_offset": 64, "audio_token_offset": 128},
    "apertus1p5_vision_tokenizer": {"codebook_size": 64},
    "wavtokenizer_encoder": {"codebook_size": 64},
    "bamba": {**_MAMBA_2, "attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 16, "IMGIMGA": 17}},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {**_ROUTED, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": _ROUTED,
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "doge": {"output_router_logits": False},
    "dory": {
        **{"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 2 * HEAD_DIM},
    "emu3": {"vocabulary_map": {"<image>": 16, "<|extra_200|>": 17, "<|visual token 000000|>": 18}},
    "encoder-decoder": {"pad_token_id": 0},
    "ernie4_5_vl_moe_text": {**_rotary(2, 2, 4), "head_dim": 16, "moe_intermediate_size": [48, 48]},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32},
    "florence_vision": _DAVIT,
    "gemma4_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "glm46v_text": _rotary(2, 1, 1),
    "glm4v_text": _rotary(2, 1, 1),
    "glm4v_moe_text": _rotary(2, 0, 0),
    "Glm4vMoe_text": _rotary(2, 0, 0),
    "glm5_next_text": {"index_topk": 16},
    "glm_ocr_text": _rotary(2, 1, 1),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 1]],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {**_MAMBA_2, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "hunyuan_vl_text": {**_rotary(1, 1, 1, 1), "head_dim": HEAD_DIM},
    "inkling_text": {"unpadded_vocab_size": VOCABULARY - 20},
    "inkling_vision": {"patch_size": 4, "num_hidden_layers": 2},
    "led": {"max_encoder_position_embeddings": 512},
    "jamba": {"use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD_DIM},
    "mllama_text_model": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "moshi": {"audio_vocab_size": 256, "audio_encoder_config": {"codebook_size": 256}},
    "nemo_speechlm": {"text_config": {"num_key_value_heads": 2}},
    "nemotron_h": _HYBRID_NEMOTRON,
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "nllb-moe": {"output_router_logits": False},
    "paddleocr_vl_text": _rotary(2, 1, 1),
    "paligemma": {"text_config": {"num_key_value_heads": 1}},
    "qwen2_5_omni_text": _rotary(2, 1, 1),
    "qwen2_5_omni_thinker": {"vision_start_token_id": 20},
    "qwen2_5_vl_text": _rotary(2, 1, 1),
    "qwen2_vl_text": _rotary(2, 1, 1),
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 20},
    "qwen3_vl_moe_text": _rotary(2, 1, 1),
    "qwen3_vl_text": _rotary(2, 1, 1),
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 4, "indexer_compress_ratio": 2},
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        **{"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0},
        **{
            "is_decoder": True,
            "attn_layers": ["local", "local"],  # the other kind draws its hashes anew in each pass
            "lsh_attn_chunk_length": 4,
            "local_attn_chunk_length": 4,
        },
        **{"axial_pos_embds": False, "hash_seed": 0},
    },
    "step3p5": {"sliding_window": 8},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7},
    "voxtral": {"text_config": {"num_key_value_heads": 2}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"use_mamba_kernels": False, "num_hidden_layers": 5, "layers_block_type": ["mamba"] * 2 + ["hybrid"] * 3},
}
_DECODER: Kwargs = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
# What a default configuration must be given to be one.
DEFAULTS: dict[str, Kwargs] = {
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": _DECODER},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": _DECODER},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}
# Types that have gradients in training mode alone.
TRAINED_ONLY = ("reformer",)
# Types whose forward needs more than tokens, or other things than they.
INPUTS: dict[str, Callable[[PretrainedConfig], Kwargs]] = {
    "blip": lambda config: _pictures(config.vision_config),
    "git": lambda config: _pictures(config.vision_config),
    "idefics": lambda config: {
        "pixel_values": _pictures(config.vision_config)["pixel_values"][:, None],
        "image_attention_mask": torch.ones(2, LENGTH, 1, dtype=torch.long),
    },
    "kosmos-2": lambda config: {
        "image_embeds": torch.randn(2, config.latent_query_num, HIDDEN, generator=_generator()),
        "image_embeds_position_mask": torch.arange(LENGTH).expand(2, -1) < config.latent_query_num,
    },
    "musicgen": lambda config: _codebooks(config.num_codebooks),
    "musicgen_melody": lambda config: _codebooks(config.num_codebooks),
    "pix2struct": lambda config: {
        "flattened_patches": torch.rand(2, 5, 770, generator=_generator()) + 1,
        **{"input_ids": None, "attention_mask": None},
    },
    "udop": lambda config: {"bbox": torch.rand(2, LENGTH, 4, generator=_generator())},
    "vision-encoder-decoder": lambda config: {**_pictures(config.encoder), "input_ids": None, "attention_mask": None},
}


def names(kind: str) -> dict[str, str]:
    """Class names by model type, of those that the installed version lists."""
    listed = getattr(modeling_auto, _MAPPINGS[kind], {})
    return {model_type: name if isinstance(name, str) else name[0] for model_type, name in listed.items()}


def config_of(kind: str, model_type: str) -> PretrainedConfig:
    """The shrunk configuration that the type's class takes, which may be a part of the type's own."""
    model_class = getattr(transformers, names(kind)[model_type])
    config_class = CONFIG_MAPPING[model_type]
    taken = getattr(model_class, "config_class", None)
    if taken is not None and not issubclass(config_class, taken):
        config_class = taken
    given = _shrunk(config_class(**copy.deepcopy(DEFAULTS.get(model_type, {}))))
    if kind == ENCODER_DECODER or model_type in ("udop", "vision-encoder-decoder"):
        given = {"decoder_start_token_id": 0, "pad_token_id": 0, **given}
    return config_class(**given)


def build(kind: str, model_type: str) -> nn.Module:
    """The model in fp32, without dropout; the same weights each time."""
    model_class = getattr(transformers, names(kind)[model_type])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config_of(kind, model_type)).parameters())
    if size > LARGEST:
        raise ValueError(f"{model_type}: {size} parameters")
    with torch.random.fork_rng([]):
        torch.manual_seed(zlib.crc32(model_type.encode()))
        model = model_class(config_of(kind, model_type)).eval()
        _randomise(model)
    if "labels" in inspect.signature(model.forward).parameters:
        _scale_head(model, batch(model_type, model.config))
    return model.train(model_type in TRAINED_ONLY)


def batch(model_type: str, config: PretrainedConfig) -> Kwargs:
    """Two sequences of tokens, of which one is padded at its end, and labels of which some are ignored."""
    tokens = torch.randint(FIRST_TOKEN, 256, (2, LENGTH), generator=_generator())
    mask = torch.ones_like(tokens)
    tokens[1, -3:], mask[1, -3:] = 0, 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :2], labels[0, 7] = -100, -100
    given = {"input_ids": tokens, "attention_mask": mask, "labels": labels, "use_cache": False}
    more = INPUTS[model_type](config) if model_type in INPUTS else {}
    return {name: value for name, value in {**given, **more}.items() if value is not None}


def loss_and_gradients(model: nn.Module, given: Kwargs) -> dict[str, Tensor]:
    """Loss, and gradients of all parameters that it depends on, by name."""
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **gradients}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _codebooks(count: int) -> Kwargs:
    """Tokens of several codebooks, one after the other, and their labels side by side."""
    tokens = torch.randint(FIRST_TOKEN, 256, (2, LENGTH, count), generator=_generator())
    return {"input_ids": tokens.transpose(1, 2).reshape(2 * count, LENGTH), "labels": tokens, "attention_mask": None}


def _pictures(vision: PretrainedConfig) -> Kwargs:
    """One picture for each sequence."""
    return {"pixel_values": torch.randn(2, 3, vision.image_size, vision.image_size, generator=_generator())}


def _shrunk(config: PretrainedConfig) -> Kwargs:
    """Keyword arguments for a small configuration of the same class."""
    attributes = vars(config)
    accepted = inspect.signature(type(config).__init__).parameters
    depth = next((v for k, v in attributes.items() if k in DEPTHS and isinstance(v, int)), None)
    given: Kwargs = {}
    for name, value in attributes.items():
        if isinstance(value, PretrainedConfig):
            given[name] = {**_shrunk(value), **({"model_type": value.model_type} if value.model_type else {})}
        elif name in TRANSFORMS:
            given[name] = TRANSFORMS[name]
        elif name not in accepted:
            continue
        elif isinstance(value, bool):
            given[name] = value
        elif name in SPECIAL:
            given[name] = SPECIAL[name]
        elif isinstance(value, int) and re.search(r"_(id|index)$", name):
            given[name] = (
                value if value < 16 else max([15, *(v for k, v in given.items() if k.endswith(("_id", "_index")))]) + 1
            )
        elif isinstance(value, int) and accepted[name].default is not None:
            size = next((size for pattern, size in RULES if re.search(pattern, name)), None)
            given[name] = value if size is None else min(value, size)
        elif isinstance(value, (list, tuple)) and len(value) == depth and depth > 2:
            others = [entry for entry in value if entry != value[0]]
            given[name] = type(value)([value[0], *(others or value)[:1]])
        elif name == "num_key_value_heads" and value is None:
            given[name] = 2
    if attributes.get("mlp_only_layers"):
        given["mlp_only_layers"] = [0]
    sections = _sections(attributes, given)
    if sections:
        given["rope_parameters"] = sections
    if "kv_lora_rank" in attributes and "num_key_value_heads" in attributes:
        given["num_key_value_heads"] = HEADS
    given = _merged(given, OVERRIDES.get(config.model_type, {}))
    if "rope_parameters" in given and "rope_parameters" not in attributes:  # before transformers 5
        given["rope_scaling"] = given.pop("rope_parameters")
    return given


def _sections(attributes: Kwargs, given: Kwargs) -> Kwargs | None:
    """Rotary parameters whose sections (time, height, width) share a small head's frequencies."""
    parameters = attributes.get("rope_parameters", attributes.get("rope_scaling"))
    if not parameters or "mrope_section" not in parameters:
        return None
    sizes = {**attributes, **given}
    width = sizes.get("qk_rope_head_dim") or sizes.get("head_dim") or HEAD_DIM
    half = int(width * parameters.get("partial_rotary_factor", 1.0)) // 2
    return {**parameters, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


def _merged(given: Kwargs, changes: Mapping[str, Any]) -> Kwargs:
    merged = dict(given)
    for name, value in changes.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = _merged(merged[name], value)
        else:
            merged[name] = value
    return merged


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Matrices that keep the size of what they are applied to; noise on biases, norms and the like."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        if id(parameter) in embeddings:
            parameter.normal_()
        elif parameter.ndim >= 2:
            inputs = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
            parameter.normal_(std=inputs**-0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("final_logits_bias"):
            buffer.normal_()


@torch.no_grad()
def _scale_head(model: nn.Module, given: Kwargs) -> None:
    """Give the products of the head a standard deviation of LOGIT_SIZE."""
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor):
        return
    sizes: list[float] = []
    handle = head.register_forward_hook(lambda module, inputs, output: sizes.append(output.std().item()))
    try:
        model(**given)
    finally:
        handle.remove()
    if sizes:
        head.weight.mul_(LOGIT_SIZE / max(sizes))
