"""Speed and memory against other trainers, run by name."""
