"""What training is made of, around the one loop of `engine_train.py`.

`run`: a run's folder, processes, beginning and end. `observe`: between steps and epochs: log lines,
checkpoints, bad images, stopping. `evaluate`: a model on test images. `probe`: frozen features.
`distill`: a teacher. `transfer`: batches on their way to the device. `trace`: where the time of a
step goes. `checkpoint_snapshot`: a copy of the state to write from.
"""
