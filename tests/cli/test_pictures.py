"""`predict`, `visualize`, `info` and `demo`: results, and errors of one line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file

from ailurus_hf import (
    AiluRusForImageClassification,
    AiluRusForSemanticSegmentation,
    AiluRusImageProcessor,
    AiluRusModel,
    AiluRusSegformerBackbone,
    AiluRusSegformerForSemanticSegmentation,
)
from ailurus_hf.cli.app import main
from ailurus_hf.demo.scenes import CLASS_NAMES
from tests.factories import tiny_model, tiny_segformer

PIXELS = np.random.default_rng(0).integers(0, 256, (44, 70, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A scratch folder with a model and two pictures."""
    monkeypatch.chdir(tmp_path)
    tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.5, window_size=32, window_stride=16).save_pretrained(
        "model"
    )
    AiluRusImageProcessor().save_pretrained("model")
    Path("pictures").mkdir()
    Image.fromarray(PIXELS).save("pictures/first.png")
    Image.fromarray(PIXELS[::-1, :40]).save("pictures/second.jpg")
    return tmp_path


def run(capfd, *arguments):
    code = main(list(arguments))
    printed = capfd.readouterr()
    return code, printed.out, printed.err


def refused(capfd, *arguments):
    """Run, check that it fails with one line and writes nothing, and return the line."""
    before = sorted(Path.cwd().rglob("*"))
    code, out, err = run(capfd, *arguments)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert line.startswith("ailurus-hf: error: ")
    assert sorted(Path.cwd().rglob("*")) == before
    return line


# -------------------------------------------------------------------------------------------------------------- predict


def test_predict_writes_three_files_per_picture(capfd):
    code, out, err = run(capfd, "predict", "pictures", "--model", "model", "--keep-ratio", "0.25", "--out", "a/b")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("pictures/first.png: ")
    assert out.splitlines()[-1] == "written to a/b: 2 x .labels.png, .overlay.png, .json"
    names = [f"{stem}.{end}" for stem in ("first", "second") for end in ("json", "labels.png", "overlay.png")]
    assert sorted(path.name for path in Path("a/b").iterdir()) == names
    model = AiluRusForSemanticSegmentation.from_pretrained("model", keep_ratio=0.25)
    with torch.no_grad():
        output = model(AiluRusImageProcessor()(PIXELS, return_tensors="pt")["pixel_values"])
    expected = output.logits[0].argmax(0).numpy()
    with Image.open("a/b/first.labels.png") as labels, Image.open("a/b/first.overlay.png") as overlay:
        np.testing.assert_array_equal(np.asarray(labels), expected)
        assert overlay.size == labels.size == (70, 44)
    report = json.loads(Path("a/b/first.json").read_text())
    assert {key: report[key] for key in ("height", "width", "patches", "tokens")} == {
        "height": 44, "width": 70, "patches": 54, "tokens": 14,
    }  # fmt: skip
    shares = {entry["id"]: entry["share"] for entry in report["classes"]}
    assert shares == pytest.approx({int(c): (expected == c).mean() for c in np.unique(expected)}, abs=1e-6)
    assert all(entry["name"] == f"LABEL_{entry['id']}" for entry in report["classes"])


def test_predict_prints_json_and_replaces_older_results(capfd):
    arguments = ("predict", "pictures/second.jpg", "--model", "model", "--dtype", "bfloat16", "--json")
    _, first, _ = run(capfd, *arguments)
    code, second, _ = run(capfd, *arguments)
    assert code == 0
    assert first == second
    [report] = json.loads(second)
    assert report == json.loads(Path("predictions/second.json").read_text())


def test_predict_by_sliding_windows(capfd):
    code, out, _ = run(capfd, "predict", "pictures/first.png", "--model", "model", "--sliding-window", "--json")
    assert code == 0
    assert json.loads(out)[0]["tokens"] is None


def odd_files(folder):
    """One picture among files of picture's names that are none, or too small."""
    folder = Path(folder)
    folder.mkdir()
    Image.fromarray(PIXELS).save(folder / "a.png")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to("gone.png")
    os.mkfifo(folder / "pipe.png")
    Image.fromarray(PIXELS[:5, :5]).save(folder / "small.png")
    (folder / "text.png").write_text("no picture")
    for litter in ("._a.png", "Thumbs.db"):
        (folder / litter).write_bytes(b"litter")
    return [folder / f"{name}.png" for name in ("folder", "link", "pipe", "small", "text")]


