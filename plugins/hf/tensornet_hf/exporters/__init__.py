"""Exporters to the formats of other libraries, one module for each format."""
