"""Trained models: found by the name of their run, and applied to any number of images."""
