"""Shapes are types: the checker that conftest.py hangs into every function of the frame, the attacks and the clients."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
