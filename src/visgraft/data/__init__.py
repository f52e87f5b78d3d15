"""Data: image folders, and the drawn demo task."""
