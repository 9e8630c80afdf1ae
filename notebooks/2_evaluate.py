# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Evaluation: what do quantization and attention kernels cost, and what do they bring?
#
# A *variant* is one choice of weights, attention and execution; everything else is the same. All of them go through
# one pipeline, and we will see for each
#
# - what was really run, or why it could not run here;
# - accuracy, and how often it agrees with the unquantized baseline;
# - latency and throughput, each measured for itself;
# - size in memory and on disk, and peak memory;
# - where the device time goes, by part of the model.
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
variants: list[str] = [
    "fp32-sdpa",
    "fp16-sdpa",
    "bf16-sdpa",
    "nf4-sdpa",
    "int8-sdpa",
    "nf4-flash_attention_2",
    "int8-flash_attention_2",
]  # rows of the table of variants; the first is the baseline
batch_sizes: list[int] = [1, 8, 32]  # batch sizes for latency and throughput
rounds: int = 20  # all variants are measured once per round, in shuffled order; verdicts on speed need 8
samples: int = 24  # most calls per round and batch size
round_seconds: float = 0.05  # most seconds per round and batch size
cpu_samples: int = 10  # calls at batch size 1 on the CPU, of variants that run there
profile_batch_size: int = 8  # batch size of the profiled call
eval_batch_size: int = 32  # batch size where only the outputs matter
margin: float = 0.02  # fraction of pictures that a non-inferior variant may lose

# %%
from vitlib import params

settings = params.collect(globals())

# %% [markdown]
# ## What runs here
#
# Each variant is loaded from the checkpoint that notebook 1 left, and looked at: which classes its layers really
# have, in which format its weights are, which attention is set. A variant that cannot run on this machine keeps its
# row with the reason; nothing is replaced by something else.

# %%
from vitlib import evaluate, plots, sources

bench = evaluate.prepare(settings, sources.load(settings))
plots.table(evaluate.status_table(bench))

# %% [markdown]
# A *fused* variant is the same network with fewer, larger kernels: one product for query, key and value, the patch
# embedding as a product, residual and norm in one step, and after the last attention only the class token. Its layers
# can be computed in several ways, and which is fastest depends on the number of rows. On a GPU each way is timed when
# the variant is loaded, and one that wins clearly is taken; on a CPU the first is. "fused" is a kernel of this project,
# "library" one of PyTorch's; "all blocks" are the weights of whole blocks, dequantized at once ("by block") or while
# the block before is computed ("ahead"). The whole table is `records/tuning.csv`.

# %%
plots.table(evaluate.tuning(bench, settings), none="no fused variant is in this set")

# %% [markdown]
# ## Where the time goes
#
# Before anything is timed, one pass of each variant is profiled. The profiler lists every kernel (on a CPU: every
# operator) with its time. A kernel belongs to the part of the model that launched it. Converting between number
# formats is a part of its own: it is what quantized variants pay for their small weights.
#
# This is also the gate: a variant whose kernels are not those of its name (another attention, no quantized product,
# no attention at all, time that belongs to no part) is refused here and appears below with the reason.

# %%
from vitlib import benchmark

kernels, device_times = benchmark.device_time(bench, settings)
plots.table(evaluate.readable_device_times(device_times))

# %%
from vitlib.profile import PARTS

plots.device_time_by_part(kernels, PARTS)

# %% [markdown]
# How near is that to what the hardware allows? A part can run no faster than its arithmetic at the peak rate, nor
# than its bytes at the peak bandwidth. Both peaks are measured here, with a large matrix product and a large copy.
# The lines are these ceilings; a point's distance below its line is what is lost. Variants that multiply in 8 bits are
# held against the rate of 8-bit products, where this machine has them. Attention means all of it here, with its four
# linear layers.

# %%
from vitlib import roofline

peak = roofline.ceilings(bench.device)
limits = benchmark.against_the_roofline(bench, settings, kernels, peak)
plots.roofline(limits)

