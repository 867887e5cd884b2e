"""From a source of text to token shards, and from shards to batches with a position."""
