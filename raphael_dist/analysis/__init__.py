"""What a model has learned: routes of words and timesteps, regions, expert health, and figures of them."""
