"""Converts text to shards (HDF5 files of tokens), and inspects shards. mpidp/data/shards.py documents the format."""
