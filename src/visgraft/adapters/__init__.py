"""What a training leaves behind: the adapter's directory, and a new training that starts from one.

Here belongs what reads, writes and publishes adapters, or makes new ones of old ones. Folding one into its backbone
belongs to `export`, answering with one to `serve`.
"""
