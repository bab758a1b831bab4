"""Access to files in object storage and on web servers. The parts are addresses, stores, retries, and a local cache of limited
size. This package does not use MPI."""
