"""A logger of one's own: lines of a CSV file."""

import csv

from orchestrator.tracking.loggers import RunLogger


class CsvLogger(RunLogger):
    """Writes the metrics of a run as lines `step,name,value`."""

    has_begun = False

    def log(self, step, values, *, time):
        self.folder.mkdir(parents=True, exist_ok=True)
        # A new process gets all metrics of the run again.
        mode = "a" if self.has_begun else "w"
        self.has_begun = True
        with (self.folder / "metrics.csv").open(mode, newline="") as file:
            csv.writer(file).writerows((step, name, value) for name, value in values.items())
