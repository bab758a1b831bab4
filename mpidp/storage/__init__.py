"""Files in object storage and on web servers: addresses, stores, retries, and a bounded local cache. This package does not use
MPI."""
