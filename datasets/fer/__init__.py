"""Readers for data sets of facial expressions, in their owners' layouts and in common others.

`rafdb`, `affectnet`, `ferplus`: the owners' layouts. `class_folder`, `labelled_list`: folders and
lists with labels. `class_names`: which class a name stands for. `votes`: labels from votes.
"""
