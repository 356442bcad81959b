"""Flow matching as pure functions: the path between data and noise, timesteps, loss weights, guidance, ODE solvers.

``path.py`` states the convention of time that all files keep.
"""