# %% [markdown]
# The same as numbers, with the parts that compute little and move much, for parts that take at least a twentieth of
# their variant's time. A part whose tensors are still in the cache from the part before can pass the copy's bandwidth,
# as the copy goes through memory. Conversions and copies have no floor: an ideal pass has none of them.

# %%
plots.table(benchmark.readable_roofline(limits))

# %% [markdown]
# ## Accuracy
#
# All variants see the same validation pictures, prepared by the checkpoint's own preprocessing. Agreement is the
# share of pictures that get the same class as from the baseline; KL is the mean divergence of the probabilities
# from the baseline's, in nats. It shows a change long before accuracy does.

# %%
logits = evaluate.outputs(bench, settings)
quality = evaluate.accuracy(bench, logits, settings)
evaluate.readable_accuracy(quality)

# %%
from IPython.display import Markdown

from vitlib import origin

Markdown(origin.sentence(settings.study))

# %% [markdown]
# Pictures that one variant gets right and the other wrong decide whether two accuracies differ (McNemar's exact
# test, with Holm's adjustment for the number of rows). *Different* means that a difference was found;
# *non-inferior* that a loss larger than the margin is excluded; *not shown* that these pictures cannot tell.

# %%
plots.accuracy_intervals(quality, settings.margin)

# %% [markdown]
# ## Latency and throughput
#
# Latency is the time of one call, from an idle device to a finished result. Throughput is measured apart, with
# calls queued one behind the other. Variants take turns in shuffled order, and the inputs rotate. A percentile is
# printed only with samples enough for it: 130 for the 95th, 662 for the 99th. The bounds are bootstrap intervals
# over rounds.

# %%
latencies, throughputs, clocks = benchmark.measure(bench, settings)
speeds = benchmark.speed(latencies, throughputs, bench.baseline)
plots.table(benchmark.readable_speed(speeds))

# %% [markdown]
# The same for one picture on this machine's CPU, for the variants that run there.

# %%
cpu = benchmark.cpu_latency(bench, settings)
plots.table(cpu.to_frame(), index=True)

# %% [markdown]
# Can these numbers be believed? The instruments are tried on a call and a tensor of known size, and the comparison
# on this run's own samples: on two halves of the same calls, and on one half made slower by a fiftieth.

# %%
checks = benchmark.validity(bench, settings, latencies, device_times, clocks)
plots.table(checks)

# %%
Markdown(benchmark.unreached(checks))

# %% [markdown]
# ## Memory
#
# Weights as they lie in memory (with the scales that quantization adds), the weight files on disk, and the peak of
# a forward pass: weights plus everything that the pass allocates. *Reserved* is what the allocator holds from a GPU's
# driver for both. A CUDA graph keeps its activations from capture on, and where the weights of whole blocks are
# dequantized at once, the buffers for them are the pass's too. A megabyte is 2²⁰ bytes.

# %%
memories = benchmark.memory(bench, settings)
plots.table(benchmark.readable_memory(memories))

# %% [markdown]
# ## The table of variants
#
# All of it together, one row for each variant and batch size. It is the file `records/variants.csv`.

# %%
measured = {"quality": quality, "speeds": speeds, "memories": memories, "cpu": cpu, "device_times": device_times}
table = evaluate.variants_table(bench, settings, **measured, clocks=clocks)
evaluate.readable(table)

# %% [markdown]
# Up and to the left is better:

# %%
plots.accuracy_against_latency(table, settings.batch_sizes[0])

# %% [markdown]
# Down and to the left is better:

# %%
plots.size_against_memory(table, settings.batch_sizes[-1])

# %% [markdown]
# Higher is better:

# %%
plots.throughput_by_batch(table)

# %% [markdown]
# ## What we saw
#
# Against the baseline, as ratios of what was measured in this one run (above 1 is better):

# %%
ratios = evaluate.compare(table, bench.baseline)
plots.table(ratios, index=True)

# %%
Markdown(evaluate.headline(table, ratios, bench))
