"""Shakedown: prove a vision training run on cheap minutes before the long, paid one."""

import os

__version__ = "0.1.0"

# OpenMP's threads wait for one another thousands of times a step. Spinning for long makes a CPU
# step several times slower on a machine that is busy otherwise, never spinning makes a small
# network's twice as slow on one that is not (measured); some ten microseconds are good on both.
# It must be in the environment before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
