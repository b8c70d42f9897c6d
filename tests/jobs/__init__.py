"""Launching and the queue."""
