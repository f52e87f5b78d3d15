"""The contract and its proof: what a method is, where a model's sites are, and how one is attached and detached.

Here belongs what every method and every family needs. No method is named here, and a family only in the family
table, `families.py`. Nothing here reads images or files.
"""
