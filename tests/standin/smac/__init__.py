"""Stand-in for the `smac` package, for tests only: the same interface, a small battle of its own.

Put `tests/standin` on PYTHONPATH. Misuse raises AssertionError("misuse: ..."), see
`smac.env.starcraft2.starcraft2`; crashes and the like are ordered through STANDIN_SMAC_FAULTS and
calls are recorded in STANDIN_SMAC_LOG, see `smac.env.starcraft2.faults`.
"""
