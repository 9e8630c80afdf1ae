# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inference: what is in these pictures?
#
# A folder of pictures goes in, flat or in class folders; names and probabilities come out. We will see
#
# - which variant is used, and that it is the one asked for;
# - a prediction for every file, or the reason why there is none;
# - how many images a second pass from file to answer;
# - the accuracy, where the folders say what is right.
#
# *Installing: `make setup` on your own machine. In Colab, clone the project, run `%cd` to its folder and `%pip install
# -q -e .` in a cell above this one, then restart the runtime. Every setting below can be changed in place.*

# %% tags=["parameters"]
study: str = "demo"  # results go to outputs/<study>/
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
decoder: str = "pil"  # pil, nvjpeg, auto; auto is nvJPEG on the GPU where it works; its pixels differ slightly
grid: int = 12  # pictures shown

# %%
from vitlib import params

settings = params.collect(globals())

# %% [markdown]
# ## The network
#
# `auto` takes the NF4 weights with the attention that notebook 2 measured to be fastest for them, of those that this
# machine can run, eagerly: preparing a fused network takes longer than it saves on a few thousand pictures. For more,
# set `variant` to a fused one. Preprocessing and class names come with the checkpoint.

# %%
from vitlib import inference, plots

predictor = inference.load(settings)
plots.table(predictor.describe())

# %% [markdown]
# ## The pictures
#
# Without a folder of your own this is the test split, or the validation split where there is no test.

# %%
pictures_found, skipped = inference.find_pictures(settings)
print(f"{len(pictures_found)} pictures, {len(skipped)} other files")

# %% [markdown]
# ## Predictions
#
# The record has one row for each file, also for what could not be read, with the five best names and their
# probabilities. Pictures are decoded while the network works on those before them.

# %%
frame, passed, rate = inference.predict(predictor, pictures_found, skipped, settings)
plots.table(inference.readable(frame))

# %%
from IPython.display import Markdown

Markdown(inference.caption(frame))

# %% [markdown]
# Some of them to look at. Where the right answer is known, the title is green for a right and red for a wrong
# prediction.

# %%
plots.picture_grid(*inference.examples(frame, passed, settings.grid), right=inference.marks(frame, settings.grid))

# %% [markdown]
# ## What we saw

# %%
Markdown(inference.headline(frame, predictor, rate, passed.note))
