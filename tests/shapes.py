"""Shapes are types: the tests run with every annotation of the frame, the attacks and the clients checked."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_shapes() -> None:
    """Hang `check` into each function of the modules that are imported from now on."""
    install_import_hook(("simulator", "attackers", "clients"), f"{__name__}.check")
