"""Faces in pictures: `detection` finds and cuts them out, `pictures` feeds them to a model."""
