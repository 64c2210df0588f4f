"""Data sets of facial expressions, as their owners ship them and as people copy them.

`rafdb`, `affectnet`, `ferplus`: the owners' layouts. `class_folder`, `labelled_list`: folders and
lists with labels. `class_names`: which class a name stands for.
"""
