import re

import pytest
from huggingface_hub.errors import StrictDataclassError

from ailurus_hf import LookupViTConfig
from ailurus_hf.modeling.configuration_lookupvit import compressed_grid
from tests.factories import tiny_lookupvit_config


def test_defaults_are_those_of_the_specification():
    config = LookupViTConfig()
    assert (config.mlp_ratio, config.lookup_mlp_divisor, config.pooling) == (4, 2, "both")
    assert (config.intermediate_size, config.lookup_intermediate_size) == (3072, 384)
    assert tuple(config.compressed_sizes) == (3, 5, 7, 10)
    assert config.position_grid == config.grid_size == (14, 14)
    assert config.compressed_position_grid == (10, 10)


def test_a_round_trip_through_a_file(tmp_path):
    config = tiny_lookupvit_config(compressed_size=(2, 3), compressed_sizes=(2, (3, 4)), out_features=["stage2"])
    config.save_pretrained(tmp_path)
    loaded = LookupViTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == LookupViTConfig(**config.to_dict()).to_dict()
    assert compressed_grid((6, 6), loaded.compressed_size) == (2, 3)
    assert loaded.fitting_sizes((6, 6)) == [(2, 2), (3, 4)]
    assert loaded.out_features == ["stage2"]


def test_compressed_positions_are_of_the_largest_size_that_fits_on_each_axis():
    assert tiny_lookupvit_config(compressed_sizes=(2, (3, 5), (4, 1), 7)).compressed_position_grid == (4, 5)
    video = tiny_lookupvit_config(num_frames=8, tubelet_size=2, compressed_sizes=(5, (2, 6, 6)))
    assert video.position_grid == (4, 6, 6)
    assert video.compressed_position_grid == (4, 6, 6)


@pytest.mark.parametrize(
    ("grid", "size", "expected"),
    [((6, 9), 4, (4, 4)), ((6, 9), [6, 9], (6, 9)), ((2, 6, 9), 4, (2, 4, 4)), ((8, 6, 9), 4, (4, 4, 4)),
     ((8, 6, 9), (1, 6, 2), (1, 6, 2))],
)  # fmt: skip
def test_compressed_grid(grid, size, expected):
    assert compressed_grid(grid, size) == expected


@pytest.mark.parametrize(
    ("grid", "size", "message"),
    [
        ((6, 9), 7, "compressed_size must be at most the grid of 6 x 9 tokens, got 7; lower it"),
        ((6, 9), (6, 10), "at most the grid of 6 x 9 tokens, got (6, 10)"),
        ((2, 6, 9), (3, 6, 9), "at most the grid of 2 x 6 x 9 tokens, got (3, 6, 9)"),
        ((6, 9), (5,), "compressed_size must be one number or 2 of them, (rows, columns), got (5,)"),
        ((2, 6, 9), (5, 5), "must be one number or 3 of them, (frames, rows, columns), got (5, 5)"),
        ((6, 9), (), "must be one number or 2 of them"),
    ],
)
def test_refuses_compressed_grids(grid, size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compressed_grid(grid, size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compressed_size": 0}, "must hold numbers above 0, got 0"),
        ({"compressed_size": (3, -1)}, "must hold numbers above 0, got -1"),
        ({"compressed_size": (3, 3, 3)}, "compressed_size must be one number or 2 of them"),
        ({"compressed_sizes": ()}, "must hold at least one compressed size, got (); such as (3, 5, 7, 10)"),
        ({"compressed_sizes": (3, 0)}, "must hold numbers above 0, got 0"),
        ({"compressed_sizes": (3, (3,))}, "compressed_sizes must be one number or 2 of them"),
        ({"compressed_sizes": (7, 9)}, "compressed_sizes must hold a size that fits the grid of 6 x 6 tokens, got"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads=5, got 32"),
        ({"lookup_mlp_divisor": 64}, "lookup_mlp_divisor must leave a hidden layer of width 1 or more, got 64"),
        ({"mlp_ratio": 0}, "finite and above 0, got 0"),
        ({"image_size": 7}, "image_size must hold at least one patch of patch_size=8, got 7"),
        ({"num_frames": 5, "tubelet_size": 2}, "num_frames must be a multiple of tubelet_size=2, got 5"),
        ({"pooling": "cls"}, "must be one of 'both', 'compressed', 'lookup', got 'cls'"),
        ({"palette": [[0, 0, 0]]}, "palette must have a colour for each of the num_labels=5 classes"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises((ValueError, StrictDataclassError), match=re.escape(message)):
        tiny_lookupvit_config(**settings)


def test_assignments_are_checked_too():
    config = tiny_lookupvit_config()
    config.compressed_size = (2, 4)
    with pytest.raises(StrictDataclassError, match="must hold numbers above 0"):
        config.compressed_size = 0
    assert config.compressed_size == (2, 4)
