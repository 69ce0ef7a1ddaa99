"""What the optimizers cost, measured: `python -m benchmarks.overhead --help`."""
