"""What travels between packages and is stored as JSON: trial results and evaluations."""
