"""Build the parts of a program from its options.

`pretrain` and `finetune`: model, optimizer, loss and the like. `labelled_data`: the images and
labels of fine-tuning. `weights`: what fine-tuning and evaluation start from. `evaluation`: --eval,
--knn, the test at the end of fine-tuning. `visualize`: model, images and figures of main_visualize.
`pack`, `predict`: what main_pack and main_predict read.
"""
