"""CSM: plan, generate and annotate images that lie between classes."""
