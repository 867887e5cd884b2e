"""From a data source to a folder of tokens, and from tokens to the batch of each step."""
