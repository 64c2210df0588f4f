"""The page about a run, and its figures: `python -m util.report`.

`page` puts together what `comparison`, `results` and `figure_section` make. `figures`, `curves`,
`charts` and `features` draw, with the helpers in `drawing`; `html` makes values safe.
"""
