"""Analyses a trained model: experts chosen for words and timesteps, image regions of words, dead and duplicate experts."""
