"""How good a model's pictures are: features, distances, scores, and the studies that use them."""
