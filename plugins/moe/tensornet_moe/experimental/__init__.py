"""Features whose interface may change: expert parallelism, and a faster kernel for chains on CPUs."""
