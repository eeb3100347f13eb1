"""Ablation campaigns: a training run is repeated without a part of the model, or with other sizes of it. See
tools/ablate.py.
"""
