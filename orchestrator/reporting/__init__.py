"""From results to fronts, statistics, tables, pictures and one HTML page; published to MLflow."""
