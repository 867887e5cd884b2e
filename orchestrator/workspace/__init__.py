"""One folder holds everything: its layout, atomic files, journals, content keys, error types."""