def test_predict_names_and_skips_what_cannot_be_read(capfd):
    odd = odd_files("odd")
    for file in odd:
        assert str(file) in refused(capfd, "predict", str(file), "--model", "model")
    code, out, err = run(capfd, "predict", "odd", "--model", "model", "--skip-unreadable")
    assert code == 0
    assert out.splitlines()[-1] == "written to predictions: 1 x .labels.png, .overlay.png, .json"
    assert [str(file) in line for file, line in zip(odd, err.splitlines(), strict=True)] == [True] * len(odd)
    assert all(line.startswith("ailurus-hf: warning: skipped: ") for line in err.splitlines())
    assert run(capfd, "predict", "odd/a.png", "odd/Thumbs.db", "--model", "model")[0] == 0
    message = refused(capfd, "predict", *map(str, odd[1:]), "--model", "model", "--skip-unreadable", "--out", "other")
    assert "none of the 4 pictures could be read; the first: odd/link.png is a link to gone.png" in message


def test_evaluate_skips_what_predict_skips(capfd):
    odd = odd_files("odd")
    Path("labels").mkdir()
    for name, size in (("a", (70, 44)), ("small", (5, 5)), ("text", (1, 1))):
        Image.new("L", size).save(f"labels/{name}.png")
    arguments = ("evaluate", "--model", "model", "--images", "odd", "--labels", "labels", "--keep-ratio", "1", "--json")
    code, out, _ = run(capfd, *arguments, "--skip-unreadable")
    assert code == 0
    report = json.loads(out)
    assert report["pictures"] == 1
    assert [file.name in line for file, line in zip(odd, report["skipped"], strict=True)] == [True] * len(odd)


def test_predict_goes_on_where_it_was_interrupted(capfd, monkeypatch):
    arguments = ("predict", "pictures", "--model", "model", "--json")
    _, whole, _ = run(capfd, *arguments, "--out", "whole")
    _, first, _ = run(capfd, *arguments[:1], "pictures/first.png", *arguments[2:])
    # a picture is done when its last file is there
    Path("predictions/second.labels.png").write_bytes(Path("predictions/first.labels.png").read_bytes())
    written = {path: path.stat().st_mtime_ns for path in Path("predictions").glob("first.*")}
    code, out, _ = run(capfd, *arguments, "--resume")
    assert code == 0
    assert json.loads(out) == json.loads(whole)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert Path("predictions/second.labels.png").read_bytes() == Path("whole/second.labels.png").read_bytes()
    _, out, _ = run(capfd, *arguments[:-1], "--resume")
    assert out.splitlines()[-1] == "written to predictions: 2 x .labels.png, .overlay.png, .json (2 of them before)"
    assert json.loads(first)[0] == json.loads(whole)[0]


def test_predict_in_folders_below(capfd):
    for folder in ("pictures/a", "pictures/b/c"):
        Path(folder).mkdir(parents=True)
        Image.fromarray(PIXELS).save(f"{folder}/first.png")
    arguments = ("predict", "pictures", "--model", "model", "--recursive", "--out", "pictures/out")
    for _ in range(2):  # results among the pictures are no pictures
        assert run(capfd, *arguments)[0] == 0
        found = {str(path.relative_to("pictures/out")) for path in Path("pictures/out").rglob("*.json")}
        assert found == {"first.json", "second.json", "a/first.json", "b/c/first.json"}
    assert "2 pictures would all be written as first.*" in refused(
        capfd, "predict", "pictures", "pictures/a", "--model", "model"
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({0: "a", 1: "b", 7: "c", 8: "d", 9: "e"}, ["a", "b", "LABEL_2", "LABEL_3", "LABEL_4"]),
        ({"0": "a", "1": "a", "2": "c", "3": "d", "4": "e"}, ["a (0)", "a (1)", "c", "d", "e"]),
    ],
)
def test_classes_without_names_of_their_own(capfd, names, expected):
    config = json.loads(Path("model/config.json").read_text())
    config["id2label"] = names
    config.pop("label2id", None)
    Path("model/config.json").write_text(json.dumps(config))
    code, out, err = run(capfd, "predict", "pictures/first.png", "--model", "model", "--json")
    assert (code, err) == (0, "")
    assert all(entry["name"] == expected[entry["id"]] for entry in json.loads(out)[0]["classes"])
    Path("labels").mkdir()
    for name, size in (("first", (70, 44)), ("second", (40, 44))):
        Image.new("L", size).save(f"labels/{name}.png")
    arguments = ("--images", "pictures", "--labels", "labels", "--model", "model", "--json")
    code, out, _ = run(capfd, "evaluate", *arguments)
    assert code == 0
    assert list(json.loads(out)["budgets"][0]["iou"]) == expected
    assert run(capfd, "visualize", "pictures/first.png", "--model", "model")[0] == 0


