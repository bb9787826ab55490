"""What the entry points share: one module per idea, imported one way (entry points -> slm)."""
