"""Services and own classes that get a run's config, curves, figures and report."""
