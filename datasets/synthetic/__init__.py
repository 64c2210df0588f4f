"""Faces that the project draws, to train on with nothing downloaded; see `generator`."""
