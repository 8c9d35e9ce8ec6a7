"""One client's data is not a number; each rank prints the error that it gets, or how often it was rejected and a hash
of its parameters: ``poison.py CONFIG``."""

import hashlib
import sys

from fedmpi import config
from fedmpi.comm import connect
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import FedMPIError
from fedmpi.tasks.data import Split

comm = connect()
simulation = Simulation(config.load(sys.argv[1]), comm)
train = simulation.data.train
x = train.x.clone()
x[simulation.partition.of(4)] = float("nan")
simulation.data = simulation.data._replace(train=Split(x, train.y))
try:
    for t in range(simulation.config.rounds):
        simulation.round(t)
    digest = hashlib.sha256(simulation.replica.parameters().numpy().tobytes()).hexdigest()
    sys.stdout.write(f"rank {comm.rank}: rejected {simulation.counts['rejected']}, {digest}\n")
except FedMPIError as error:
    sys.stdout.write(f"rank {comm.rank}: {error}\n")  # one write: lines of several ranks must not mix
