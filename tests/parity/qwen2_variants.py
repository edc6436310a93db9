"""Settings of the tiny Qwen2 models."""

MODEL_TYPE = "qwen2"
NORM_IDENTITY = 1.0

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}

# Each switch of the family away from its default at least once, windows shorter than the longest text.
VARIANTS = {
    "tied_dense": {},
    "untied": {"tie_word_embeddings": False},
    "one_kv_head": {"num_key_value_heads": 1},
    "no_grouping": {"num_key_value_heads": 4},
    "wide_heads": {"head_dim": 12},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "windowed_from_layer_2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "all_windowed": {"use_sliding_window": True, "sliding_window": 1, "max_window_layers": 0},
    "window_flag_off": {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
    "mixed_layer_types": {
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    },
}
