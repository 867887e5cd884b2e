"""Open models: by name, from folders of any kind, from the hub and GGUF files; tokenizers."""
