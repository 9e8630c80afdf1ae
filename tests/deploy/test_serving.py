"""The demo's page in a browser, and its answers under load: those of the engines themselves."""

import base64
import dataclasses
import importlib.util
import re
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shots
import torch
from PIL import Image

from vitlib.__main__ import main
from vitlib.deploy import batching, demo, predictor
from vitlib.deploy.demo import Networks
from vitlib.network import checkpoint, engine
from vitlib.pictures import decode, synthetic
from vitlib.pictures.sources import Labels

CPU, VARIANTS = torch.device("cpu"), ("fp32-sdpa", "nf4-sdpa")
HOSTILE = Labels(("1", "2", "3"), ("<img src=x onerror=alert(1)> & ${1}", "same {{name}}", "same {{name}}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pre):
    """Checkpoints whose class names are no HTML, and two of them alike."""
    torch.manual_seed(1)
    made = tmp_path_factory.mktemp("study") / "checkpoints"
    network = checkpoint.new("vit-micro", image_size=32, labels=HOSTILE).eval().half()
    checkpoint.save(network, made / "merged", pre=pre, labels=HOSTILE, provenance={})
    quantized = checkpoint.quantize_checkpoint(made / "merged", "nf4", CPU)
    checkpoint.save(quantized, made / "nf4", pre=pre, labels=HOSTILE, provenance={})
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files of odd sizes: JPEG, 16-bit grey, and turned by EXIF."""
    random, made = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    for number in range(10):
        size = (40 + 9 * number, 60)
        exif = Image.Exif()
        exif[decode.ORIENTATION] = 1 + number % 8
        image = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size)
        image.save(made / f"{number}.jpg", exif=exif)
    grey = np.linspace(0, 65535, 70 * 50).reshape(70, 50).astype(np.uint16)
    Image.fromarray(grey).save(made / "deep.png")
    return sorted(made.iterdir())


def expected(folder: Path, files: list[Path]) -> dict[str, torch.Tensor]:
    """The probabilities (files, classes) that the engines give, a picture at a time."""
    found = {}
    for name in VARIANTS:
        own = engine.load(folder, name, "cpu")
        resize = own.loaded.preprocess.resize
        pixels = torch.stack([resize(decode.open_picture(file, 50.0)) for file in files])
        found[name] = engine.logits(own, pixels, 1).softmax(dim=1)
    return found


def test_200_requests_of_16_clients_get_the_engines_own_answers(folder, pictures, capsys):
    networks, own = Networks(predictor.find(folder), CPU), expected(folder, pictures)
    assert all(probabilities.std(dim=0).min() > 0.01 for probabilities in own.values())  # mixed up, they would differ

    def ask(number: int) -> tuple[float, list]:
        start = time.perf_counter()
        found = networks.classify(pictures[number % len(pictures)], VARIANTS)
        return time.perf_counter() - start, found

    ask(0)  # loads
    with ThreadPoolExecutor(16) as clients:
        took, answers = zip(*clients.map(ask, range(200)), strict=True)
    assert len(answers) == 200
    for k, name in enumerate(VARIANTS):
        given = torch.stack([both[k][1].logits for both in answers]).softmax(dim=1)
        asked = own[name][[number % len(pictures) for number in range(200)]]
        torch.testing.assert_close(given, asked, atol=1e-3, rtol=0)
    sizes = [answer.batch for both in answers for _, answer in both]
    assert 1 < max(sizes) <= batching.LIMIT
    with capsys.disabled():
        p50, p95 = np.quantile(took, (0.5, 0.95)) * 1e3
        print(
            f"[16 clients, 200 requests: P50 {p50:.0f} ms, P95 {p95:.0f} ms, mean batch size {np.mean(sizes):.1f}]",
            end=" ",
        )


def test_the_first_two_variants(folder, checkpoints):
    def first(weights, *named):
        return Networks(weights, CPU, named).first

    both = predictor.find(folder)
    assert first(both) == list(VARIANTS)
    assert first(predictor.find(folder / "merged")) == ["fp32-sdpa", "fp16-sdpa"]
    assert first(predictor.find(checkpoints / "mixed"))[0] == "mixed-sdpa"
    assert first(both, "nf4-direct-fused", "fp16-sdpa") == ["nf4-direct-fused", "fp16-sdpa"]
    rows = {
        "variant": ["nf4-direct-fused", "fp32-sdpa", "fp16-sdpa-graph"],
        "status": "ok",
        "gelu": "checkpoint",
        "batch": 1,
    }
    rows |= {"latency_p50_ms": [1.0, 5.0, 0.5], "peak_memory_mb": 1.0, "logit_kl": 0.0, "difference_low": 0.0}
    rows |= {"peak_vram_mb": float("nan")}
    measured = predictor.Weights(both.folders, pd.DataFrame(rows))
    assert first(measured) == ["fp32-sdpa", "nf4-direct-fused"]
    assert list(Networks(measured, CPU).offered) == ["fp32-sdpa", "nf4-direct-fused"]  # no graph on a CPU


def drop(tab, file: Path) -> None:
    """Drag a file onto the page, as a browser does it."""
    script = """([data, name]) => { const bytes = Uint8Array.from(atob(data), one => one.charCodeAt(0));
    const held = new DataTransfer(); held.items.add(new File([bytes], name, {type: 'image/jpeg'})); return held }"""
    held = tab.evaluate_handle(script, [base64.b64encode(file.read_bytes()).decode(), file.name])
    tab.get_by_text("Drop Image Here").dispatch_event("drop", {"dataTransfer": held})


def test_a_dropped_picture_is_classified_as_the_engines_do(folder, pictures, tmp_path):
    if not any(map(shutil.which, shots.NAMES)):
        pytest.skip("no Chromium here")
    for package in ("playwright", "gradio"):
        pytest.importorskip(package)
    import httpx  # of gradio

    broken, turned = tmp_path / "broken.jpg", pictures[5]
    broken.write_bytes(turned.read_bytes()[:300])
    names, own = [HOSTILE.names[0], "same {{name}} (2)", "same {{name}} (3)"], expected(folder, [turned])
    with demo.serve(Networks(predictor.find(folder), CPU)) as address, shots.browser() as chromium:
        tab, asked, boxes = chromium.new_page(viewport={"width": 390, "height": 900}), [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("dialog", lambda dialog: boxes.append(dialog.message))
        tab.goto(address)
        drop(tab, turned)
        tab.get_by_text("in the network").nth(1).wait_for()
        for side, name in enumerate(VARIANTS):
            chances, ids = own[name][0].sort(descending=True)
            shown = tab.get_by_test_id("label-output-value").nth(side).locator("xpath=..").inner_text()
            lines = [f"{names[k]}\n{chance:.0%}" for k, chance in zip(ids, chances.tolist(), strict=True)]
            assert re.sub(r"\n+", "\n", shown) == "\n".join([names[ids[0]], *lines])
        tab.screenshot(path=tmp_path / "demo.png", full_page=True)
        assert Image.open(tmp_path / "demo.png").width == tab.evaluate("document.documentElement.scrollWidth") == 390
        half = engine.load(folder, "fp16-sdpa", "cpu").loaded.weights_mb
        tab.get_by_label("Variant").first.click()
        tab.get_by_role("option", name="FP16 · SDPA", exact=True).click()
        tab.get_by_text(f"{half:,.1f} MB of weights").wait_for()
        tab.get_by_label("Remove Image").click()
        drop(tab, broken)
        with pytest.raises(decode.BadPicture) as reason:
            decode.open_picture(broken, 50.0)
        tab.get_by_text(f"This picture was not classified: {reason.value}").wait_for()
        assert tab.get_by_text("in the network").count() == 0
        assert sum("queue/join" in url for url in asked) == 4  # one for each step above
        for elsewhere in ("http://127.0.0.1:9/x.jpg", str(turned)):  # is not fetched, and not read
            upload = {"path": elsewhere, "meta": {"_type": "gradio.FileData"}}
            event = httpx.post(f"{address}gradio_api/call/classify", json={"data": [upload, *VARIANTS]}).json()
            said = httpx.get(f"{address}gradio_api/call/classify/{event['event_id']}").text
            assert "event: error" in said and ("not here any more" in said) == elsewhere.startswith("http")
    assert not boxes and all(url.startswith(("data:", "blob:", address)) for url in asked)


def test_examples_are_drawn_or_of_the_data_folder(folder, tmp_path):
    loaded = engine.load(folder, "fp32-sdpa", "cpu").loaded
    assert demo.examples(loaded, tmp_path) == []  # nobody knows what it was trained on
    for split in ("train", "valid"):
        for label in ("1", "2", "3"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            Image.new("RGB", (900, 300), "red").save(tmp_path / "data" / split / label / "a.jpg")
    (tmp_path / "data" / "valid" / "2" / "a.jpg").write_text("not a picture")
    about = {"parameters": {"data_source": str(tmp_path / "data"), "seed": 3}}
    found = demo.examples(dataclasses.replace(loaded, about=about), tmp_path)
    assert [Image.open(file).size for file in found] == [(320, 107)] * 2
    about["parameters"]["data_source"] = "hub:flowers"  # would be a download
    assert demo.examples(dataclasses.replace(loaded, about=about), tmp_path) == []
    classes = synthetic.classes("in the study")[:3]
    drawn = dataclasses.replace(loaded, labels=Labels(*zip(*((one.key, one.name) for one in classes), strict=True)))
    assert [Image.open(file).size for file in demo.examples(drawn, tmp_path)] == [(320, 320)] * demo.EXAMPLES


def test_what_is_wrong_is_said_in_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    start = ["demo", "--checkpoint", str(folder)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        if importlib.util.find_spec("gradio"):
            assert main([*start, "--port", str(port)]) == 1
            assert f"error: cannot listen on 127.0.0.1:{port}: choose another" in capsys.readouterr().err
    assert main([*start, "--variants", "nf4-sdpa", "nf4-spda"]) == 1
    assert "did you mean 'nf4-sdpa'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main([*start, "--host", "0.0.0.0"]) == 1
    warning, error = capsys.readouterr().err.splitlines()
    assert warning == "warning: with --host 0.0.0.0 anyone on the network can use this page"
    assert error == "error: the demo needs the package gradio: pip install 'vitlib[demo]'"
