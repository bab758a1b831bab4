"""mpidp: train Transformer language models over MPI; the number of ranks never changes what is learned.

Importing this package starts neither MPI nor torch, so that `--help` works on a login node.
"""

__version__ = "0.1.0"
