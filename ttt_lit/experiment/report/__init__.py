"""The console summary of runs: records in, tables and sentences out. No numpy for a few runs; the page is ``ttt_lit.experiment.page``."""

from ttt_lit.experiment.report.collect import Collected, read_records
from ttt_lit.experiment.report.console import console, tables
from ttt_lit.experiment.report.table import Table

__all__ = ["Collected", "Table", "console", "read_records", "tables"]
