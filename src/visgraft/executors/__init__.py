"""Where work is done: here, in processes beside this one, or on a cluster.

Here belongs what runs jobs, each a pure function of its values, and tells what becomes of them. What a job computes
belongs to the rooms above.
"""
