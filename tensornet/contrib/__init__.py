"""Features built on the core: more kinds of layers, topology search, exchange with other libraries."""
