"""Options of prediction. Needs nothing but the standard library, see util/options."""

DETECTORS = ("mtcnn", "none")
MARGIN = 0.15
