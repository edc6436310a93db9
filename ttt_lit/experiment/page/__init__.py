"""The report as a page: recommendation, gates, figures and tables from run records. Needs numpy and matplotlib, no torch."""

from ttt_lit.experiment.page.write import write_report

__all__ = ["write_report"]
