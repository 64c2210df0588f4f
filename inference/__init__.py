"""Using trained models.

`predict`: expressions of faces. `outputs`: rows, annotated pictures and features of main_predict.
`explanation`: attention maps of classifiers. `visualize`: figures of a model on a data set.
`annotate`: boxes and labels on pictures. `page`, `page_layout`, `same_origin`: the web page.
"""
