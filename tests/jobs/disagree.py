"""``fedmpi train`` on every rank, but the last has another learning rate: ``disagree.py CONFIG OUT``."""

import sys

from mpi4py import MPI

from fedmpi.cli import main

last = MPI.COMM_WORLD.Get_rank() == MPI.COMM_WORLD.Get_size() - 1
sys.exit(main(["train", sys.argv[1], "--out", sys.argv[2], *(["local.lr=0.5"] if last else [])]))
