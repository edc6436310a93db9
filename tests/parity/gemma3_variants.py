"""Settings of the tiny Gemma 3 models: one whole pattern of layers and more, windows shorter than the texts."""

MODEL_TYPE = "gemma3_text"
# Norms multiply by one plus their weight.
NORM_IDENTITY = 0.0

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "max_position_embeddings": 256,
    "rope_theta": 500.0,
    "rope_local_base_freq": 20.0,
    "sliding_window": 8,
    "rms_norm_eps": 1e-5,
    # transformers gives the padding token's embedding no gradient.
    "pad_token_id": None,
}

SLIDING, FULL = "sliding_attention", "full_attention"

# Each switch of the family away from its default at least once.
VARIANTS = {
    "pattern_6": {},
    "untied": {"tie_word_embeddings": False},
    "one_kv_head": {"num_key_value_heads": 1},
    "score_scalar": {"query_pre_attn_scalar": 5},
    "silu": {"hidden_activation": "silu"},
    "pattern_3": {"sliding_window_pattern": 3},
    "all_local": {"sliding_window_pattern": 8},
    "all_global": {"sliding_window_pattern": 1},
    "window_of_one": {"sliding_window": 1},
    "layer_types": {"layer_types": [FULL, SLIDING, FULL, FULL, SLIDING, SLIDING, FULL]},
    "rope_parameters": {
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 700.0},
            SLIDING: {"rope_type": "default", "rope_theta": 30.0},
        }
    },
}
