"""Faults of many kinds, random in place and time, against real ranks and a real Slurm: see tools/torture.py.

`trial.py`: what a fault is tried on, and the oracle it is compared with. `faults_*.py`: the kinds. `campaign.py`: the order
of trials, and the table that is left.
"""
