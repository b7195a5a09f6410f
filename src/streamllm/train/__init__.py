"""Pretraining from scratch, with a sink token, with a zero sink or with none (paper, section 3.3)."""
