"""Sweeps: search over methods and hyper-parameters with Ray Tune; every trial is a set of ordinary runs."""
