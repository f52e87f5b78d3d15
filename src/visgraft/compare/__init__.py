"""Which method for my data? Methods searched within a time and compared on the same images."""

from visgraft.compare.budget import parse_budget
from visgraft.compare.result import Comparison, MethodResult, Progress
from visgraft.compare.run import METHODS, compare

__all__ = ["METHODS", "Comparison", "MethodResult", "Progress", "compare", "parse_budget"]
