"""Command-line options.

`parser`: the parser and checked types. `groups`: groups and help texts that programs share.
`pretrain`, `finetune` with `finetune_groups`, `evaluation`, `predict`: options of one program.
`trained`: what a checkpoint was trained with.
"""
