"""The layout `deepspeed`: folders that DeepSpeed 0.19 writes with `save_checkpoint` and reads with `load_checkpoint`.

DeepSpeed can read a folder only with the number of ranks, ZeRO stage and expert parallelism that it was written for.
"""

from raphael_dist.convert.layouts import RANKS, Layout
from raphael_dist.convert.layouts.deepspeed.read import detect, open_deepspeed, pickles
from raphael_dist.convert.layouts.deepspeed.write import plan

LAYOUT = Layout("deepspeed", "everything", detect, open_deepspeed, plan, RANKS, takes_config=True, pickles=pickles)
