# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inference: classify a folder of pictures
#
# The input is a folder of pictures, flat or with a folder for each class. The result is a record with the five most
# probable classes of every file, or the reason why it was skipped. If the folders name the classes, the accuracy is
# reported too.

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
pictures: str = ""  # folder of pictures, flat or in class folders; empty: the test split
variant: str = "auto"  # name of a variant; auto is the fastest that this study measured
checkpoints_of: str = ""  # study whose checkpoints are used; empty: this one
decoder: str = "pil"  # pil, nvjpeg, auto; auto is nvJPEG on the GPU where it works; its pixels differ slightly
grid: int = 12  # pictures shown

# %%
from vitlib import inference

study = inference.open(globals())

# %% [markdown]
# ## The network
#
# `auto` takes the fastest variant that notebook 2 measured and that runs on this machine. Preprocessing and class names
# come with the checkpoint. For your own pictures, set `study` to a new name and `checkpoints_of` to the study whose
# checkpoints are used, so that the page of that study keeps its predictions.

# %%
from vitlib.report import plots, tables

predictor = inference.load(study)
tables.table(predictor.describe())

# %%
predictor.reason()

# %% [markdown]
# ## The pictures
#
# Without a folder of your own, these are the pictures of the test split, or of the validation split if there is no test
# split. Files that are clearly not pictures are skipped here; damaged ones are found when they are read.

# %%
found, skipped = inference.find_pictures(study)
print(f"{len(found)} files to read, {len(skipped)} skipped without reading")

# %% [markdown]
# ## Predictions
#
# The next pictures are decoded while the network classifies the current batch.

# %%
frame, passed, rate = inference.predict(study, predictor, found, skipped)
plots.picture_grid(**inference.grid(frame, passed, study.settings.grid))

# %% [markdown]
# Where the class is known, the title is green for a right and red for a wrong prediction. The network's output is a
# tensor with a row for each picture and a logit for each class:

# %%
passed.logits.shape, passed.logits[:1, :5]

# %% [markdown]
# A sample of the files with their three most probable classes. All files, with five classes each, are in
# `records/predictions.csv`.

# %%
tables.table(inference.sample(frame), inference.PREDICTIONS)

# %% [markdown] tags=["summary"]
# ## Summary

# %% tags=["summary"]
inference.headline(frame, predictor, rate, passed.note)
