"""Figures: device and precision, evaluation on labelled images, intervals, calibration, and an adapter's measuring.

Here belongs what turns answers into numbers. What is made of the numbers, pages or tables, belongs to `report` and
`bench`; nothing here trains.
"""
