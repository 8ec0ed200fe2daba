"""Shared ground: randomness, run folders, progress, devices."""
