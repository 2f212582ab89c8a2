"""Checks of deployment files without a cloud: each gives the problems of one kind of file, as lines of text."""
