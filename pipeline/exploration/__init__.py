"""What embeddings look like: a map, the classes that fail, images that stand in two splits; as parts of an HTML page."""
