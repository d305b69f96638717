"""Examples: the bundled corpus, loading, partitioning, tokenising."""
