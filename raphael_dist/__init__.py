"""raphael_dist trains RAPHAEL (arXiv 2305.18295), a text-to-image diffusion mixture of experts, across many GPUs."""

__version__ = "0.1.0"
