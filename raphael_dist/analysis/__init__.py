"""Analyses a trained model's experts: words, timesteps and image regions that each processes; dead and duplicate experts."""
