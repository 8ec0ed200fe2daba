"""Denoisers, noise schedules, samplers, training and checkpoints of diffusion models."""
