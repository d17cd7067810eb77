"""Shakedown: prove a vision training run on cheap minutes before the long, paid one."""

__version__ = "0.1.0"
