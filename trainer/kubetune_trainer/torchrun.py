"""torchrun's options, as far as a run here has something to do with them; they stand before the recipe."""

import argparse
from pathlib import Path

from kubetune_contract.errors import ConfigError
from kubetune_trainer.launch import Nodes

_BY_DEVICES = ("auto", "gpu")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds them with torchrun's names, in both of its spellings."""
    add = parser.add_argument
    add("--nproc_per_node", "--nproc-per-node", default="1", metavar="N", help="processes on this machine, or gpu (1)")
    add("--nnodes", type=int, default=1, metavar="N", help="machines (1)")
    add("--node_rank", "--node-rank", type=int, default=0, metavar="R", help="number of this machine (0)")
    add("--master_addr", "--master-addr", default=None, metavar="HOST", help="machine 0")
    add("--master_port", "--master-port", type=int, metavar="PORT", help="port on machine 0")
    add("--rdzv_endpoint", "--rdzv-endpoint", metavar="HOST:PORT", help="both in one")
    add("--rdzv_backend", "--rdzv-backend", choices=("static", "c10d"), help="static for several machines")
    add("--rdzv_id", "--rdzv-id", metavar="ID", help="not needed: the address says which run it is")
    add("--standalone", action="store_true", help="one machine, as without --nnodes")


def gpus() -> int:
    """GPUs of this machine, without asking torch."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def nodes(options: argparse.Namespace) -> Nodes:
    """Who takes part. Raises ConfigError for a word that is no number and for options that contradict each other."""
    processes, problems = options.nproc_per_node, []
    if processes in _BY_DEVICES:
        processes = str(max(1, gpus()))
    if not processes.isdigit() or int(processes) < 1:
        problems.append(
            f"--nproc_per_node: {processes!r} is neither a number of processes nor {' or '.join(_BY_DEVICES)}"
        )
        processes = "1"
    if options.standalone and options.nnodes > 1:
        problems.append(f"--standalone is for one machine, but --nnodes is {options.nnodes}: leave one of them out")
    if options.rdzv_backend == "c10d" and options.nnodes > 1:
        problems.append("--rdzv_backend c10d: machines are not numbered here: leave it out and give --node_rank")
    host, _, port = (options.rdzv_endpoint or "").partition(":")
    if port and not port.isdigit():
        problems.append(f"--rdzv_endpoint: {options.rdzv_endpoint!r} is not HOST:PORT")
    if problems:
        raise ConfigError(problems)
    address = options.master_addr or host or Nodes.address
    number = options.master_port or int(port or 0) or None
    return Nodes(int(processes), options.nnodes, options.node_rank, address, number if options.nnodes > 1 else None)
