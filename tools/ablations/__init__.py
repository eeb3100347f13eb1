"""Ablation campaigns: the same training is repeated without a part of the model, or with other sizes (tools/ablate.py)."""
