# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inference: a folder of pictures and their predicted classes
#
# The input is a folder of pictures, flat or with a folder for each class; without one, it is the test split of the
# study, or its validation split. The result is a record with the five most probable classes of every file, or the
# reason why it was skipped.
#
# For your own pictures, first change `study` (a new name), `pictures` (the folder) and `checkpoints_of` (the study
# whose weights are used).

# %% tags=["parameters"]
study: str = "lab"  # results go to outputs/<study>/
data_source: str = "synthetic"  # synthetic, a folder with train/ and valid/, hub:<data set>, or torchvision:<folder>
pictures: str = ""  # folder of pictures, flat or in class folders; empty: the test split
checkpoints_of: str = ""  # study whose checkpoints are used; empty: this one
variant: str = "auto"  # name of a variant; auto is the best measured within the limits
grid: int = 12  # pictures shown
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
margin: float = 0.02  # fraction of pictures that a non-inferior variant may lose
memory_limit_mb: float = 0.0  # most memory of a call, weights included, in MB; 0: no limit
latency_limit_ms: float = 0.0  # highest latency of a call in ms; 0: no limit
decoder: str = "pil"  # pil, nvjpeg, auto; auto is nvJPEG on the GPU where it works; its pixels differ slightly

# %%
from vitlib import inference

study = inference.open(globals())

# %% [markdown]
# The network comes with its preprocessing and class names. The next pictures are decoded while it classifies the
# current batch.

# %%
from vitlib.report import plots, tables

predictor = inference.load(study)
found, skipped = inference.find_pictures(study)
frame, passed, rate = inference.predict(study, predictor, found, skipped)
missed, wrong = inference.mistakes(frame, passed, predictor)
parted, different = inference.disagreement(study, predictor, study.settings.grid)

# %% [markdown]
# ## The most confident mistakes
#
# The wrong predictions with the highest probability. Beside each is a picture of the predicted class that the network
# classifies correctly, if every such class has one.

# %%
missed

# %%
plots.picture_grid(**wrong)

# %% [markdown]
# ## Where NF4 and FP32 disagree
#
# Pictures whose class changes when the weights are quantized to four bits, from the outputs that notebook 2 recorded
# for the validation pictures. Those that one format classifies correctly come first: a green caption means that NF4
# does, a red one that FP32 does.

# %%
parted

# %%
plots.picture_grid(**different)

# %% [markdown]
# ## The variant to deploy
#
# Of the variants that notebook 2 measured and that run here, within the limits of memory, latency and accuracy: the
# one that needs the least memory of those as fast as the fastest.

# %%
advice = inference.recommendation(study, predictor)
advice

# %% [markdown] tags=["details"]
# ## The network
#
# `auto` takes the variant to deploy.

# %%
tables.table(predictor.describe())

# %%
inference.reason(predictor)

# %% [markdown]
# Its output is a tensor with a row for each picture and a logit for each class:

# %%
passed.logits.shape, passed.logits[:1, :5]

# %% [markdown] tags=["details"]
# ## Predictions by file
#
# A sample with the three most probable classes. The record has all files, with five classes each.

# %%
tables.table(inference.sample(frame), inference.PREDICTIONS)

# %% [markdown] tags=["details"]
# ## Files that were skipped
#
# Hidden and empty files are not opened. Others turn out to be no picture, or damaged, when they are read.

# %%
tables.table(frame[frame["status"] == "skipped"], inference.FAULTS, none="every file could be used")

# %% [markdown] tags=["summary"]
# ## Summary

# %% tags=["summary"]
inference.headline(study, frame, predictor, rate, [missed, parted, advice], passed.note)

# %% tags=["summary"]
plots.picture_grid(**inference.grid(frame, passed, study.settings.grid))
