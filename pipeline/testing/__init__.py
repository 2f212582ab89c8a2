"""Checks for the tests of methods outside this package."""

from pipeline.testing.check_method import check_method

__all__ = ["check_method"]
