"""One thread per process: ranks and workers share the machine's cores."""

import torch

torch.set_num_threads(1)
