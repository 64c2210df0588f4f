"""Command-line options.

`parser`: the parser, checked types, and the groups that programs share. `finetune`, `evaluation`,
`predict`: options of one program. `trained`: what a checkpoint was trained with.
"""
