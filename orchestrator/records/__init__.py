"""Values that several packages share and store as JSON: trainings, trials, evaluations."""
