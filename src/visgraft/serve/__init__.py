"""Answers: images of any number through one adapter or several, in one pass of the backbone each.

Here belongs what answers with trained adapters. Figures on labelled images belong to `measure`.
Nothing here trains or writes files.
"""
