"""For DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)."""

from raphael_dist.pipeline import RaphaelPipeline
