"""The HTML report of a run or a comparison: one file that needs nothing else."""

from fedgraft.platform.report.page import write_report

__all__ = ["write_report"]
