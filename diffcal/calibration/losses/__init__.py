"""Train-time losses: ``build_loss`` in ``registry`` makes one by name."""
