"""Tests. mpidp.runtime.command comes before torch: it asks for BLAS whose bits do not depend on the number of threads."""

import mpidp.runtime.command  # noqa: F401
