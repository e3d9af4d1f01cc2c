"""Small tensors are faster on one thread, above all where several test runs share the cores."""

import torch

torch.set_num_threads(1)
