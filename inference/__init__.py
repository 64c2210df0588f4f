"""Trained models at work.

`predict`: expressions of faces. `explanation`: what a classifier looks at. `visualize`: figures of
a model and a data set. `annotate`: boxes and labels on pictures. `page`, `same_origin`: the web
page.
"""
