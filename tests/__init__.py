"""Tests. mpidp.entry is imported before torch: it selects BLAS kernels whose bits do not depend on the number of threads."""

import mpidp.entry  # noqa: F401
