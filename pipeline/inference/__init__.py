"""Trained models: loaded by the name of their run, and applied to any number of images."""
