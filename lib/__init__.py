"""Shakedown: prove a vision training run on cheap minutes before the long, paid one."""

import os

__version__ = "0.1.0"

# OpenMP's threads spin while they wait for one another. On a machine that is also decoding images
# that makes a CPU step 5 to 10 times slower (measured); waiting passively costs microseconds. It
# must be in the environment before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
