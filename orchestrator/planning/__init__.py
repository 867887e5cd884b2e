"""What a training needs (FLOPs, hours, memory, disk), and whether this machine has it."""
