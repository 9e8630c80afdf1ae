# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Claims of the original study, tested

# %% [markdown] tags=["details"]
# ### How the claims are tested
#
# This project rebuilds a student project, called *the original* here, whose README and slides each have a table of
# results. This notebook tests their claims on the records of this study, and repeats the original's preprocessing
# mistake.
#
# Every verdict is computed. A claim *holds*, *holds only* for some batch sizes or variants, or *does not hold*. It
# *cannot be tested here* if the study lacks what the claim is about (the same network, a GPU, the same pretrained
# weights) or if the interval of the measurement includes the limit. Verdicts apply to this study only: sensitivity and
# the cost of quantization depend on the weights, and the latency of eager networks at batch size 1 also depends on the
# CPU.

# %% tags=["parameters"]
study: str = "lab"  # results go to outputs/<study>/
data_source: str = "synthetic"  # synthetic, a folder with train/ and valid/, hub:<data set>, or torchvision:<folder>
device: str = "auto"  # auto, cpu, cuda; auto is the GPU if there is one
seed: int = 0  # seed of initialisation, order and augmentation
limit: int = 0  # pictures used of each split, spread over the classes; 0: all
valid_limit: int = 0  # the same for the splits that are not trained on; 0: as limit
pictures_per_class: int = 60  # training pictures per class (synthetic data only)
max_megapixels: float = 50.0  # larger pictures are skipped and reported
follow_links: bool = False  # read pictures that a link leads to outside the folder
workers: int = 2  # threads that decode pictures
image_size: int = 48  # side in pixels of synthetic pictures and of a base that is not loaded
eval_batch_size: int = 32  # batch size where only the outputs matter

# %%
from vitlib import claims
from vitlib.report import plots, tables

study = claims.open(globals())
tables.base(study)

# %% [markdown]
# The claims are data in `vitlib/claims/claims.yaml`, a file without verdicts. Each claim has a quantity that is
# measured on the study. One claim as an object, and its measurement:

# %%
claim = claims.load()["own-top1"]
claim, claim.quantity.measure(study)

# %% [markdown]
# Speeds are compared as ratios to the baseline of the same table, since latencies depend on the GPU. The sensitivity of
# a block is the KL when it alone is quantized; the gain of keeping a part in FP16 is significant if its p after Holm's
# adjustment is below 0.05. Columns of the original's tables list FP32, NF4 and INT8, and then NF4 and INT8 with
# FlashAttention-2.

# %%
verdicts = claims.verdicts(study)

# %% [markdown] tags=["details"]
# ### Claims that do not hold

# %%
claims.counted(verdicts, claims.FAILS)

# %%
claims.show(verdicts, claims.FAILS)

# %% [markdown] tags=["details"]
# ### Claims that hold only in some cases

# %%
claims.counted(verdicts, claims.HOLDS_ONLY)

# %%
claims.show(verdicts, claims.HOLDS_ONLY)

# %% [markdown] tags=["details"]
# ### Claims that hold

# %%
claims.counted(verdicts, claims.HOLDS)

# %%
claims.show(verdicts, claims.HOLDS)

# %% [markdown] tags=["details"]
# ### Claims that cannot be tested here

# %%
claims.counted(verdicts, claims.UNTESTED)

# %%
claims.show(verdicts, claims.UNTESTED)

# %% [markdown] tags=["details"]
# ### What went wrong in the original: preprocessing and significance
#
# The original trained with a plain resize and the checkpoint's normalisation. It evaluated with a centre crop from a
# larger picture and ImageNet's mean and standard deviation. Pictures as the network sees them, which reads all values
# with the normalisation of its training:

# %%
dataset = claims.pictures(study)
plots.picture_grid(*claims.looks(study, dataset, 3), columns=4)

# %% [markdown]
# The checkpoint of this study with both preprocessings, and with each half of the mistake alone. The quantized
# checkpoints show whether the mistake changes the cost of quantization.

# %%
costs = claims.mistake(study, dataset)
tables.table(costs, claims.MISTAKE)

# %% [markdown]
# #### Significance of its ablation
#
# The original kept one part at a time in FP16 and counted right predictions. It did not publish which pictures changed,
# so the table gives the smallest p that McNemar's exact test could have for each difference. The ten largest
# differences:

# %%
ablation = claims.reanalysis()
tables.table(ablation.head(10), claims.REANALYSIS)

# %%
claims.reanalysis_in_words(ablation)

# %% [markdown] tags=["summary"]
# ## Summary

# %% tags=["summary"]
claims.summary(study, verdicts, costs)

# %% tags=["summary"]
plots.verdict_bars(claims.counts(verdicts).rename({claims.HOLDS_ONLY: "holds only in some cases"}))
