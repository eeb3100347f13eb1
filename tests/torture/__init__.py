"""Many kinds of faults at random places and times, against real ranks and a real Slurm: see tools/torture.py.

`trial.py` is the run that a fault is injected into, and its oracle. `faults_*.py` are the kinds. `campaign.py` is the order
of trials and the table of results.
"""
