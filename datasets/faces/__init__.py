"""Faces in pictures: `detection` finds and crops them, `pictures` prepares them for a model."""
