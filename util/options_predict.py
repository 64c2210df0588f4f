"""Options of prediction. Needs nothing but the standard library, see util/options."""

DETECTORS = ("mtcnn", "none")
