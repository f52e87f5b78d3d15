"""The bank: one frozen backbone in memory, thousands of adapters, every image of a batch with its own.

Here belongs what holds adapters of one backbone together and answers with them in one forward. How one adapter is
stored and read belongs to `adapters`; a stream of pictures, or requests, to `serve`.
"""
