"""Access to files in object storage and on web servers. Its modules handle addresses, stores (folders on a server), retries,
and a local cache of limited size. This package does not use MPI."""
