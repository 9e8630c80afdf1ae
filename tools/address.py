"""Write the repository's address from pyproject.toml into README and notebooks; `make sync` calls it.

With `--check` it changes nothing, names what is out of step and exits with 1.

`[project.urls]` may name a `Repository`. Then notebooks/colab clones it, and where it is on GitHub, README and each
notebook have a badge under their title that opens notebooks/colab. Without an address there is no badge, and
notebooks/colab takes an uploaded archive.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLAB = "https://colab.research.google.com"


def badge(address: str) -> str:
    """The Markdown of the badge; '' where Colab cannot open the repository."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    opens = f"{COLAB}/github/{found[1]}/blob/main/notebooks/colab.ipynb" if found else ""
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({opens})" if found else ""


def with_address(text: str, address: str, *, comment: str = "") -> str:
    """`text` with the badge of `address` under its title and the address in `repository`; its lines start `comment`."""
    blank = comment.strip() + "\n"
    text = re.sub(rf"^{blank}{comment}\[!\[Open in Colab\].*\n", "", text, flags=re.MULTILINE)
    if shown := badge(address):
        under = rf"\g<0>{blank}{comment}{shown}\n"
        text = re.sub(rf"^{comment}# .*\n", under, text, count=1, flags=re.MULTILINE)
    return re.sub(r'^repository: str = ".*?"', f'repository: str = "{address}"', text, flags=re.MULTILINE)


def write(root: Path, *, check: bool = False) -> list[str]:
    """Bring README and notebooks of `root` in step; returns the names of what was not. `check` changes nothing."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address, changed = project.get("urls", {}).get("Repository", ""), []
    for path in (root / "README.md", *sorted((root / "notebooks").glob("*.py"))):
        before = path.read_text(encoding="utf-8")
        after = with_address(before, address, comment="# " if path.suffix == ".py" else "")
        if after != before:
            changed.append(path.name)
            if not check:
                path.write_text(after, encoding="utf-8")
    if not check and (pairs := [str(root / "notebooks" / name) for name in changed if name.endswith(".py")]):
        command = [sys.executable, "-m", "jupytext", "--quiet", "--to", "ipynb", "--update", *pairs]
        subprocess.run(command, cwd=root, check=True)
    return changed


if __name__ == "__main__":
    checking = sys.argv[1:] == ["--check"]
    found = write(ROOT, check=checking)
    print("\n".join(found))
    sys.exit(bool(found) if checking else 0)
