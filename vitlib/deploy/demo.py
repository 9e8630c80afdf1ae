"""A page in the browser: drop a picture, and two variants classify it side by side."""

from __future__ import annotations

import argparse
import html
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitlib.deploy import predictor
from vitlib.deploy.batching import LIMIT, Answer, Batcher
from vitlib.network import attention, checkpoint
from vitlib.network.checkpoint import Loaded
from vitlib.network.engine import Engine
from vitlib.pictures import decode, sources, synthetic
from vitlib.study import files, params, variants
from vitlib.study.variants import Variant

if TYPE_CHECKING:
    import gradio

HOST, TOP = "127.0.0.1", 5
MEGAPIXELS, MEGABYTES = 50.0, 25  # larger pictures and files are refused
QUEUE, KEPT_MINUTES = 64, 10  # most requests that wait, and how long an uploaded picture is kept
EXAMPLES, SIDE = 8, 320  # pictures shown, and their longest side in pixels
REFUSED = (ValueError, RuntimeError, OSError, ArithmeticError)  # said on the page: of the picture, or of a variant
CSS = """
.gradio-container {width: 100%; max-width: 1200px !important; margin: auto}
.facts {font-size: 0.9rem; line-height: 1.6}
.notice:not(:has(.refused)) {display: none}
.refused {border-left: 4px solid #b91c1c; padding: 0.6rem 1rem; overflow-wrap: anywhere}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m vitlib demo`."""
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FOLDER", help="for instance outputs/demo")
    said = "shown first, such as fp32-sdpa nf4-sdpa (default: FP16 or FP32, and the recommended variant or NF4)"
    parser.add_argument("--variants", nargs=2, default=(), metavar="VARIANT", help=said)
    parser.add_argument("--host", default=HOST, help="address to listen on (default: of this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Show the page until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploaded pictures are deleted then too
    device = checkpoint.pick_device(options.device)
    networks = Networks(predictor.find(options.checkpoint), device, options.variants)
    if options.host != "localhost" and not options.host.startswith("127."):
        print(f"warning: with --host {options.host} anyone on the network can use this page", file=sys.stderr)
    try:
        with serve(networks, options.host, options.port) as address:
            print(f"Drop a picture at {address} (stop with Ctrl-C)", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        return 0


@contextmanager
def serve(networks: Networks, host: str = HOST, port: int | None = None) -> Iterator[str]:
    """The page in threads of its own, with its first variants prepared; gives its address. None: the first free port.

    ImportError without Gradio, the errors of `checkpoint.load_folder`, OSError where `port` of `host` is not free.
    """
    with tempfile.TemporaryDirectory(prefix="vitlib-demo-") as folder:
        # Before Gradio is imported. Its own folder of uploads is readable for other users, and stays.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder)
        try:
            import gradio
        except ImportError:
            raise ImportError("the demo needs the package gradio: pip install 'vitlib[demo]'") from None
        loaded = [running.engine.result().loaded for running in list(map(networks.ready, networks.first))]
        shown = page(networks, loaded[0], examples(loaded[0], Path(folder)))
        shown.queue(max_size=QUEUE, default_concurrency_limit=2 * LIMIT)
        private = {"share": False, "mcp_server": False, "ssr_mode": False, "enable_monitoring": False}
        private |= {"run_history": False, "footer_links": [], "quiet": True, "max_file_size": MEGABYTES * 2**20}
        look = {"css": CSS, "theme": gradio.themes.Default(primary_hue="blue")}
        try:
            shown.launch(server_name=host, server_port=port, prevent_thread_lock=True, **private, **look)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: choose another --port or --host") from error
        try:
            yield shown.local_url
        finally:
            shown.close(verbose=False)


def page(networks: Networks, loaded: Loaded, pictures: list[str]) -> gradio.Blocks:
    """The page: a picture, its examples, and two variants with what they answer."""
    import gradio

    def answer(upload: dict[str, Any] | None, *names: str) -> list[object]:
        nothing = [None, ""] * len(names)
        try:
            found = networks.classify(Path(upload["path"]), names) if upload and upload["path"] else []
        except REFUSED as error:
            said = f"<b>This picture was not classified</b>: {html.escape(files.first_line(error))}"
            return [f'<div class="refused" role="alert">{said}</div>', *nothing]
        return ["", *(part for one in found for part in in_words(*one))] if found else ["", *nothing]

    choices = [(variant.label, name) for name, variant in networks.offered.items()]
    kept = f"Pictures stay on the computer that serves this page and are deleted after {KEPT_MINUTES} minutes."
    with gradio.Blocks(title="vitlib", analytics_enabled=False, delete_cache=(60, 60 * KEPT_MINUTES)) as shown:
        gradio.Markdown(f"# One picture, two variants\n{predictor.drawn_only(loaded)}\n\n{kept}")
        with gradio.Row():
            with gradio.Column(scale=4, min_width=300):
                picture = gradio.Image(label="Picture", sources=["upload", "clipboard"], buttons=[], height=320)
                notice = gradio.HTML(elem_classes="notice")
                if pictures:
                    gradio.Examples(pictures, picture, label="Examples")
            chosen, results = [], []
            for name in networks.first:
                with gradio.Column(scale=3, min_width=260):
                    chosen.append(gradio.Dropdown(choices, value=name, label="Variant"))
                    results += [gradio.Label(label="Names and probabilities"), gradio.HTML(elem_classes="facts")]
        events = [picture.change, *(dropdown.change for dropdown in chosen)]
        how = {"trigger_mode": "always_last", "api_name": "classify"}
        how["preprocess"] = False  # Gradio's own would read the picture in another way than notebook 4
        gradio.on(events, answer, [picture, *chosen], [notice, *results], **how)
    move = picture.async_move_resource_to_block_cache

    async def uploaded(file: str) -> str:
        if not os.path.isfile(file):  # deleted since, or an address, which Gradio would fetch into memory
            raise gradio.Error("this picture is not here any more: drop it again", print_exception=False)
        return await move(file)

    picture.async_move_resource_to_block_cache = uploaded
    return shown


def in_words(loaded: Loaded, answer: Answer) -> tuple[dict[str, float], str]:
    """The probabilities of the top 5 by name, and what the answer took, in HTML."""
    names, folders = loaded.labels.names, loaded.labels.folders
    best = answer.logits.softmax(dim=0).topk(min(TOP, len(names)))
    # Classes may share a name.
    known = (names[k] if names.count(names[k]) == 1 else f"{names[k]} ({folders[k]})" for k in best.indices.tolist())
    device = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else "CPU"
    return dict(zip(known, best.values.tolist(), strict=True)), (
        f"<b>{float(f'{answer.ms:.3g}'):,g} ms</b> in the network, batch size {answer.batch}<br>"
        f"<b>{loaded.weights_mb:,.1f} MB</b> of weights<br>on {html.escape(device)}"
    )


class Networks:
    """The variants of some weights that can run on `device`, each loaded when it is first asked for.

    `offered` are those that were measured, or all where these are too few. `first` are those of `named`; without them
    FP16 or FP32 out of the box and the recommended one, or others where these are the same or missing.
    """

    def __init__(self, weights: predictor.Weights, device: torch.device, named: Sequence[str] = ()) -> None:
        self._weights, self.device, wanted = weights, device, list(map(variants.find, named))
        can = [one for one in variants.VARIANTS.values() if one.checkpoint in weights.folders]
        can = [one for one in can if not attention.not_runnable(one, device)]
        measured = [one for one in can if one.name in set(weights.measured["variant"])]
        self.offered = {one.name: one for one in [*(measured if len(measured) > 1 else can), *wanted]}
        plain, best = "fp16" if device.type == "cuda" else "fp32", predictor.choose(weights, "auto", device, 1)[0]
        usual = dict.fromkeys([Variant(plain).name, best.name, "nf4-sdpa", "fp16-sdpa", *self.offered])
        self.first = list(named) or [name for name in usual if name in self.offered][:2]
        self._running: dict[str, Batcher] = {}
        self._lock = threading.Lock()

    def ready(self, name: str) -> Batcher:
        """The batcher of a variant, which may still be loading. KeyError for one that is not offered."""
        with self._lock:
            found = self._running.get(name)
            if found is None or (found.engine.done() and found.engine.exception()):  # memory may be free by now
                found = self._running[name] = Batcher(partial(self._load, self.offered[name]), QUEUE)
        return found

    def _load(self, variant: Variant) -> Engine:
        checkpoint.quiet_libraries()
        loaded = checkpoint.load_folder(self._weights.folder(variant), variant, self.device)
        return Engine(loaded, variant.execution, (1, LIMIT))

    def classify(self, file: Path, names: Sequence[str]) -> list[tuple[Loaded, Answer]]:
        """What each variant of `names` says of a picture file.

        BadPicture with the reason where it is skipped, and the errors of `checkpoint.load_folder` and `Batcher.submit`.
        """
        running = {name: self.ready(name) for name in names}
        loaded = {name: batcher.engine.result().loaded for name, batcher in running.items()}
        with decode.MEMORY.shared():
            image = decode.open_picture(file, MEGAPIXELS)
            pixels = {name: one.preprocess.resize(image) for name, one in loaded.items()}
            image.close()  # its pixels must be free when its share of the memory is
        waiting = {name: batcher.submit(pixels[name]) for name, batcher in running.items()}
        return [(loaded[name], waiting[name].result()) for name in names]


def examples(loaded: Loaded, folder: Path) -> list[str]:
    """PNG files in `folder` of pictures to try the network with; none where none are at hand.

    Drawn flowers where it knows these, else pictures of the test or validation split of its data folder.
    """
    drawn = {flower.key for flower in synthetic.classes("in the study")}
    try:
        about = {} if drawn.issuperset(loaded.labels.folders) else loaded.about["parameters"]
        settings = params.check({**about, "image_size": SIDE, "valid_limit": EXAMPLES})
        if settings.data_source.startswith(("hub:", "torchvision:")):  # nothing is downloaded
            return []
        splits = sources.load(settings).splits
    except (KeyError, params.ParameterError, sources.DataError):
        return []
    made = []
    for number, picture in enumerate(splits.get("test") or splits["valid"]):
        with suppress(decode.BadPicture):
            image = picture.open()
            image.thumbnail((SIDE, SIDE))
            image.save(folder / f"{number}.png")
            made.append(str(folder / f"{number}.png"))
    return made
