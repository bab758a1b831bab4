"""Tools that turn text into shards and look at them; the shard format is documented in mpidp/data/shards.py."""
