"""Two test processes share two cores: one thread each. Property tests draw the same examples in every run, so that main
is green or not, never by chance; ``pytest --hypothesis-profile=default`` searches anew."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
