"""Ways out: merging into the frozen weights with a measured certificate, and formats that others open.

Here belongs what turns an adapted model into another file. Each way ends in a measurement, and writes nothing where
that fails.
"""
