"""A training run: its start, its workers, the loop."""
