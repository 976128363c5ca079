"""Define the mathematics: rules, objective, allocation, statistics. No disk, no Dask, no plots."""
