"""Classifiers and feature encoders."""
