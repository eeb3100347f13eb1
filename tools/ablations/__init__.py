"""Ablation campaigns: the same training run without a part of the model, or with more of it. See tools/ablate.py."""
