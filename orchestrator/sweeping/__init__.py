"""A sweep: which trials it has, what they cost, how they run, which stop early."""
