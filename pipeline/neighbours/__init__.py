"""The exact nearest-neighbour engine: by cosine for evaluation, by Euclidean distance for mining."""
