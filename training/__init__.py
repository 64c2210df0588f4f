"""The parts of training around the loop in `engine_train.py`.

`run`: a run's folder, processes, start and end. `resume`: the checkpoint it starts from.
`observer`: logging, saving and stopping between steps and epochs. `saver`: writes checkpoints, from
the copy in `checkpoint_snapshot`. `bad_images`: reports unreadable images. `transfer`: moves
batches to the device. `trace`: profiles a few steps. `evaluate`: a model on test images. `probe`:
evaluates frozen features. `distill`: a teacher.
"""
