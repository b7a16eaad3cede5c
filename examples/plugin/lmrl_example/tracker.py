"""A tracker that appends everything it gets to a file of JSON lines."""

import json
from pathlib import Path

from accelerate.tracking import GeneralTracker


class JsonLog(GeneralTracker):
    """`trackers/FILE` of the run folder: the recipe first, then a line for each step, evaluation and table."""

    name = "json_log"
    requires_logging_directory = True

    def __init__(self, project, folder, file="log.jsonl"):
        super().__init__()
        self.path = Path(folder) / file

    @property
    def tracker(self):
        return self.file

    def start(self):
        self.file = open(self.path, "a")  # a resumed run continues the same file

    def store_init_configuration(self, values):
        self._write({"config": values})

    def log(self, values, step=None, **kwargs):
        self._write({"step": step} | values)

    def log_table(self, table_name, columns=None, data=None, step=None, **kwargs):
        self._write({"step": step, table_name: [dict(zip(columns, row, strict=True)) for row in data]})

    def finish(self):
        self.file.close()

    def _write(self, line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
