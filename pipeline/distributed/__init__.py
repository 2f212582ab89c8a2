"""Processes that work together: collectives, Ray sessions and jobs, a run's status."""
