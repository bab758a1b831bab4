"""mpidp trains Transformer language models over MPI. By default, the weights do not depend on the number of ranks.

Importing this package starts neither MPI nor torch, so that `--help` works on a login node.
"""

from mpidp.runtime.worker_process import keep_mpi_off_in_workers

__version__ = "0.1.0"

keep_mpi_off_in_workers()
