"""Fronts of results with statistics, tables, figures and one HTML page; logged to MLflow."""
