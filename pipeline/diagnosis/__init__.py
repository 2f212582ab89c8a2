"""Checks of a machine or a cluster before a run: facts gathered on every node, and rows of a table made from them."""
