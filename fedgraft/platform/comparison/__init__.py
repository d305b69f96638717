"""Puts runs, experiments and sweeps side by side: tables, tests, a report and figures for a paper."""

from fedgraft.platform.comparison.comparison import METRICS, Comparison, compare, write_sweep_report

__all__ = ["METRICS", "Comparison", "compare", "write_sweep_report"]
