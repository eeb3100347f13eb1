"""Measures image quality: image features, distances between sets of images, scores, and the studies that use them."""
