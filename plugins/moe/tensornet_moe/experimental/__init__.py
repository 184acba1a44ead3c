"""Parts whose interface may change: expert parallelism, and chains multiplied slice by slice on CPUs."""
