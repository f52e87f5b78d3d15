"""Which method for my data? Methods searched within a time and compared on the same images.

Here belongs what chooses between methods and settings, for one user's data and within a given time. Comparing
methods over many tasks, each with the same search, belongs to `bench`.
"""

from visgraft.search.budget import parse_budget
from visgraft.search.result import Comparison, MethodResult, Progress
from visgraft.search.run import METHODS, compare

__all__ = ["METHODS", "Comparison", "MethodResult", "Progress", "compare", "parse_budget"]
