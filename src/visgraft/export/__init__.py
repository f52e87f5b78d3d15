"""Ways out: merging into the frozen weights with a measured certificate, and formats that others open.

Here belongs what turns an adapted model into another file: one class per format, registered like methods. Each way
ends in a measurement by the runtime that the file is for, and writes nothing where that fails.
"""
