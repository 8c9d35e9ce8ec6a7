"""``fedmpi train`` on every rank, which writes its process id into FOLDER/rank first: ``train.py FOLDER ARGUMENTS``."""

import os
import sys
from pathlib import Path

from fedmpi.cli import main

rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))
(Path(sys.argv[1]) / rank).write_text(str(os.getpid()))
sys.exit(main(["train", *sys.argv[2:]]))
