"""Fast passes that equal those of the models, for the devices they are written for.

`packed`: the blocks of ConvNeXt V2 on visible patches. `gathered`: the stages of ResNet on visible
cells.
"""
