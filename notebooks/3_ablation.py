# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ablation: blocks sensitive to quantization
#
# Quantizing the whole network changes its outputs a little. Here one part at a time is kept in FP16 while everything
# else is quantized: the more of the change this removes, the more sensitive the part is.

# %% tags=["parameters"]
study: str = "lab"  # results go to outputs/<study>/
data_source: str = "synthetic"  # synthetic, a folder with train/ and valid/, hub:<data set>, or torchvision:<folder>
device: str = "auto"  # auto, cpu, cuda; auto is the GPU if there is one
seed: int = 0  # seed of initialisation, order and augmentation
limit: int = 0  # pictures used of each split, spread over the classes; 0: all
valid_limit: int = 0  # the same for the splits that are not trained on; 0: as limit
pictures_per_class: int = 60  # training pictures per class (synthetic data only)
max_megapixels: float = 50.0  # larger pictures are skipped and reported
workers: int = 2  # threads that decode pictures
image_size: int = 48  # side in pixels of synthetic pictures and of a base that is not loaded
eval_batch_size: int = 32  # batch size where only the outputs matter
ablation_bits: list[int] = [4, 8]  # 4 is NF4, 8 is int8
ablation_pictures: int = 0  # validation pictures used, spread over the classes; 0: all
repair_epochs: int = 0  # epochs of each repair of a 4-bit checkpoint; 0: no repair

# %%
from vitlib import ablation

study = ablation.open(globals())

# %% [markdown] tags=["details"]
# ## How blocks are exchanged
#
# The FP16 network is loaded once. Every block gets a quantized twin, and a configuration chooses between the two. The
# patch embedding is a convolution, which bitsandbytes does not quantize. It is in FP16 in every configuration, so
# "embeddings+classifier" differs from "none" by the classifier only.

# %%
subject = ablation.prepare(study)
print(f"{len(subject.blocks)} blocks, {len(subject.labels)} pictures, on {subject.loaded.device.type}")

# %% [markdown]
# The quantized twin of the first block, in which only the linear layers are replaced:

# %%
ablation.twin(subject, 0, study.settings.ablation_bits[0])

# %% [markdown]
# Configurations that agree up to some block share the evaluation up to it. Configurations that have diverged but reach
# the same block again are batched into one call.

# %%
logits, share = ablation.measure(study, subject)
print(f"{share:.0%} of the block evaluations of a full pass for each configuration were needed")

# %% [markdown] tags=["details"]
# ## Table of all configurations
#
# KL is the mean divergence of the probabilities from those of the FP16 network, with its bootstrap interval over
# pictures. Flips are pictures whose class differs from that of the fully quantized network ("none"). Discordant are
# those that only one of the two classifies correctly; McNemar's exact test asks whether they favour one network by more
# than chance, and Holm's adjustment accounts for the number of configurations.

# %%
from vitlib.report import plots, tables

frame = ablation.table(study, logits, subject)
tables.table(frame, ablation.TABLE)

# %% [markdown]
# ## One block quantized
#
# Where one block is kept in FP16, errors of the others can cancel each other, and a block whose error had cancelled
# others removes less than nothing. The opposite experiment quantizes one block and keeps everything else in FP16, so
# nothing can cancel.

# %%
blocks = ablation.sensitivity(frame)
plots.alone_bars(blocks)

# %% [markdown]
# ## First block, last block and classifier
#
# The error that is left when nothing, the first and the last block, or the classifier is kept in FP16:

# %%
plots.kept_parts(frame, ablation.PARTS)

# %% [markdown]
# ## Other pictures, other networks
#
# Would other pictures rank the blocks in the same order? The pictures are split into random halves, and the rankings of
# the two halves are compared: a rank correlation near 1 is reliable, one near 0 is chance.

# %%
reliable = ablation.reliability(study, logits, subject)
ablation.reliability_in_words(reliable)

# %%
ablation.introduce(study)

# %% [markdown] tags=["details"]
# ## Table of rank correlations
#
# A half in which all blocks tie gives no ranking; such splits are left out and counted. The last two columns are the
# smallest difference of accuracy that could be significant after Holm's adjustment, if all changes were in one
# direction.

# %%
tables.table(reliable, ablation.RELIABILITY)

# %% [markdown] tags=["summary"]
# ## Summary

# %% tags=["summary"]
ablation.headline(study, frame, blocks, reliable)

# %% [markdown] tags=["summary"]
# The share of the error that is removed when one block is kept in FP16:

# %% tags=["summary"]
plots.sensitivity_bars(blocks)
