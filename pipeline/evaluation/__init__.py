"""Exact retrieval metrics, re-identification and clustering, of embeddings and of tasks."""
