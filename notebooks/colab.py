# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Colab: notebooks 1 to 4 in one runtime
#
# This notebook gets the project, installs it beside the libraries of the runtime and runs the first four notebooks of
# a study. The runtime's Jupyter kernel, NumPy, pandas and PyTorch stay as they are. A CPU is enough. On a GPU without
# BF16 and FlashAttention-2, such as a T4, the variants that need them are listed as *not run*, with the reason.

# %% tags=["parameters"]
repository: str = ""  # address to clone; `make sync` writes it from pyproject.toml
place: str = "/content"  # folder of the runtime
study: str = "demo"  # a file of params/, without .yaml

# %% [markdown]
# ## The project
#
# Where `repository` is empty, first upload an archive of the project with the *Files* panel. This command, in the
# project's folder on your machine, makes it: `git archive --format=zip --prefix=vitlib/ --output=vitlib.zip HEAD`

# %%
# %cd {place}
fetch = f"git clone --quiet --depth 1 {repository} vitlib" if repository else "unzip -q vitlib.zip"
# !test -d vitlib || {fetch}
# %cd vitlib

# %% [markdown]
# The extra `report` has what executes notebooks and makes pages of them, without JupyterLab.

# %%
# !python -m pip install --quiet -e '.[report]'

# %% [markdown]
# ## 1 Fine-tuning
#
# Each of the next four cells executes one notebook into `outputs/<study>/`.

# %%
# !python -m vitlib.report run notebooks/1_finetune.ipynb --study {study}

# %% [markdown]
# ## 2 Evaluation

# %%
# !python -m vitlib.report run notebooks/2_evaluate.ipynb --study {study}

# %% [markdown]
# ## 3 Ablation

# %%
# !python -m vitlib.report run notebooks/3_ablation.ipynb --study {study}

# %% [markdown]
# ## 4 Inference

# %%
# !python -m vitlib.report run notebooks/4_inference.ipynb --study {study}

# %% [markdown]
# ## Results
#
# The table of variants:

# %%
# !python -m vitlib.report summary --study {study}

# %% [markdown]
# The answer of each report: the outputs of its cells with the tag `summary`.

# %%
import nbformat
from IPython.display import display

# %%
names = ("1_finetune", "2_evaluate", "3_ablation", "4_inference")
reports = [nbformat.read(f"outputs/{study}/{name}.ipynb", as_version=4).cells for name in names]
shown = [cells[:1] + [cell for cell in cells if "summary" in cell.metadata.get("tags", ())] for cells in reports]
answers = [[out.data for cell in cells for out in cell.get("outputs", ()) if "data" in out] for cells in shown]
pairs = zip(shown, answers, strict=True)
display(*[part for (title, *_), answer in pairs for part in ({"text/markdown": title.source}, *answer)], raw=True)

# %% [markdown]
# Download `reports.zip` from the *Files* panel and open `index.html`, which leads to the four pages.

# %%
# !rm -f {place}/reports.zip && zip -qr {place}/reports.zip outputs/{study} -x '*/checkpoints/*' '*/training/*'
