"""Synthetic faces, to train on without any download; see `generator`."""
