"""The order of a study's notebooks; what is up to date is not run again. `make study` calls it.

    snakemake -c all --config study=demo
"""

import shlex
import sys
from pathlib import Path

STUDY = config.get("study", "demo")
SET = f"params/{STUDY}.yaml"
OUT = f"outputs/{STUDY}"
RUN = f"{shlex.quote(sys.executable)} -m vitlib.report"

# notebook: the records it writes, and the notebooks whose records it needs. Another notebook is another row.
NOTEBOOKS = {
    "1_finetune": (["finetune.csv", "recipes.csv", "base.json"], []),
    "2_evaluate": (
        [f"{table}.csv" for table in ("variants", "kernels", "accuracy", "latency", "throughput", "roofline", "validity")]
        + ["environment.json", "logits.npz"],
        ["1_finetune", "3_ablation"],  # which makes the checkpoint that is a variant
    ),
    "3_ablation": (
        [f"{table}.csv" for table in ("ablation", "reliability", "sensitivity", "correlations", "additivity")]
        + [f"{table}.csv" for table in ("plans", "formats", "repair")],
        ["1_finetune"],
    ),
    "4_inference": (["predictions.csv", "inference.json", "recommendation.json"], ["2_evaluate"]),
    "5_claims": (["claims.csv", "preprocessing.csv"], ["2_evaluate", "3_ablation", "4_inference"]),
    "6_speed": ([], ["2_evaluate"]),
}
# One file represents each checkpoint, whose folder is put in place as a whole.
MADE = {"1_finetune": ("merged", "nf4", "nf4-calibrated", "int8"), "3_ablation": ("mixed",)}
CHECKPOINTS = {
    notebook: [f"{OUT}/checkpoints/{name}/provenance.json" for name in names] for notebook, names in MADE.items()
}
# Other files that a notebook reads, beside the table of drawn flowers.
FILES = {"5_claims": ["vitlib/claims/claims.yaml", "vitlib/claims/ablation.csv"]}

workflow.workdir(workflow.basedir)  # also when called from notebooks/
sys.path[:0] = [str(workflow.basedir), f"{workflow.basedir}/tools"]
from sources import sources

if not Path(SET).is_file():
    sys.exit(f"error: there is no parameter set {SET}")


def records_of(notebook):
    """Tables and checkpoints of a notebook, which others read."""
    return [f"{OUT}/records/{name}" for name in NOTEBOOKS[notebook][0]] + CHECKPOINTS.get(notebook, [])


def reports_of(notebook):
    return [f"{OUT}/{notebook}.html", f"{OUT}/{notebook}.ipynb"]


def mark_of(notebook):
    """An empty file that says that the notebook's last run went well."""
    return f".snakemake/done/{STUDY}/{notebook}"


rule all:
    # All files by name, not the index alone: Snakemake ignores a missing file further back.
    input:
        f"{OUT}/index.html",
        [file for notebook in NOTEBOOKS for file in reports_of(notebook) + records_of(notebook)],
        [mark_of(notebook) for notebook in NOTEBOOKS],


rule index:
    input:
        [file for notebook in NOTEBOOKS for file in reports_of(notebook) + records_of(notebook)],
        [mark_of(notebook) for notebook in NOTEBOOKS],
        [f"vitlib/report/{module}.py" for module in ("columns", "index", "layout", "page", "tables")],
        [f"vitlib/report/templates/{name}.html.j2" for name in ("base", "index", "studies")],
        "vitlib/report/templates/report/static/report.css",
    output:
        f"{OUT}/index.html",
    shell:
        "{RUN} index --study {STUDY}"


for notebook, (_, needs) in NOTEBOOKS.items():

    rule:
        name: notebook.partition("_")[2]
        input:
            script=f"notebooks/{notebook}.py",
            parameters=SET,
            files=["vitlib/pictures/flowers.csv", *FILES.get(notebook, [])],
            code=sources(f"notebooks/{notebook}.py"),
            records=[record for other in needs for record in records_of(other)],
            marks=[mark_of(other) for other in needs],
        output:
            # Snakemake removes outputs before a job, except those it is to update: the last good report stays
            # until a better one is whole. The mark is removed, so that a failed notebook is run again next time.
            # The failed report is no `log:`, as Snakemake makes empty files of logs that were not written.
            reports=[update(file) for file in reports_of(notebook)],
            records=[update(file) for file in records_of(notebook)],
            mark=touch(mark_of(notebook)),
        params:
            notebook=f"notebooks/{notebook}.ipynb",
        # One at a time: each uses all cores, and evaluate and inference measure time.
        threads: workflow.cores
        shell:
            "{RUN} run {params.notebook} --study {STUDY} --params {input.parameters}"
