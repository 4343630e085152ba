"""One torch thread: the tests' operations are short, and on a busy machine two threads spend them waiting."""

import torch

torch.set_num_threads(1)
