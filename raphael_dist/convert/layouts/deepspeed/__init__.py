"""The layout of DeepSpeed 0.19: what `load_checkpoint` loads and `save_checkpoint` wrote, for the same options."""

from raphael_dist.convert.layouts import RANKS, Layout
from raphael_dist.convert.layouts.deepspeed.read import detect, open_deepspeed, pickles
from raphael_dist.convert.layouts.deepspeed.write import plan

LAYOUT = Layout("deepspeed", "everything", detect, open_deepspeed, plan, RANKS, takes_config=True, pickles=pickles)
