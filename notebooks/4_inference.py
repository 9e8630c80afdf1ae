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
# A folder of pictures goes in, flat or in class folders; the record has five names with probabilities for every file,
# or the reason why there are none. Where the folders say what is right, the accuracy is reported too.

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
pictures: str = ""  # folder of pictures, flat or in class folders; empty: the test split
checkpoints_of: str = ""  # study whose checkpoints are used; empty: this one
variant: str = "auto"  # a row of the table; auto: the fastest that notebook 2 measured and that runs here
decoder: str = "pil"  # pil, nvjpeg, auto: auto takes the GPU's (nvjpeg) where it works; its pixels differ a little
grid: int = 12  # pictures shown

# %%
from vitlib import inference

study = inference.open(globals())

# %% [markdown]
# ## The network
#
# `auto` takes the fastest variant that notebook 2 measured and that this machine can run. Preprocessing and class
# names come with the checkpoint. For pictures of your own set `study` to a new name and `checkpoints_of` to the study
# whose network is used: a study's page and its predictions belong together.

# %%
from vitlib import plots, tables

predictor = inference.load(study)
tables.table(predictor.describe())

# %%
predictor.reason()

# %% [markdown]
# ## The pictures
#
# Without a folder of your own this is the test split, or the validation split where there is no test. A file that is
# no picture is found when it is read, so it is among the files here and among the skipped ones below.

# %%
found, skipped = inference.find_pictures(study)
print(f"{len(found)} files to read, {len(skipped)} skipped without reading")

# %% [markdown]
# ## Predictions
#
# Pictures are decoded while the network works on the batch before.

# %%
frame, passed, rate = inference.predict(study, predictor, found, skipped)
plots.picture_grid(
    *inference.examples(frame, passed, study.settings.grid), right=inference.marks(frame, study.settings.grid)
)

# %% [markdown]
# Where the class is known, the title is green for a right and red for a wrong prediction. The table shows a sample of
# the files with the three best names; all of them, with five names, are in `records/predictions.csv`.

# %%
tables.table(inference.sample(frame), inference.PREDICTIONS)

# %% [markdown]
# One call of the network by hand: a picture as a tensor goes in, a logit for each class comes out.

# %%
[predictor.engine(inference.tensor_of(predictor, picture)).shape for picture in passed.pictures[:1]]

# %% [markdown]
# ## Summary

# %% tags=["summary"]
inference.headline(frame, predictor, rate, passed.note)
