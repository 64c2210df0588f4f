"""Command-line options.

`parser`: the parser and checked types. `groups`: option groups and help texts that programs share.
`pretrain`, `finetune` with `finetune_groups`, `evaluation`, `predict`, `visualize`: options of one
program. `trained`: options with which a checkpoint was trained.
"""
