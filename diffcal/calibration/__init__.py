"""Losses, post-hoc methods, metrics and plots for calibration."""
