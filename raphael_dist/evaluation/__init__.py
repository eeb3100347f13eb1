"""Measures the quality of generated images: Frechet distance, CLIP score, precision and recall, and legibility of text."""
