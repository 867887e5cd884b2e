"""What a user sees and types: progress, formatted numbers, log files, Ctrl-C."""
