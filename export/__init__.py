"""Export of trained models to other programs.

`write`: writes every format and checks its outputs. `onnx_graph`, `weights` (timm, MAE-SFER, S2D),
`huggingface`: the formats. `model_card`, `model_code`: the model card and the code shown in it.
"""
