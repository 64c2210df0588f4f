"""The page about a run, and its pictures: `python -m util.report`.

`page` puts together what `results` and `figure_section` make; `figures`, `curves`, `charts` and
`features` draw, with what `drawing` and `html` share.
"""
