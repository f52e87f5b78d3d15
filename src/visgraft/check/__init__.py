"""What is wrong with the data, before training: `check_data` looks at every image, `quick_check` at their number.

Here belongs what finds faults in somebody's images and shows them. Nothing here changes the images or trains a
backbone on them.
"""

from visgraft.check.findings import DatasetImage as DatasetImage
from visgraft.check.findings import Finding as Finding
from visgraft.check.findings import Report as Report
from visgraft.check.quick import quick_check as quick_check
from visgraft.check.run import check_data as check_data
