"""visgraft."""
