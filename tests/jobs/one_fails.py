"""sync over MPI, whose rank 1 alone, or whose ranks all, cannot send: ``one_fails.py one|all``."""

import sys

import torch
from torch import nn

import fedmpi
from fedmpi.comm import connect
from fedmpi.errors import ConfigError

comm = connect("mpi")
net = nn.Linear(40, 40)
average = fedmpi.sync(net, "signsgd", comm=comm)
net.weight.grad = torch.ones(40, 40)
if comm.rank == 1 or sys.argv[1] == "all":
    net.weight.grad = net.weight.grad.to_sparse()
try:
    average()
except ConfigError as error:
    print(f"rank {comm.rank}: {error}")
