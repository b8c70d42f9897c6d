"""Launching: which process works on which device, and in what order. Never imports torch."""
