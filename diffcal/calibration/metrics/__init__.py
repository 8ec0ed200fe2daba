"""Calibration metrics on tensors: top label, class-wise, proper scores, selective, detection."""
