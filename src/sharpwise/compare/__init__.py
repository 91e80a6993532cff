"""Comparing optimizers: fair runs, and the page that says what came out."""
