"""A torch.distributed backend that uses MPI. It needs no special build of torch or mpi4py.

    import mpidp.c10d
    torch.distributed.init_process_group("mpi4py", init_method="mpi://")

Run the program under mpirun or srun. MASTER_ADDR and MASTER_PORT are not needed. docs/c10d.md lists features and limits.
"""

from mpidp.c10d.meeting import register, use

register()

__all__ = ["use"]
