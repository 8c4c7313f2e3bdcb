"""megatron_rema: train meta-thinking and reasoning agents (ReMA, arXiv:2503.09501) on NVIDIA megatron-core."""

__version__ = "0.1.0"
