"""The files of a run: checkpoints, logs, summary, report."""
