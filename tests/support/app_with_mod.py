"""The quickstart app with a mod that its train function alone has."""

from pathlib import Path

APP = Path(__file__).parents[1] / "apps/quickstart"


def app_with_mod(folder: Path, mod: str) -> Path:
    """The quickstart app with a mod on its train function alone, in modules of this folder's name."""
    source = (APP / "quickstart.py").read_text()
    source = source.replace("@client.train()", f"@client.train(mods=[{mod}])")
    source = source.replace("import torch\n", "import torch\nfrom flwr.clientapp.mod import LocalDpMod\n", 1)
    toml = (APP / "pyproject.toml").read_text()
    folder.mkdir()
    (folder / f"{folder.name}.py").write_text(source)
    (folder / "pyproject.toml").write_text(toml.replace("quickstart", folder.name))
    return folder
