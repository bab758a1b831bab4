"""Strategies by name: the only place where a name becomes a class."""

from mpidp.strategies.synchronous import Synchronous

STRATEGIES = {"synchronous": Synchronous}
