"""Faster implementations of the models' forward and backward passes, with equal results.

`packed`: ConvNeXt V2 blocks on visible patches, for CPUs. `fused`: the same for CUDA devices, with
the kernels in `triton_depthwise` and `triton_mlp`, which `tuning` divides into programs.
`gathered`: ResNet stages on visible cells, for CPUs. `choice` says where they are used.
"""
