"""Exact nearest neighbours: by cosine over blocks of rows, and by distance over a table."""
