"""Export to the formats of other libraries, one file for each."""
