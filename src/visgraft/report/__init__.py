"""The page on trained runs, and the demo's picture.

Here belongs what shows how a trained adapter answers, where it errs and what its channels and experts do. The page
on data before training belongs to `check`.
"""
