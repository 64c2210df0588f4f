"""Faster implementations of the models' forward and backward passes, with equal results.

`packed`: ConvNeXt V2 blocks on visible patches. `gathered`: ResNet stages on visible cells. Both
are for CPUs. `choice` says where they are used.
"""
