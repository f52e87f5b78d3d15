"""Where work is done: here, in processes beside this one, on a cluster, or by several processes together.

Here belongs what runs jobs, each a pure function of its values, and tells what becomes of them, and how processes that
share one computation meet. What is computed belongs to the rooms above.
"""
