"""Answers: images of any number through one adapter or several, as a stream or over HTTP.

Here belongs what answers with trained adapters: `prediction` for files, and the HTTP application, which adds protocol,
batches, limits and a page to the bank, and nothing of its own to the way through the model. Figures on labelled images
belong to `measure`. Nothing here trains.
"""
