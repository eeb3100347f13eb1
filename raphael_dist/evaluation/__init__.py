"""Image quality: features, distances, scores, and the studies that use them."""
