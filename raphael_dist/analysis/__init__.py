"""Analyses a trained model's experts: which words, timesteps and image regions each processes; dead and duplicate experts."""
