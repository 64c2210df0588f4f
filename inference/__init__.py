"""Using trained models.

`predict`: expressions of faces. `explanation`: attention maps of classifiers. `visualize`: figures
of a model on a data set. `annotate`: boxes and labels on pictures. `page`, `same_origin`: the web
page.
"""
