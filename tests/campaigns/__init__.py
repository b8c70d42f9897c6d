"""Long trials, run by name; each has a short form in the suite."""
