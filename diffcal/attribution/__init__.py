"""DAS: which training images matter for a generated image, how much, and how far to trust it."""
