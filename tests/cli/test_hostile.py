"""Hostile files and options: every command line is refused in one clear line, or rightly accepted."""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.cli.app import main
from tests.factories import tiny_model

PIXELS = np.random.default_rng(0).integers(0, 256, (44, 70, 3), dtype=np.uint8)

# Faults of a checkpoint: the file, and what it holds; a dictionary changes settings of the sound one.
CHECKPOINTS = {
    "no_model": ("config.json", None),
    "empty_config": ("config.json", ""),
    "cut_config": ("config.json", '{"model_type": "ailurus"'),
    "list_config": ("config.json", "[]"),
    "null_config": ("config.json", "null"),
    "latin_config": ("config.json", b'{"model_type": "\xe9"}'),
    "deep_config": ("config.json", "[" * 100_000),
    "deep_object": ("config.json", '{"a":' * 100_000),
    "other_model": ("config.json", {"model_type": "vit"}),
    "list_model_type": ("config.json", {"model_type": ["ailurus"]}),
    "no_model_type": ("config.json", {"model_type": None}),
    "no_heads": ("config.json", {"num_attention_heads": 0}),
    "negative_heads": ("config.json", {"num_attention_heads": -1}),
    "heads_in_words": ("config.json", {"num_attention_heads": "four"}),
    "uneven_heads": ("config.json", {"num_attention_heads": 5}),
    "no_width": ("config.json", {"hidden_size": 0}),
    "negative_width": ("config.json", {"hidden_size": -32}),
    "huge_width": ("config.json", {"hidden_size": 2**40}),
    "huge_mlp": ("config.json", {"intermediate_size": 2**40}),
    "large_mlp": ("config.json", {"intermediate_size": 2**26}),
    "negative_layers": ("config.json", {"num_hidden_layers": -1}),
    "more_layers": ("config.json", {"num_hidden_layers": 5}),
    "no_activation": ("config.json", {"hidden_act": "x"}),
    "number_activation": ("config.json", {"hidden_act": 7}),
    "word_labels": ("config.json", {"id2label": "x"}),
    "list_labels": ("config.json", {"id2label": [1, 2]}),
    "no_image_size": ("config.json", {"image_size": []}),
    "word_image_size": ("config.json", {"image_size": "large"}),
    "no_patch": ("config.json", {"patch_size": 0}),
    "large_patch": ("config.json", {"patch_size": 10**9}),
    "negative_patch": ("config.json", {"patch_size": -8}),
    "nan_ratio": ("config.json", {"keep_ratio": float("nan")}),
    "word_ratio": ("config.json", {"keep_ratio": "half"}),
    "unknown_grouping": ("config.json", {"grouping": "magic"}),
    "deep_layer": ("config.json", {"cluster_layer": 99}),
    "no_weights": ("model.safetensors", None),
    "empty_weights": ("model.safetensors", b""),
    "text_weights": ("model.safetensors", "weights"),
    "long_header": ("model.safetensors", b"\xff" * 64),
    "zero_weights": ("model.safetensors", b"\0" * 4096),
    "list_processor": ("preprocessor_config.json", "[]"),
    "null_processor": ("preprocessor_config.json", "null"),
    "empty_processor": ("preprocessor_config.json", ""),
    "deep_processor": ("preprocessor_config.json", "[" * 100_000),
    "huge_pictures": ("preprocessor_config.json", {"do_resize": True, "size": {"shortest_edge": 100_000}}),
    "huge_area": ("preprocessor_config.json", {"do_resize": True, "size": {"height": 10**9, "width": 10**9}}),
    "negative_pictures": ("preprocessor_config.json", {"do_resize": True, "size": {"height": -5, "width": 5}}),
    "word_size": ("preprocessor_config.json", {"do_resize": True, "size": "large"}),
    "list_size": ("preprocessor_config.json", {"do_resize": True, "size": []}),
    "unknown_size": ("preprocessor_config.json", {"do_resize": True, "size": {"depth": 3}}),
    "word_mean": ("preprocessor_config.json", {"image_mean": "grey"}),
    "two_means": ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}),
    "no_std": ("preprocessor_config.json", {"image_std": [0, 0, 0]}),
    "unknown_filter": (
        "preprocessor_config.json",
        {"do_resize": True, "resample": 99, "size": {"height": 48, "width": 48}},
    ),
}
INFO_TAKES = {name for name, (file, _) in CHECKPOINTS.items() if file == "preprocessor_config.json"}
REFUSED = """
transmogrify
--nonsense
predict
predict pictures
predict pictures --model
predict pictures --model nope
predict pictures --model ./nope
predict pictures --model nope/nope/nope
predict pictures --model /nope
predict pictures --model ''
predict pictures --model loop
predict pictures --model dead
predict pictures --model pictures/a.png
predict pictures --model pictures
predict pictures --model model/config.json
predict pictures --model model --device meta
predict pictures --model model --device cpu:x
predict pictures --model model --device abacus
predict pictures --model model --device cuda:99
predict pictures --model model --device ''
predict pictures --model model --dtype int8
predict pictures --model model --keep-ratio 0
predict pictures --model model --keep-ratio -1
predict pictures --model model --keep-ratio nan
predict pictures --model model --keep-ratio inf
predict pictures --model model --keep-ratio 1e300
predict pictures --model model --keep-ratio half
predict pictures --model model --cluster-layer -1
predict pictures --model model --cluster-layer 99
predict pictures --model model --cluster-layer 1.5
predict pictures --model model --grouping magic
predict pictures --model model --grouping ''
predict pictures --model model --compressed-size 5
predict pictures --model model --compressed-size 5xx
predict pictures --model model --compressed-size ''
predict pictures --model model --out ''
predict pictures --model model --out loop
predict pictures --model model --out loop/out
predict pictures --model model --out pictures/a.png
predict pictures --model model --out pictures/a.png/out
predict pictures --model model --out foreign
predict pictures --model model --out LONG
predict '' --model model
predict nope.png --model model
predict loop --model model
predict loop --model model --recursive
predict dead --model model
predict empty --model model
predict empty --model model --recursive
predict broken/empty.png --model model
predict broken/text.png --model model
predict broken/cut.png --model model
predict broken/folder.png --model model
predict broken/small.png --model model
predict broken/wide.png --model model
predict broken/animated.gif --model model
predict broken/float.tif --model model
predict pictures twin --model model
predict pictures --model nowindow --sliding-window
visualize
visualize pictures --model model
visualize nope.png --model model
visualize loop --model model
visualize broken/text.png --model model
visualize pictures/a.png --model model --out f.bmp
visualize pictures/a.png --model model --out f
visualize pictures/a.png --model model --out ''
visualize pictures/a.png --model model --out loop
visualize pictures/a.png --model model --out loop/f.png
visualize pictures/a.png --model model --out pictures/a.png
visualize pictures/a.png --model model --out pictures/a.png/f.png
visualize pictures/a.png --model model --device meta
visualize pictures/a.png --model model --keep-ratio 2
visualize pictures/a.png --model nope
info
info nope
info loop
info ''
info model --height 0
info model --height -5
info model --width 0
info model --height 5
info model --height 10000000
info model --height 10000000 --width 10000000
info model --width 99999999999999999999
info model --height x
info model --keep-ratio 0
info model --compressed-size 5
demo --height 20000
demo --height 1000000 --width 1000000
demo --width 0
demo --seed -1
demo --rounds 0
demo --keep-ratio 0
demo --keep-ratio nan
demo --out ''
demo --out loop
demo --out pictures/a.png
evaluate
evaluate --model model --images nope --labels labels
evaluate --model model --images pictures --labels nope
evaluate --model model --images empty --labels labels
evaluate --model model --images loop --labels labels
evaluate --model model --images pictures --labels loop
evaluate --model model --images pictures --labels wrong
evaluate --model model --images pictures --labels colours
evaluate --model model --images pictures --labels small
evaluate --model model --images pictures --labels texts
evaluate --model model --images pictures --labels labels --limit 0
evaluate --model model --images pictures --labels labels --scale 0
evaluate --model model --images pictures --labels labels --scale -1
evaluate --model model --images pictures --labels labels --scale nan
evaluate --model model --images pictures --labels labels --scale inf
evaluate --model model --images pictures --labels labels --scale 1000
evaluate --model model --images pictures --labels labels --scale 0.0001
evaluate --model model --images pictures --labels labels --keep-ratio 0
evaluate --model model --images pictures --labels labels --keep-ratio nan
evaluate --model model --images pictures --labels labels --flop-ratio 0
evaluate --model model --images pictures --labels labels --flop-ratio nan
evaluate --model model --images pictures --labels labels --flop-ratio 1e300
evaluate --model model --images pictures --labels labels --flop-ratio 2 --sliding-window
evaluate --model model --images pictures --labels labels --grouping magic
evaluate --model model --images pictures --labels labels --compressed-size 5
evaluate --model model --images pictures --labels labels --ignore-index 2
evaluate --model model --images pictures --labels labels --ignore-index x
evaluate --model model --images pictures --labels labels --csv ''
evaluate --model model --images pictures --labels labels --csv loop
evaluate --model model --images pictures --labels labels --csv pictures
evaluate --model model --images pictures --labels labels --csv pictures/a.png
evaluate --model model --images pictures --labels labels --csv pictures/a.png/t.csv
evaluate --model nowindow --images pictures --labels labels --sliding-window
evaluate --model adapter --images pictures --labels labels
convert
convert auto
convert magic model out
convert auto nope out
convert auto loop out
convert auto empty out
convert auto pictures out
convert auto pictures/a.png out
convert ailurus nope out
convert ailurus model ''
convert ailurus model model --overwrite
convert ailurus model . --overwrite
convert ailurus model pictures --overwrite
convert ailurus model foreign --overwrite
convert ailurus model loop --overwrite
convert ailurus model loop/out
convert ailurus model pictures/a.png --overwrite
convert ailurus model pictures/a.png/out
convert ailurus model LONG
convert ailurus model out --dtype int8
convert ailurus model out --shards many
convert ailurus model out --shards 0
convert ailurus model out --keep-ratio 0
convert ailurus model out --keep-ratio nan
convert ailurus model out --cluster-layer 99
convert ailurus model out --entry nope
convert ailurus model out --labels nope.json
convert ailurus model out --labels texts/a.png
convert ailurus model out --labels model/config.json/x
convert ailurus model out --set x
convert ailurus model out --set =1
convert ailurus model out --set num_attention_heads=0
convert ailurus model out --set num_attention_heads=-1
convert ailurus model out --set num_attention_heads=five
convert ailurus model out --set hidden_size=0
convert ailurus model out --set hidden_size=1e300
convert ailurus model out --set hidden_size=1099511627776
convert ailurus model out --set intermediate_size=1099511627776
convert ailurus model out --set num_hidden_layers=1000000000
convert ailurus model out --set patch_size=0
convert ailurus model out --set image_size=[]
convert ailurus model out --set image_size=10000000
convert ailurus model out --set hidden_act=x
convert ailurus model out --set id2label=x
convert ailurus model out --set keep_ratoi=0.3
convert ailurus model out --set keep_ratio=NaN
convert ailurus model out --set image_size=DEEP
"""
ACCEPTED = """
--version
--help
predict pictures --model model --keep-ratio 1
predict pictures --model model --keep-ratio 0.0001
predict pictures --model model --recursive
predict broken --model model --skip-unreadable
predict linked --model model
predict pictures --model model --debug
--debug predict pictures --model model --device cpu
visualize pictures/a.png --model model --out f.PNG
info model --height 8 --width 8
info model --height 4096
info model --height 100000 --width 100000
predict pictures --model unused_size
evaluate --model model --images pictures --labels labels --limit 1 --scale 0.5
evaluate --model model --images pictures --labels labels --limit 99999 --keep-ratio 1
evaluate --model model --images pictures --labels labels --ignore-index -1 --keep-ratio 1
convert auto model out --dry-run
convert ailurus model out --set keep_ratio=0.25
convert ailurus model empty --overwrite
demo --height 16 --width 16 --rounds 1
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Models, pictures and label maps, sound and faulty."""
    root = tmp_path_factory.mktemp("hostile")
    tiny_model(AiluRusForSemanticSegmentation).save_pretrained(root / "model")
    AiluRusImageProcessor().save_pretrained(root / "model")
    for name, (file, content) in CHECKPOINTS.items():
        shutil.copytree(root / "model", root / name)
        path = root / name / file
        if content is None:
            path.unlink()
        elif isinstance(content, dict):
            path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.copytree(root / "model", root / "nowindow")
    shutil.copytree(root / "huge_pictures", root / "unused_size")
    unused = root / "unused_size" / "preprocessor_config.json"
    unused.write_text(unused.read_text().replace('"do_resize": true', '"do_resize": false'))
    for name in ("empty", "adapter"):
        (root / name).mkdir()
    (root / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    picture = Image.fromarray(PIXELS)
    maps = {
        "pictures": picture,
        "twin": picture,
        "foreign": picture,
        "labels": Image.new("L", (70, 44), 2),
        "wrong": Image.new("L", (70, 44), 77),
        "colours": picture,
        "small": Image.new("L", (7, 4)),
        "broken": picture,
        "texts": picture,
    }
    for name, image in maps.items():
        (root / name).mkdir()
        for file in ("a.png", "b.png"):
            image.save(root / name / file)
    for file in ("a.png", "b.png"):
        (root / "texts" / file).write_text("no picture")
    (root / "foreign" / "a.json").write_text("{}")
    broken = root / "broken"
    (broken / "empty.png").touch()
    (broken / "text.png").write_text("no picture")
    (broken / "cut.png").write_bytes((broken / "a.png").read_bytes()[:300])
    (broken / "folder.png").mkdir()
    picture.resize((5, 5)).save(broken / "small.png")
    picture.resize((200, 1)).save(broken / "wide.png")
    picture.save(broken / "animated.gif", save_all=True, append_images=[picture.rotate(90)])
    Image.fromarray(PIXELS[..., 0].astype(np.float32)).save(broken / "float.tif")
    (root / "loop").symlink_to("loop")
    (root / "dead").symlink_to("gone")
    (root / "linked").symlink_to("pictures")
    return root


def run(capfd, line, folder):
    words = shlex.split(line.replace("LONG", "x" * 5000).replace("DEEP", "[" * 100_000))
    here = Path.cwd()
    os.chdir(folder)
    try:
        code = main(words)
    finally:
        os.chdir(here)
    printed = capfd.readouterr()
    return code, printed.out, printed.err


def refused(capfd, line, folder):
    before = sorted(folder.rglob("*"))
    code, out, err = run(capfd, line, folder)
    said = [text for text in err.splitlines() if not text.startswith("ailurus-hf: warning: ")]
    assert (code, out, len(said)) == (2, "", 1), (line, code, out, err)
    assert said[0].startswith("ailurus-hf: error: ")
    assert len(said[0]) < 1000
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before
    return said[0]


LINES = [line for line in REFUSED.splitlines() if line]


@pytest.mark.parametrize("line", LINES)
def test_refused(capfd, workplace, line):
    refused(capfd, line, workplace)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(capfd, workplace, name):
    refused(capfd, f"predict pictures --model {name}", workplace)
    if name not in INFO_TAKES:
        refused(capfd, f"info {name}", workplace)


@pytest.mark.parametrize("line", [line for line in ACCEPTED.splitlines() if line])
def test_accepted(capfd, workplace, line, tmp_path):
    shutil.copytree(workplace, tmp_path / "copy", symlinks=True)
    code, _, err = run(capfd, line, tmp_path / "copy")
    assert code == 0, err
    assert "Traceback" not in err


def test_there_are_enough_of_them():
    assert len(LINES) + len(CHECKPOINTS) >= 150
