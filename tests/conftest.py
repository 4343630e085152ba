"""One torch thread: the tests' operations are short, and on a busy machine two threads spend them waiting."""

import torch

# A file for the child processes of the benchmark, which have its folder on their path.
collect_ignore = ["toy_contest.py"]

torch.set_num_threads(1)
