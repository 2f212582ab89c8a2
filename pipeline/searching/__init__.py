"""Indexes of images: built from a trained model, appended to, searched in Python, from the shell and over HTTP."""
