"""Features built on the core: further kinds of layers, topology search, conversion to other libraries."""
