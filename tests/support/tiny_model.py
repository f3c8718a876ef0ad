"""The settings that draw a tiny image model, on which a run of the digits takes a moment."""

TINY = [
    "model.init=random",
    "model.config.num_hidden_layers=1",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_attention_heads=2",
    "model.config.patch_size=8",
]
