# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Claims: does what the original study said hold?
#
# The study that this one rebuilds published two tables and many sentences with numbers. Each is a row here: what was
# said and where, what this study measured on the same quantity, and a verdict that is computed. We will see
#
# - whether the original's own figures agree with each other;
# - what its ablation can show, given how many pictures it had;
# - what its wrong preprocessing costs, by making the same mistake on our checkpoint;
# - size, speed, accuracy, sensitivity and the recommendations, claim by claim;
# - both tables, cell by cell, and a count of all verdicts.
#
# A claim *holds* or it does not, or it holds *only* for some numbers of pictures a call. It *cannot be tested here*
# where the study lacks what the claim is about: the network, a GPU, the same card for milliseconds, the same weights
# for accuracies. A verdict belongs to the study that this page was made from: which blocks are sensitive and what
# quantization costs depend on the weights, and how an eager network's latency compares at batch 1 on the host as well.
#
# What a measurement must be for its claim to hold stands in the column *holds if*: a bound, a range, or a factor
# in either direction for ratios. Where variants are compared, one is better only if the intervals of both lie apart.
#
# *Installing: `make setup` on your own machine. In Colab, clone the project, run `%cd` to its folder and `%pip install
# -q -e .` in a cell above this one, then restart the runtime. Every setting below can be changed in place.*

# %% tags=["parameters"]
study: str = "demo"  # results go to outputs/<study>/
data_source: str = "synthetic"  # synthetic, a folder with train/ and valid/, hub:<data set>, or torchvision:<folder>
device: str = "auto"  # auto, cpu, cuda: auto takes the GPU where there is one
seed: int = 0  # of initialisation, order and augmentation
limit: int = 0  # pictures used of each split, evenly over the classes; 0 takes all
pictures_per_class: int = 60  # training pictures of a class, synthetic data only
max_megapixels: float = 50.0  # larger pictures are reported and skipped
workers: int = 2  # threads that decode pictures
image_size: int = 48  # side in pixels, of synthetic pictures and of a base that is not loaded
eval_batch_size: int = 32  # pictures a call when only outputs matter

# %%
from vitlib import params

settings = params.collect(globals())

# %% [markdown]
# ## The claims
#
# They stand in one file, `vitlib/claims.yaml`, without any verdict. What was measured comes from this study's records.

# %%
from vitlib import claims

frame = claims.table(settings.study)
print(f"{len(frame)} claims")

# %% [markdown]
# ## The original against itself
#
# Its two texts give figures for the same things. No machine is needed to compare them.

# %%
claims.readable(frame, "own figures")

# %% [markdown]
# ## What its ablation can show
#
# The original kept one block at a time in 16 bit and counted right answers. Which pictures changed was not published,
# so the table gives the smallest p that McNemar's exact test could have had for each difference, adjusted for all
# comparisons. The ten largest differences:

# %%
from vitlib import plots

ablation = claims.reanalysis()
plots.table(claims.readable_reanalysis(ablation.head(10)), digits=4)

# %%
from IPython.display import Markdown

Markdown(claims.reanalysis_headline(ablation))

# %% [markdown]
# ## The preprocessing mistake, made again
#
# The original trained with one preprocessing and evaluated with another: a centre crop from a larger picture in
# place of a plain resize, and the mean and standard deviation of ImageNet in place of the checkpoint's own. Here our
# merged checkpoint gets its validation pictures in both ways, and with either half of the mistake alone. The quantized
# checkpoints get them in both ways too: does the mistake change what quantization costs?

# %%
from vitlib import mismatch, sources

dataset = sources.load(settings)
costs = mismatch.mismatched(settings, dataset)
plots.table(mismatch.readable(costs))

# %%
Markdown(mismatch.headline(costs))

# %% [markdown]
# The same pictures as the network takes them, which reads all values with the normalisation of its training:

# %%
plots.picture_grid(*mismatch.looks(settings, dataset, 3), columns=4)

# %% [markdown]
# ## Size and memory

# %%
claims.readable(frame, "size", "memory")

# %% [markdown]
# ## Speed
#
# Milliseconds belong to a card, so the sentences are tested as ratios, at every batch size that was measured.

# %%
claims.readable(frame, "speed", "kernels")

# %% [markdown]
# ## Accuracy and training
#
# A difference of accuracies comes with its interval over pictures. Where the interval reaches across what was
# claimed, the pictures are too few for a verdict.

# %%
claims.readable(frame, "accuracy", "training")

# %%
from vitlib import origin

Markdown(origin.sentence(settings.study))

# %% [markdown]
# ## Sensitivity
#
# Accuracies as such belong to the original's weights. Which blocks matter is asked of this study's network, by the KL
# that comes when one block alone is quantized and by Holm's adjusted p of keeping it. The other ranking, by the KL that
# goes away when a block is kept, holds errors that cancel each other (notebook 3 says how far either repeats itself).

# %%
claims.readable(frame, "sensitivity")

# %% [markdown]
# ## Recommendations

# %%
claims.readable(frame, "recommendation")

# %% [markdown]
# ## The benchmark tables, cell by cell
#
# What was said → what was measured, with a mark: ✓ holds, ✗ does not hold, · cannot be tested here. Rows are named as
# in the records; accuracies stand in percent. First the slides' table:

# %%
claims.grid(frame, "slides table")

# %%
Markdown(claims.reasons(frame, "slides table"))

# %% [markdown]
# Its columns that depend on the card, as ratios to its own baseline:

# %%
claims.grid(frame, "slides table, as ratios")

# %%
Markdown(claims.reasons(frame, "slides table, as ratios"))

# %% [markdown]
# And the table of the original's README:

# %%
claims.grid(frame, "README table")

# %%
Markdown(claims.reasons(frame, "README table"))

# %% [markdown]
# ## What we saw
#
# How many claims of each subject got which verdict:

# %%
plots.table(claims.counts(frame), index=True)

# %%
Markdown(claims.headline(frame))
