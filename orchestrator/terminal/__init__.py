"""Terminal output and input: progress, layout, formatted numbers, log files, Ctrl-C."""
