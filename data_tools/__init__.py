"""Tools that convert text to shards and inspect shards. The shard format is documented in mpidp/data/shards.py."""
