"""Values that several packages share and store as JSON: results of trials and evaluations."""
