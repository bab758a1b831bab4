"""Tests. mpidp.runtime.command is imported first: it selects BLAS whose bits do not depend on the threads."""

import mpidp.runtime.command  # noqa: F401
