"""Adapters of one backbone as things to reckon with: how far apart are two, how small could one be, which fits images?

Here belongs what compares adapters with each other or makes a smaller one of one. Sums of adapters belong to
`adapters` and `search` (blends), and answering with many of them to `bank`.
"""
