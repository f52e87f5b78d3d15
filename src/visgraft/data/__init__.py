"""The user's images: folders, tables and data sets, divided into parts; decoding, caches, augmentation.

Here belongs the way from files to pixels and labels. Saying what is wrong with them belongs to `check`; images that
the project draws belong to `drawn`.
"""
