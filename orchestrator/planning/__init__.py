"""What a training needs before it starts: FLOPs, hours, memory and disk, and what is there."""
