"""Tests. mpidp.entry comes before torch: it asks for BLAS whose bits do not depend on the number of threads."""

import mpidp.entry  # noqa: F401
