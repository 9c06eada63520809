"""lmtrain trains autoregressive models by maximum likelihood and proves the numbers it prints."""

__version__ = "0.1.0"