def test_predict_warns_without_an_image_processor(capfd):
    Path("model/preprocessor_config.json").unlink()
    code, _, err = run(capfd, "predict", "pictures/first.png", "--model", "model")
    assert code == 0
    assert err == "ailurus-hf: warning: model has no preprocessor_config.json; using the default settings\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pictures", "--keep-ratio", "0"], "'keep_ratio': ValueError: must be above 0 and at most 1, got 0"),
        (["pictures", "--keep-ratio", "nan"], "must be above 0 and at most 1, got nan"),
        (["pictures", "--keep-ratio", "1.5"], "must be above 0 and at most 1, got 1.5"),
        (["pictures", "--keep-ratio", "many"], "Invalid value for '--keep-ratio'"),
        (["pictures", "--cluster-layer", "4"], "it must be at most 3, got 4"),
        (["pictures", "--cluster-layer", "-1"], "must be at least 0, got -1"),
        (["pictures", "--dtype", "int8"], "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        (["pictures", "--device", "abacus"], "--device abacus is not available here"),
        (["nowhere.png"], "nowhere.png does not exist"),
        (["empty"], "empty holds no pictures"),
        (["pictures", "twin"], "2 pictures would all be written as first.*: pictures/first.png, twin/first.jpg"),
        (["pictures", "--out", "pictures/first.png"], "pictures/first.png is a file"),
        (["pictures", "--out", "pictures/first.png/below"], "pictures/first.png is a file"),
        (["pictures", "--out", "locked/out"], "the folder"),
        (["broken/empty.png"], "broken/empty.png is empty"),
        (["broken/Thumbs.db"], "there are no pictures among the files"),
        (["broken/text.png"], "broken/text.png is not a picture"),
        (["broken/cut.png"], "broken/cut.png is damaged or cut short"),
        (["broken/animated.gif"], "broken/animated.gif is animated (3 frames)"),
        (["broken/small.png"], "pixel_values must be at least one patch of 8 x 8 pixels, got height and width (5, 5)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_predict_refuses(capfd, monkeypatch, arguments, message):
    for folder in ("empty", "twin", "broken", "locked"):
        Path(folder).mkdir()
    picture = Image.fromarray(PIXELS)
    picture.save("twin/first.jpg")
    picture.save("broken/cut.png")
    Path("broken/cut.png").write_bytes(Path("broken/cut.png").read_bytes()[:300])
    Path("broken/empty.png").write_bytes(b"")
    Path("broken/text.png").write_text("hello")
    Path("broken/Thumbs.db").write_text("hello")
    picture.resize((5, 5)).save("broken/small.png")
    picture.save("broken/animated.gif", save_all=True, append_images=[picture.rotate(90), picture.rotate(180)])
    may_access = os.access  # root may write anywhere, so a read-only folder is simulated
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and may_access(path, mode))
    assert message in refused(capfd, "predict", *arguments, "--model", "model")


@pytest.mark.parametrize("picture", ["cmyk.tif", "palette.png", "grey16.png", "alpha.png"])
def test_predict_takes_unusual_pictures(capfd, picture):
    image = Image.fromarray(PIXELS)
    {
        "cmyk.tif": image.convert("CMYK"),
        "palette.png": image.convert("P"),
        "grey16.png": Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257),
        "alpha.png": image.convert("RGBA"),
    }[picture].save(picture)
    assert run(capfd, "predict", picture, "--model", "model")[0] == 0


