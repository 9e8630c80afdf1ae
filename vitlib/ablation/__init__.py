"""Notebook 3: what low precision costs the network, where, and what mends it.

`exchange` runs mixtures of formats, `blocks` is the ablation of whole blocks, `linears` measures each linear, and
`plans` chooses a format for each.
"""

from __future__ import annotations

from vitlib.ablation import blocks
from vitlib.ablation.subject import prepare
from vitlib.report.tables import Markdown
from vitlib.study import origin
from vitlib.study.study import Study

__all__ = ["blocks", "prepare"]
open = Study.open


def introduce(study: Study) -> Markdown:
    """What the base is, and what follows for the accuracies of this page."""
    return Markdown(origin.sentence(study.folder))
