"""LIMIT's table 3 on a laptop: RMSprop at a batch 32 times larger, without and with a ratio."""
