"""The Ray program: prepare, train, evaluate."""
