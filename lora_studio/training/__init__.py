"""Training: the loop, the tasks and methods it runs, and the fast paths under it."""
