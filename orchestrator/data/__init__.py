"""From a source of text to a folder of tokens, and from tokens to batches for each step."""
