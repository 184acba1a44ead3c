"""Features whose interface may change: expert parallelism."""
