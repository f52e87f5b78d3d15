"""Tasks that the project draws itself: gauges, sprites, and how they are painted.

Here belongs what makes labelled images out of a seed. Reading images that somebody has belongs to `data`.
It needs no model and no network.
"""
