"""Analyses what a trained model has learned: routes of words and timesteps, regions of words, expert health."""
