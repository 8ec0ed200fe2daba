"""Stages and pipelines: from a configuration to artefacts on disk."""
