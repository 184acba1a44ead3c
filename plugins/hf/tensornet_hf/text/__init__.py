"""Text: tokens, calibration data, perplexity."""
