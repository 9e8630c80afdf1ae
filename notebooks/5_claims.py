# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Claims: which results of the original study hold?
#
# This project rebuilds the student project
# [Vision Model Optimization with Quantization & Efficient Attention](https://github.com/jayrajpamnani/Vision-Model-Optimization-with-Quantization-Efficient-Attention),
# called *the original* here, whose README and slides each have a table of results. This notebook tests their claims on
# the records of this study, and repeats the original's preprocessing mistake.
#
# Every verdict is computed. A claim *holds*, *holds only* for some batch sizes or variants, or *does not hold*. It
# *cannot be tested here* if the study lacks what the claim is about: the same network, a GPU, the same pretrained
# weights. Verdicts apply to this study only: sensitivity and the cost of quantization depend on the weights, and the
# latency of eager networks at batch size 1 also depends on the CPU.

# %% tags=["parameters"]
study: str = "lab"  # results go to outputs/<study>/
data_source: str = "synthetic"  # synthetic, a folder with train/ and valid/, hub:<data set>, or torchvision:<folder>
device: str = "auto"  # auto, cpu, cuda; auto is the GPU if there is one
seed: int = 0  # seed of initialisation, order and augmentation
limit: int = 0  # pictures used of each split, spread over the classes; 0: all
pictures_per_class: int = 60  # training pictures per class (synthetic data only)
max_megapixels: float = 50.0  # larger pictures are skipped and reported
workers: int = 2  # threads that decode pictures
image_size: int = 48  # side in pixels of synthetic pictures and of a base that is not loaded
eval_batch_size: int = 32  # batch size where only the outputs matter

# %%
from vitlib import claims
from vitlib.report import plots, tables

study = claims.open(globals())

# %% [markdown]
# ## The claims
#
# The claims are data in `vitlib/claims/claims.yaml`, a file without verdicts. Each claim has a quantity that is
# measured on the study. One claim as an object, and its measurement:

# %%
claim = claims.load()["own-top1"]
claim, claim.quantity.measure(study)

# %% [markdown]
# The original's objectives come first. Where variants are compared, a figure has a confidence interval:

# %%
verdicts = claims.verdicts(study)
claims.show(verdicts, "objectives")

# %% [markdown]
# ## Consistency of the original
#
# The README and the slides report some of the same quantities. Here they are compared with each other.

# %%
claims.show(verdicts, "own figures", "training and inference")

# %% [markdown]
# ## Significance of the original's ablation
#
# The original kept one part at a time in FP16 and counted right predictions. It did not publish which pictures changed,
# so the table gives the smallest p that McNemar's exact test could have for each difference. The ten largest
# differences:

# %%
ablation = claims.reanalysis()
tables.table(ablation.head(10), claims.REANALYSIS)

# %%
claims.reanalysis_in_words(ablation)

# %% [markdown]
# ## The preprocessing mistake
#
# The original trained with a plain resize and the checkpoint's normalisation. It evaluated with a centre crop from a
# larger picture and ImageNet's mean and standard deviation. The table evaluates the checkpoint of this study with both,
# and with each half of the mistake alone. The quantized checkpoints show whether the mistake changes the cost of
# quantization.

# %%
dataset = claims.pictures(study)
costs = claims.mistake(study, dataset)
tables.table(costs, claims.MISTAKE)

# %%
claims.mistake_in_words(costs)

# %% [markdown]
# The same pictures as the network sees them: it reads all values with the normalisation of its training.

# %%
plots.picture_grid(*claims.looks(study, dataset, 3), columns=4)

# %% [markdown]
# ## The two tables, column by column
#
# Latencies depend on the GPU, so they are compared as ratios to the baseline of the same table.

# %%
claims.show(verdicts, "slides table", "README table")

# %% [markdown]
# ## Speed, accuracy and recommendations
#
# A claim is undecided if the interval of its measurement includes the limit.

# %%
claims.show(verdicts, "speed and accuracy", "recommendations")

# %% [markdown]
# ## Sensitivity of blocks, and the first and last layers
#
# The sensitivity of a block is the KL when it alone is quantized. The gain of keeping a part in FP16 is significant if
# its p after Holm's adjustment is below 0.05.

# %%
claims.show(verdicts, "sensitivity")

# %% [markdown] tags=["summary"]
# ## Summary

# %%
tables.table(claims.counts(verdicts), index=True)

# %% tags=["summary"]
claims.summary(study, verdicts, costs)