def test_faulty_checkpoints_are_refused(capfd):
    def predict():
        return refused(capfd, "predict", "pictures", "--model", "model")

    assert "nowhere does not exist" in refused(capfd, "predict", "pictures", "--model", str(Path("nowhere").absolute()))
    weights, config = Path("model/model.safetensors"), Path("model/config.json")
    good = weights.read_bytes()
    tensors = load(good)  # from memory: a mapped file must not be cut while it is in use
    weights.write_bytes(good[: len(good) // 2])
    assert "model.safetensors is damaged or cut short" in predict()
    key = "ailurus.layernorm.weight"
    for change, message in (
        ({key: None}, f"missing from the checkpoint model: {key}"),
        ({"surplus": torch.zeros(1)}, "unexpected in the checkpoint model: surplus"),
        ({key: torch.zeros(31)}, f"of the wrong shape in the checkpoint model: {key}"),
    ):
        changed = {name: value for name, value in (tensors | change).items() if value is not None}
        save_file(changed, weights, metadata={"format": "pt"})
        assert message in predict()
    config.unlink()
    assert "model holds no config.json" in predict()


def test_interrupted_prediction_leaves_whole_files_only(capfd, monkeypatch):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    code, _, err = run(capfd, "predict", "pictures", "--model", "model", "--out", "results")
    assert code == 130
    assert err == "ailurus-hf: interrupted; nothing half-written was left behind\n"
    assert not Path("results").exists()


# --------------------------------------------------------------------------------------------- visualize, info and demo


def test_visualize_writes_a_figure(capfd):
    arguments = ("visualize", "pictures/first.png", "--model", "model", "--keep-ratio", "0.25", "--out", "new/f.png")
    code, out, _ = run(capfd, *arguments)
    assert code == 0
    assert out.splitlines()[0].startswith("14 of 54 tokens, ")
    with Image.open("new/f.png") as figure:
        assert figure.size[0] > 500


def test_methods_one_word_away(capfd):
    picture, labels = ("pictures/first.png", "--model", "model", "--grouping"), []
    for grouping in ("region_merging", "density_peaks"):
        assert run(capfd, "visualize", *picture, grouping, "--out", f"{grouping}.png")[0] == 0
        assert run(capfd, "predict", *picture, grouping, "--out", grouping)[0] == 0
        with Image.open(f"{grouping}/first.labels.png") as image:
            labels.append(np.asarray(image))
    assert (labels[0] != labels[1]).any()
    assert "must be one of" in refused(capfd, "predict", *picture, "best")


def test_visualize_refuses_other_formats(capfd):
    line = refused(capfd, "visualize", "pictures/first.png", "--model", "model", "--out", "f.txt")
    assert "--out must end in .png, .pdf or .svg, got f.txt" in line


def test_info_counts_tokens_and_cost(capfd):
    code, out, _ = run(capfd, "info", "model", "--height", "64", "--width", "100", "--keep-ratio", "0.25", "--json")
    assert code == 0
    report = json.loads(out)
    cost = report["one image of 64 x 100 pixels"]
    assert cost["tokens"] == "8 x 13 = 104"
    assert cost["tokens after merging"] == 26
    assert cost["GFLOPs dense"] >= cost["GFLOPs merged"]
    assert report["merging"]["keep_ratio"] == 0.25
    assert report["architecture"]["layers"] == 4
    code, text, _ = run(capfd, "info", "model")
    assert code == 0
    assert "one image of 48 x 48 pixels" in text


def test_info_refuses_images_below_a_patch(capfd):
    line = refused(capfd, "info", "model", "--height", "5")
    assert "pixel_values must be at least one patch of 8 x 8 pixels, got height and width (5, 48)" in line
    assert "Invalid value for '--width'" in refused(capfd, "info", "model", "--width", "0")


def test_an_exact_count_in_the_checkpoint_yields_to_keep_ratio(capfd):
    tiny_model(AiluRusForSemanticSegmentation, num_clusters=7).save_pretrained("counted")
    for options, count in (([], 7), (["--keep-ratio", "0.5"], 18)):
        _, out, _ = run(capfd, "info", "counted", "--json", *options)
        assert json.loads(out)["one image of 48 x 48 pixels"]["tokens after merging"] == count


def test_demo_compares_dense_and_merged(capfd):
    code, out, err = run(capfd, "demo", "--out", "shown", "--rounds", "1", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["figure"] == "shown/adaptive_resolution.png"
    assert Path(report["figure"]).exists()
    dense, merged = report["variants"]
    assert (dense["tokens"], merged["tokens"]) == (2048, 512)
    assert dense["agreement"] == 1
    assert merged["agreement"] > 0.85
    assert merged["gflops"] < 0.6 * dense["gflops"]
    # Random classes would score about 1 / 9 each; the bundled model has really learned the scenes.
    assert dense["mean_iou"] > 0.5
    assert merged["mean_iou"] > 0.45


def test_demo_prints_a_table(capfd):
    code, out, _ = run(capfd, "demo", "--out", "shown", "--rounds", "1", "--height", "96", "--width", "160")
    assert code == 0
    for word in ("tokens", "GFLOPs", "ms", "agreement", "mIoU", "dense", "merged"):
        assert word in out


def test_demo_checkpoint_is_small_and_names_its_classes():
    folder = Path(__file__).parents[2] / "ailurus_hf" / "demo" / "checkpoint"
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 6_000_000
    config = AiluRusForSemanticSegmentation.from_pretrained(folder).config
    assert list(config.id2label.values()) == list(CLASS_NAMES)


def test_predict_with_a_hierarchical_model(capfd):
    tiny_segformer(AiluRusSegformerForSemanticSegmentation).save_pretrained("stages")
    AiluRusImageProcessor().save_pretrained("stages")
    code, out, _ = run(capfd, "predict", "pictures/first.png", "--model", "stages", "--json")
    assert code == 0
    [report] = json.loads(out)
    assert report["tokens"] is None


def test_info_of_a_hierarchical_model(capfd):
    tiny_segformer(AiluRusSegformerForSemanticSegmentation).save_pretrained("stages")
    code, out, _ = run(capfd, "info", "stages", "--height", "64", "--width", "100", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["architecture"]["blocks"] == [2, 3, 3, 2]
    assert report["merging"]["stage_keep_ratios"] == [1, 1, 0.5, 0.5]
    cost = report["one image of 64 x 100 pixels"]
    assert [cost[f"stage {stage} tokens"] for stage in (1, 2, 3, 4)] == [
        "16 x 25 = 400", "8 x 13 = 104", "4 x 7 = 28", "2 x 4 = 8",
    ]  # fmt: skip
    assert [cost[f"stage {stage} tokens after merging"] for stage in (1, 2, 3, 4)] == [400, 104, 14, 4]
    code, text, _ = run(capfd, "info", "stages")
    assert code == 0
    assert "one image of 64 x 64 pixels" in text


def test_visualize_a_hierarchical_model(capfd):
    tiny_segformer(AiluRusSegformerForSemanticSegmentation).save_pretrained("stages")
    AiluRusImageProcessor().save_pretrained("stages")
    code, out, _ = run(capfd, "visualize", "pictures/first.png", "--model", "stages", "--out", "f.png")
    assert code == 0
    assert out.splitlines()[0].startswith("stage 3: 8 of 15 tokens, stage 4: 3 of 6 tokens, ")
    with Image.open("f.png") as figure:
        assert figure.size[0] > 500


@pytest.mark.parametrize(
    ("model", "segmenter"),
    [
        (lambda: tiny_model(AiluRusModel), "AiluRusForSemanticSegmentation"),
        (lambda: tiny_model(AiluRusForImageClassification), "AiluRusForSemanticSegmentation"),
        (lambda: tiny_segformer(AiluRusSegformerBackbone), "AiluRusSegformerForSemanticSegmentation"),
    ],
    ids=["encoder", "classifier", "backbone"],
)
def test_checkpoints_without_a_segmentation_head(capfd, model, segmenter):
    model = model()
    name = type(model).__name__
    model.save_pretrained("other")
    capfd.readouterr()  # transformers' progress bar
    said = f"other holds {name}, which has no segmentation head; give a checkpoint of {segmenter}"
    for command in ("predict", "visualize"):
        assert said in refused(capfd, command, "pictures/first.png", "--model", "other")
    Path("labels").mkdir()
    for file in ("first.png", "second.png"):
        Image.new("L", (70, 44)).save(f"labels/{file}")
    assert said in refused(capfd, "evaluate", "--model", "other", "--images", "pictures", "--labels", "labels")
    code, out, _ = run(capfd, "info", "other", "--json")
    assert code == 0
    architecture = json.loads(out)["architecture"]
    assert architecture["class"] == name
    assert "head" not in architecture
    assert ("classes" in architecture) == name.endswith("Classification")
