"""The files that a script imports, for the workflow: Snakemake runs a notebook again when one of them changes."""

import re
from pathlib import Path

import grimp


def sources(script: str | Path, package: str = "vitlib") -> list[str]:
    """The files of `package` that `script` imports, directly or through each other, relative to the package's parent.

    A change in one of them makes a report out of date; a change in another module does not. Nothing is imported.
    """
    graph = grimp.build_graph(package, cache_dir=None)
    lines = re.findall(
        rf"^from ({package}\b[\w.]*) import (.+)", Path(script).read_text(encoding="utf-8"), re.MULTILINE
    )
    named = {f"{parent}.{name.strip()}" for parent, names in lines for name in names.split(",")}
    modules = graph.modules & {*named, *(parent for parent, _ in lines)}
    modules = modules.union(*map(graph.find_upstream_modules, modules))
    modules |= {module.rsplit(".", up)[0] for module in modules for up in range(1, module.count(".") + 1)}
    ends = {module: "/__init__.py" if graph.find_children(module) else ".py" for module in modules}
    return sorted(module.replace(".", "/") + end for module, end in ends.items())
