"""Tiny configurations of model families: what transformers calls them, and the options in which each is itself."""

from typing import Any

VOCABULARY = 61
POSITIONS = 48
WINDOW = 4

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,  # logits far enough apart to tell a wrong graph from rounding
}

_ENDS = {"bos_token_id": 0, "eos_token_id": 0}  # inside the small vocabulary
_PADDED = {**_ENDS, "pad_token_id": 0}
_GROUPED = {"num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_LOCAL = {**_HEADS, **_PADDED, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

SPECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_HEADS, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_LOCAL, "attn_logit_softcapping": 5.0}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_LOCAL, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_GROUPED, **_PADDED, "original_max_position_embeddings": POSITIONS}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _ENDS),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_PADDED, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_ENDS, "rotary_pct": 0.5}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", {}),
    # a sample of those that nobody named
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_ENDS, "rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", "BloomConfig", _PADDED),
    "falcon": ("FalconForCausalLM", "FalconConfig", _PADDED),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**_GROUPED, **_PADDED}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {**_GROUPED, "partial_rotary_factor": 0.5}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", {**_GROUPED, **_PADDED, "clip_qkv": 2.0}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**_GROUPED, **_PADDED}),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        {**_GROUPED, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.3},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {**_GROUPED, **_PADDED}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {**_ENDS, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "num_heads": 4},
    ),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", {**_ENDS, "rotary_dim": 4}),
    "mpt": ("MptForCausalLM", "MptConfig", {"max_seq_len": POSITIONS}),
    "falcon_alibi": (
        "FalconForCausalLM",
        "FalconConfig",
        {**_PADDED, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {**_HEADS, **_PADDED}),
    "cohere_qk": ("CohereForCausalLM", "CohereConfig", {**_GROUPED, **_PADDED, "use_qk_norm": True}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_GROUPED, **_ROUTED, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_HEADS, **_ROUTED, "moe_intermediate_size": 16}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_HEADS, **_PADDED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_PADDED, **_LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _PADDED),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", {**_HEADS, **_PADDED}),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", _PADDED),
}

NAMED = tuple(SPECS)[:13]
OTHERS = tuple(SPECS)[13:]
