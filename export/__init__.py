"""Trained models for other programs.

`write`: what is written, and tried out before it is passed on. `onnx_graph`, `weights` (timm,
MAE-SFER, S2D), `huggingface`: the formats. `model_card`, `model_code`: the page beside them.
"""
