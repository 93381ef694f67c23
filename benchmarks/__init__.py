"""Side-by-side measurements with the peers. Run from the project's root: `python -m benchmarks.gpu`, `python -m benchmarks.cpu`."""
