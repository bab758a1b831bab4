"""torch.distributed over MPI, on stock wheels of torch and mpi4py.

    import mpidp.c10d
    torch.distributed.init_process_group("mpi4py", init_method="mpi://")

under mpirun or srun: no MASTER_ADDR, no port. docs/c10d.md says what it can and cannot.
"""

from mpidp.c10d.meeting import register, use

register()

__all__ = ["use"]
