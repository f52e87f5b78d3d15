"""Run protocols trial by trial, and read their results."""
