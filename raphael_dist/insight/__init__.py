"""What a model has learned: diffusion paths, regions, experts, and figures of them."""
